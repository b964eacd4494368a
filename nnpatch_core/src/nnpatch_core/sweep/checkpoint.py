"""A sweep's finished parts on disk, so that a sweep that was killed goes on where it was."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nnpatch_core._files import check_file
from nnpatch_core._parts import check_folder, clean_up
from nnpatch_core._printable import shown
from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core._warnings import warn
from nnpatch_core.errors import CheckpointError, CheckpointWarning
from nnpatch_core.sweep.identity import UNTOLD, Identity
from nnpatch_core.sweep.provenance import Call
from nnpatch_core.sweep.tally import Tally

_FORMAT = "nnpatch checkpoint 3"
#: At most this share of the time goes into writing.
_SHARE = 0.02
#: What a budget may be, in bytes: a file must not name one that is longer than any number is.
_LONGEST = 24
#: How much of a file's words a message shows.
_SHOWN = 200


class Checkpoint:
    """One file, rewritten as a whole, or not at all, as parts of a sweep are finished.

    A link is followed. Where the file cannot be written while the sweep runs, that is said once, as
    a `CheckpointWarning`, and the sweep goes on.

    Args:
        path: the file; another call with the same sweep goes on from it.

    Raises:
        CheckpointError: there is a file that is no whole checkpoint, or no folder to write one in.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = check_file(path, CheckpointError)
        self._wait = 0.0
        self._header: dict[str, Any] = {}
        self._told: Callable[[], dict[str, Any]] = dict
        self._call = Call()
        #: How many values of the file's are measured, or none is known to be.
        self._kept = -1
        self._failed = False
        clean_up(self._path.parent)
        if self._path.exists():
            self._found: _Content | None = _read(self._path)
        else:
            self._found = None
            check_folder(self._path.parent, CheckpointError)

    @property
    def budget(self) -> int | None:
        """The memory budget with which the sweep was begun, which decides what runs together."""
        return None if self._found is None else int(self._found[0]["memory_budget"])

    def open(self, identity: Identity, call: Call, model: nn.Module) -> None:
        """Hold what is in the file to be of the same sweep.

        Args:
            identity: what makes the sweep what it is, each under a name that people know.
            call: that sweeps; it goes on from the one of the file.
            model: what is swept.

        Raises:
            CheckpointError: the file is of another sweep; the message says what differs.

        Warns:
            CheckpointWarning: the sweep depends on what cannot be compared with the file's.
        """
        self._header = {"format": _FORMAT, "identity": dict(identity)}
        self._call, self._told = call, lambda: call.told(model)
        if self._found is None:
            return
        before = self._found[0]
        names = [*identity, *(name for name in before if name not in identity)]
        told = "; ".join(
            f"{_shown(name)}: {_shown(before.get(name))} then, {_shown(identity.get(name))} now"
            for name in names
            if before.get(name) != identity.get(name)
        )
        if told:
            raise CheckpointError(
                f"{self._path} is the checkpoint of another sweep ({told}): name another file, "
                "or delete it"
            )
        if UNTOLD in identity:
            warn(
                f"the sweep goes on from {self._path}, but depends on what is not to be compared "
                f"with what it was then: {identity[UNTOLD]}. If that is another now, delete the "
                "file.",
                CheckpointWarning,
            )

    def restore(self, tally: Tally) -> None:
        """Put what was measured before into `tally`.

        Raises:
            CheckpointError: the file does not have what the sweep measures.
        """
        if self._found is None:
            return
        told, tensors = self._found[1:]
        if tensors["done"].shape != tally.done.shape or len(tensors) != len(tally.values) + 1:
            raise CheckpointError(
                f"{self._path} is no whole checkpoint: it has {len(tensors) - 1} metrics of "
                f"{list(tensors['done'].shape)} cells and prompts, the sweep has "
                f"{len(tally.values)} of {list(tally.done.shape)}"
            )
        before = tensors["done"].bool()
        tally.done[before] = True
        for number, value in enumerate(tally.values.values()):
            value[before] = tensors[f"values/{number}"][before]
        self._kept = int(before.sum())
        self._call.goes_on(told)
        self._call.resumed = self._kept, before.numel()
        # What is in the tally need not be held twice.
        self._found = None

    def save(self, tally: Tally, *, at_once: bool = False) -> None:
        """Write what is measured, unless it was written a moment ago.

        Warns:
            CheckpointWarning: it cannot be written, for the first time.
        """
        begun = time.monotonic()
        if begun < self._wait and not at_once:
            return
        measured = int(tally.done.sum())
        if measured == self._kept:
            return
        tensors = {f"values/{number}": value for number, value in enumerate(tally.values.values())}
        tensors["done"] = tally.done.to(torch.uint8)
        try:
            header = {**self._header, "call": self._told()}
            write_file(self._path, header, tensors, CheckpointError)
            self._kept = measured
        except CheckpointError as error:
            self._tell(error)
        ended = time.monotonic()
        self._wait = ended + (ended - begun) / _SHARE

    def _tell(self, error: CheckpointError) -> None:
        # Said before it is raised by those who make errors of warnings: once is once.
        first, self._failed = not self._failed, True
        if first:
            warn(
                f"the checkpoint {error}; the sweep goes on, and is not kept until it can be "
                "written again",
                CheckpointWarning,
            )


