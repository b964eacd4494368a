"""Learning on disk, so that one that was stopped goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._files import check_file
from nnpatch_core._parts import check_folder, clean_up
from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core._warnings import warn
from nnpatch_core.errors import CheckpointError, CheckpointWarning
from nnpatch_core.subspace.learning import Epoch, State
from nnpatch_core.sweep import UNTOLD, differences

_FORMAT = "nnpatch training 1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_place(path: Any) -> None:
    """Raise `CheckpointError` unless a file is there, or can be made."""
    file = check_file(path, CheckpointError)
    if not file.exists():
        check_folder(file.parent, CheckpointError)


class TrainingFile:
    """One file, rewritten as a whole after each epoch, or not at all.

    It has the state of every basis that one call learns, by name: the subspace and its controls.

    Args:
        path: the file; the same call goes on from it.
        identity: the words that make the call what it is, by a name that people know.

    Raises:
        CheckpointError: there is a file that is none, or one of another call.

    Warns:
        CheckpointWarning: learning depends on what cannot be compared with the file's.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        self._path = check_file(path, CheckpointError)
        self._identity = dict(identity)
        self._tensors: dict[str, Tensor] = {}
        self._history: dict[str, list[dict[str, Any]]] = {}
        self._failed = False
        clean_up(self._path.parent)
        if not self._path.exists():
            check_folder(self._path.parent, CheckpointError)
            return
        header, self._tensors = read_file(
            self._path, _FORMAT, "a checkpoint of learning", CheckpointError
        )
        before = header.get("identity")
        history = header.get("history")
        if not isinstance(before, dict) or not isinstance(history, dict):
            raise CheckpointError(f"{self._path} is no whole checkpoint of learning")
        if told := differences(before, self._identity):
            raise CheckpointError(
                f"{self._path} is the checkpoint of another call ({told}): name another file, or "
                "delete it"
            )
        if UNTOLD in self._identity:
            warn(
                f"learning goes on from {self._path}, but depends on what is not to be compared "
                f"with what it was then: {self._identity[UNTOLD]}. If that is another now, delete "
                "the file.",
                CheckpointWarning,
            )
        self._history = history

    def restore(self, name: str, state: State) -> None:
        """Put what the file knows of a basis into a state that has not begun.

        Raises:
            CheckpointError: the file does not have what this state has.
        """
        if name not in self._history:
            return
        parameter = state.basis.parameter
        own = {part: self._tensors.get(f"{name}/{part}") for part in self._parts(state)}
        if any(each is None for each in own.values()) or own["raw"].shape != parameter.shape:  # type: ignore[union-attr]
            raise CheckpointError(f"{self._path} is no whole checkpoint of learning: of {name}")
        found = {part: value for part, value in own.items() if value is not None}
        with torch.no_grad():
            parameter.copy_(found["raw"])
        state.best = found["best"].to(state.best)
        state.generator.set_state(found["generator"])
        state.history[:] = [Epoch(**each) for each in self._history[name]]
        step = found["step"]
        if float(step):
            state.optimizer.state[parameter] = {
                "step": step.clone(),
                **{moment: found[moment].to(parameter) for moment in _MOMENTS},
            }

    def save(self, name: str, state: State) -> None:
        """Write a state.

        Warns:
            CheckpointWarning: it cannot be written, for the first time.
        """
        parameter = state.basis.parameter
        moved = state.optimizer.state.get(parameter, {})
        none = torch.zeros_like(parameter.detach())
        own = {
            "raw": parameter.detach(),
            "best": state.best,
            "generator": state.generator.get_state(),
            "step": torch.as_tensor(moved.get("step", 0.0), dtype=torch.float32, device="cpu"),
            **{moment: moved.get(moment, none) for moment in _MOMENTS},
        }
        self._tensors |= {f"{name}/{part}": value.cpu().clone() for part, value in own.items()}
        self._history[name] = [attrs.asdict(each) for each in state.history]
        header = {"format": _FORMAT, "identity": self._identity, "history": self._history}
        try:
            write_file(self._path, header, self._tensors, CheckpointError)
        except CheckpointError as error:
            first, self._failed = not self._failed, True
            if first:
                warn(
                    f"the checkpoint {error}; learning goes on, and is not kept until it can be "
                    "written again",
                    CheckpointWarning,
                )

    @staticmethod
    def _parts(_: State) -> tuple[str, ...]:
        return ("raw", "best", "generator", "step", *_MOMENTS)
