"""The patched runs of a sweep: which cell in which prompt, from which token and layer on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.adapters import STAGES
from nnpatch_core.seq_pos import Positions
from nnpatch_core.tracing import Cells, Patches


class Changed(Protocol):
    """Where patching changes anything."""

    def starts(self, cells: Cells, first: int) -> Integers:
        """`[sites, batch]`: the leftmost position that changes at each site of some cells.

        It is `NEVER` where nothing changes. `first` is the number of the first of the cells.
        """
        ...


#: Right of every position.
NEVER = np.iinfo(np.int32).max
#: How many numbers are looked at together.
_AT_ONCE = 2**22


def first_layer(stage: Integers) -> Integers:
    """The first layer that runs for what enters at a stage; the number of layers if none does."""
    return (stage + 1) // STAGES


@attrs.frozen(eq=False)
class PatchedRuns:
    """Patched runs: each a cell patched into a prompt, and a row of the trace that runs it.

    Args:
        cell: `[runs]`, the cell's number; -1 where nothing is patched.
        prompt: `[runs]`, the prompt's number.
        start: `[runs]`, the leftmost position that the patch changes.
        stage: `[runs]`, where the patch comes in; see `Place.stage`.
    """

    cell: Integers
    prompt: Integers
    start: Integers
    stage: Integers

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: Integers | Booleans | slice) -> PatchedRuns:
        """Some of the runs."""
        return PatchedRuns(
            self.cell[index], self.prompt[index], self.start[index], self.stage[index]
        )

    @classmethod
    def joined(cls, parts: Sequence[PatchedRuns]) -> PatchedRuns:
        """The runs of several, one after another."""
        if not parts:
            return cls(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part._columns for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def then(self, other: PatchedRuns) -> PatchedRuns:
        """These runs, and after them others."""
        return PatchedRuns.joined([self, other])

    @property
    def _columns(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.cell, self.prompt, self.start, self.stage


def patched_runs(patches: Patches, batch: int, changed: Changed) -> PatchedRuns:
    """The patched runs of a sweep; a cell that changes nothing in a prompt has none there.

    Left of a patch, and below it, all is as in the target run. So a patched run begins at the first
    token, and at the first site, that the patch changes.

    Args:
        patches: the cells.
        batch: the number of prompts.
        changed: where patching changes anything.
    """
    cells = patches.cells
    stages = np.array([place.stage for place in cells.places])
    each = max(1, _AT_ONCE * len(cells) // (max(len(cells.sites), 1) * batch))
    parts = [
        _some_runs(cells[first : first + each], first, changed, stages)
        for first in range(0, len(cells), each)
    ]
    return PatchedRuns.joined(parts)


def _some_runs(cells: Cells, first: int, changed: Changed, stages: Integers) -> PatchedRuns:
    """The runs of some cells, of which the first has this number."""
    start = changed.starts(cells, first)
    stage = stages[cells.sites.place]
    if cells.alone:
        cell, prompt = (start < NEVER).nonzero()
        return PatchedRuns(cell + first, prompt, start[cell, prompt].astype(np.int64), stage[cell])
    # The sites of a cell stand in the order in which a forward reaches them.
    entered = np.where(start < NEVER, stage[:, None], NEVER)
    begins = cells.ends[:-1]
    start = np.minimum.reduceat(start, begins, axis=0)
    entered = np.minimum.reduceat(entered, begins, axis=0)
    cell, prompt = (start < NEVER).nonzero()
    found = (each[cell, prompt].astype(np.int64) for each in (start, entered))
    return PatchedRuns(cell + first, prompt, *found)


def leftmost(positions: Positions, here: Booleans) -> Integers:
    """The first of some positions at which something changes, `[batch, ...]`; or `NEVER`.

    Args:
        positions: `[batch or 1, k]` of them.
        here: `[batch, k, ...]`: where something changes.
    """
    at = positions.at.numpy().astype(np.int32)
    first = here.argmax(1)
    if at.shape[1] == 1:
        found = at.reshape(-1, *[1] * (here.ndim - 2))
    else:
        rows = np.arange(len(here) if len(at) > 1 else 1).reshape(-1, *[1] * (here.ndim - 2))
        found = at[rows, first]
    starts: Integers = np.where(here.any(1), found, NEVER)
    return starts