def budget_of(checkpoint: Checkpoint | None, memory_budget: Any) -> Any:
    """The memory budget of a call: that with which its checkpoint was begun, if none is given.

    What runs together decides on last digits, and so on a screen's near ties.
    """
    return checkpoint.budget if checkpoint and memory_budget is None else memory_budget


def _shown(value: str | None) -> str:
    """Words of a file, as a message may show them."""
    said = "none" if value is None else value
    return said if said.isprintable() and len(said) < _SHOWN else repr(said[:_SHOWN])


#: The identity of a sweep, what is told of its call, and tensors.
_Content: TypeAlias = tuple[dict[str, str], dict[str, Any], dict[str, Tensor]]


def _read(path: os.PathLike[str]) -> _Content:
    """The content of a checkpoint, which fits together.

    Raises:
        CheckpointError: they do not, or the file is none.
    """
    header, tensors = read_file(path, _FORMAT, "a checkpoint", CheckpointError)
    fault = _fault(header, tensors)
    if fault is not None:
        raise CheckpointError(f"{os.fspath(path)} is no whole checkpoint: {fault}")
    return header["identity"], header["call"], tensors


def _fault(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Why header and tensors are not what a sweep writes."""
    identity = header.get("identity")
    if set(header) != {"format", "identity", "call"} or not isinstance(identity, dict):
        return f"its header has {_shown(', '.join(sorted(header)))}"
    if not all(isinstance(value, str) for value in identity.values()):
        return "its identity is not made of words"
    if not _is_call(header["call"]):
        return f"its call is {shown(header['call'])}"
    budget = identity.get("memory_budget", "")
    if not (budget.isascii() and budget.isdigit() and 0 < len(budget) < _LONGEST and int(budget)):
        return f"its memory_budget is {budget[:_LONGEST]!r}"
    names = {"done", *(f"values/{number}" for number in range(len(tensors) - 1))}
    if len(tensors) < 2 or set(tensors) != names:
        return f"its tensors are {_shown(', '.join(sorted(tensors)))}"
    done = tensors["done"]
    if done.dtype != torch.uint8 or done.ndim != 2 or not done.numel() or int(done.max()) > 1:
        return "it does not tell what is done"
    for name, value in tensors.items():
        if name != "done" and (value.dtype != torch.float32 or value.shape != done.shape):
            return f"{name} is {value.dtype} {list(value.shape)}, of {list(done.shape)} numbers"
    return None


def _is_call(told: Any) -> bool:
    """Whether JSON is what `Call.told` gives."""
    if not isinstance(told, dict) or set(told) != {"started", "seconds", "environment"}:
        return False
    texts, seconds = (told["started"], told["environment"]), told["seconds"]
    number = type(seconds) in (int, float) and 0 <= seconds < math.inf
    return number and all(isinstance(text, str) and text.isprintable() for text in texts)
