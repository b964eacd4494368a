"""A sweep's finished parts on disk, so that a sweep that was killed goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._files import check_file
from nnpatch_core._parts import check_folder, clean_up
from nnpatch_core._warnings import warn
from nnpatch_core.errors import CheckpointError, CheckpointWarning, ShardError
from nnpatch_core.memory import read_budget
from nnpatch_core.sweep.held import Held
from nnpatch_core.sweep.identity import UNTOLD, Identity
from nnpatch_core.sweep.provenance import Call, resumed
from nnpatch_core.sweep.share_file import ShareFile
from nnpatch_core.sweep.stored import KNOWN, Stored
from nnpatch_core.sweep.tally import Tally

#: At most this share of the time goes into writing.
_SHARE = 0.02


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
        #: The share of the sweep that is measured; None is all of it.
        self.share = path.share if isinstance(path, ShareFile) else None
        #: Is told how far the sweep is, from 0 to 1.
        self.tell = path.told if isinstance(path, ShareFile) else float
        #: What is known of the runs in which nothing is patched.
        self.held = path.held if isinstance(path, ShareFile) else Held()
        self._finished = False
        self._wait = 0.0
        self._identity: Identity = {}
        self._told: Callable[[], dict[str, Any]] = dict
        self._call = Call()
        #: How many values of the file's are measured, or none is known to be.
        self._kept = -1
        self._failed = False
        clean_up(self._path.parent)
        self._found = Stored.read(self._path) if self._path.exists() else None
        if self._found is None:
            check_folder(self._path.parent, CheckpointError)

    @property
    def budget(self) -> int | dict[str, int] | None:
        """The memory budget with which the sweep was begun, which decides what runs together."""
        return None if self._found is None else read_budget(self._found.identity["memory_budget"])

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
        self._identity = dict(identity)
        self._call, self._told = call, lambda: call.told(model)
        if self._found is None:
            return
        told = self._found.differences(identity)
        if told:
            raise CheckpointError(
                f"{self._path} is the checkpoint of another sweep ({told}): name another file, "
                "or delete it"
            )
        before = self._found.share
        if self.share is not None and before not in (None, self.share):
            raise ShardError(
                f"{self._path} is the checkpoint of shard {before}, not of {self.share}: name "
                "another file"
            )
        if UNTOLD in identity:
            warn(
                f"the sweep goes on from {self._path}, but depends on what is not to be compared "
                f"with what it was then: {identity[UNTOLD]}. If that is another now, delete the "
                "file.",
                CheckpointWarning,
            )

    def finish(self, tally: Tally) -> None:
        """Write that the share is measured.

        Raises:
            CheckpointError: it cannot be written, and what was measured would be lost.
        """
        self._finished = True
        self._write(tally)

    def restore(self, tally: Tally) -> None:
        """Put what was measured before into `tally`.

        Raises:
            CheckpointError: the file does not have what the sweep measures.
        """
        if self._found is None:
            return
        told, tensors = self._found.call, self._found.tensors
        own = _tensors(tally)
        # Of the same sweep, so that it has no others.
        if self._found.metrics != len(tally.values) or any(
            (tensors[name].shape, tensors[name].dtype) != (each.shape, each.dtype)
            for name, each in own.items()
        ):
            raise CheckpointError(
                f"{self._path} is no whole checkpoint: it has {self._found.metrics} metrics of "
                f"{list(tensors['done'].shape)} cells and prompts, the sweep has "
                f"{len(tally.values)} of {list(tally.done.shape)}"
            )
        before = tensors["done"].bool()
        for name, each in own.items():
            each[before] = tensors[name][before]
        self._kept = int(before.sum())
        self._call.goes_on(told)
        self._call.resumed = resumed(*self._found.runs, estimated=tally.estimated)
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
        try:
            self._write(tally)
            self._kept = measured
        except CheckpointError as error:
            self._say(error)
        ended = time.monotonic()
        self._wait = ended + (ended - begun) / _SHARE

    def _write(self, tally: Tally) -> None:
        stored = Stored(str(self._path), self._identity, self._told(), _tensors(tally))
        if self.share is None:
            stored.write(self._path)
            return
        shards = {self.share.number: self._finished}
        attrs.evolve(stored, count=self.share.count, shards=shards).write(
            self._path, self._finished
        )

    def _say(self, error: CheckpointError) -> None:
        # Said before it is raised by those who make errors of warnings: once is once.
        first, self._failed = not self._failed, True
        if first:
            warn(
                f"the checkpoint {error}; the sweep goes on, and is not kept until it can be "
                "written again",
                CheckpointWarning,
            )


def _tensors(tally: Tally) -> dict[str, Tensor]:
    """The part of a tally that is kept, in the memory of the tally itself."""
    tensors = {f"values/{number}": value for number, value in enumerate(tally.values.values())}
    # What is known without a run is found out anew by engines, and with each estimate.
    flags = ("done", *KNOWN) if tally.estimated else ("done",)
    return tensors | {name: getattr(tally, name).view(torch.uint8) for name in flags}


def budget_of(checkpoint: Checkpoint | None, memory_budget: Any) -> Any:
    """The memory budget of a call: that with which its checkpoint was begun, if none is given.

    What runs together decides on last digits, and so on a screen's near ties.
    """
    return checkpoint.budget if checkpoint and memory_budget is None else memory_budget
