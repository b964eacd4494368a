"""A sweep's finished parts on disk, so that a sweep that was killed goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core.errors import CheckpointError
from nnpatch_core.patching.tally import Tally

_FORMAT = "nnpatch checkpoint 1"
#: At most this share of the time goes into writing.
_SHARE = 0.02


class Checkpoint:
    """One file, rewritten as a whole, or not at all, as parts of a sweep are finished.

    Args:
        path: the file; another call with the same sweep goes on from it.

    Raises:
        CheckpointError: there is a file that is no checkpoint, or no folder to write one in.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._wait = 0.0
        self._header: dict[str, Any] = {}
        if self._path.is_dir() or not self._path.parent.is_dir():
            raise CheckpointError(
                f"checkpoint={os.fspath(path)!r} is not a file in a folder that exists"
            )
        self._found = _read(self._path) if self._path.exists() else None

    @property
    def budget(self) -> int | None:
        """The memory budget with which the sweep was begun, which decides what runs together."""
        return None if self._found is None else int(self._found[0]["identity"]["memory_budget"])

    def open(self, identity: Mapping[str, str]) -> None:
        """Hold what is in the file to be of the same sweep.

        Args:
            identity: what makes the sweep what it is, each under a name that people know.

        Raises:
            CheckpointError: the file is of another sweep; the message says what differs.
        """
        self._header = {"format": _FORMAT, "identity": dict(identity)}
        if self._found is None:
            return
        before = self._found[0]["identity"]
        differ = [name for name, value in identity.items() if before.get(name) != value]
        if differ:
            told = "; ".join(
                f"{name}: {before.get(name, 'none')} then, {identity[name]} now" for name in differ
            )
            raise CheckpointError(
                f"{self._path} is the checkpoint of another sweep ({told}): name another file, "
                "or delete it"
            )

    def restore(self, tally: Tally) -> None:
        """Put what was measured before into `tally`."""
        if self._found is None:
            return
        tensors = self._found[1]
        before = tensors["done"].bool()
        tally.done[before] = True
        for number, value in enumerate(tally.values.values()):
            value[before] = tensors[f"values/{number}"][before]

    def save(self, tally: Tally, *, at_once: bool = False) -> None:
        """Write what is measured, unless it was written a moment ago."""
        begun = time.monotonic()
        if begun < self._wait and not at_once:
            return
        tensors = {f"values/{number}": value for number, value in enumerate(tally.values.values())}
        tensors["done"] = tally.done.to(torch.uint8)
        write_file(self._path, self._header, tensors)
        ended = time.monotonic()
        self._wait = ended + (ended - begun) / _SHARE


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        return read_file(path, _FORMAT, "a checkpoint", CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}") from error
