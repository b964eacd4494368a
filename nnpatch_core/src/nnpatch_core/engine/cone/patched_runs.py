"""The patched runs of a sweep: which cell in which prompt, from which token and layer on."""

from __future__ import annotations

from collections.abc import Callable
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
    everyone = np.arange(batch)
    parts: list[tuple[Integers, Integers, Integers, Integers]] = []
    for number, cell in enumerate(patches.cells):
        start = np.full(batch, seq_len)
        stage = np.full(batch, -1)
        for site in cell.sites:
            here = changed(number, site)
            touched = np.any(here, axis=1)
            at = site.positions.at.numpy()
            first = at[everyone if len(at) > 1 else 0, here.argmax(1)]
            start = np.where(touched, np.minimum(start, first), start)
            stage = np.where(touched & (stage < 0), site.place.stage, stage)
        runs = stage >= 0
        prompts = everyone[runs]
        parts.append((np.full_like(prompts, number), prompts, start[runs], stage[runs]))
    return PatchedRuns(*(np.concatenate(part) for part in zip(*parts, strict=True)))
