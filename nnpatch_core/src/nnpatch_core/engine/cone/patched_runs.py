"""The patched runs of a sweep: which cell in which prompt, from which token and layer on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import TypeAlias

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.adapters import STAGES
from nnpatch_core.tracing import BoundSite, Patches

#: For a cell's number and one of its sites `[batch, positions]`: where patching changes anything.
Changed: TypeAlias = Callable[[int, BoundSite], Booleans]


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

    def then(self, other: PatchedRuns) -> PatchedRuns:
        """These runs, and after them others."""
        pairs = zip(attrs.astuple(self), attrs.astuple(other), strict=True)
        return PatchedRuns(*(np.concatenate(pair) for pair in pairs))


def patched_runs(patches: Patches, batch: int, seq_len: int, changed: Changed) -> PatchedRuns:
    """The patched runs of a sweep; a cell that changes nothing in a prompt has none there.

    Left of a patch, and below it, all is as in the target run. So a patched run begins at the first
    token, and at the first site, that the patch changes.

    Args:
        patches: the cells.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        changed: where patching changes anything.
    """
    parts: list[tuple[Integers, Integers, Integers, Integers]] = []
    before: tuple[list[Booleans], tuple[object, ...]] | None = None
    began: tuple[Integers, Integers, Integers] = (np.zeros(0, np.int64),) * 3
    for number, cell in enumerate(patches.cells):
        heres = [changed(number, site) for site in cell.sites]
        sites = tuple((id(site.positions), site.place.stage) for site in cell.sites)
        # The edges from one sender into one layer change the same tokens, by the same array.
        same = before is not None and sites == before[1] and all(map(is_, heres, before[0]))
        if not same:
            began = _began(cell.sites, heres, batch, seq_len)
        before = heres, sites
        prompts, start, stage = began
        parts.append((np.full_like(prompts, number), prompts, start, stage))
    return PatchedRuns(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _began(
    sites: Sequence[BoundSite], heres: Sequence[Booleans], batch: int, seq_len: int
) -> tuple[Integers, Integers, Integers]:
    """The prompts in which a cell changes something, with the first position and stage there."""
    everyone = np.arange(batch)
    start = np.full(batch, seq_len)
    stage = np.full(batch, -1)
    for site, here in zip(sites, heres, strict=True):
        touched = np.any(here, axis=1)
        at = site.positions.at.numpy()
        first = at[everyone if len(at) > 1 else 0, here.argmax(1)]
        start = np.where(touched, np.minimum(start, first), start)
        stage = np.where(touched & (stage < 0), site.place.stage, stage)
    runs = stage >= 0
    return everyone[runs], start[runs], stage[runs]
