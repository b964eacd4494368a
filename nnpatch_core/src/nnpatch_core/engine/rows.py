"""What a sweep has to run: for each cell and prompt whether, and from which token and layer on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np

from nnpatch_core._models import module_of
from nnpatch_core.components import Component
from nnpatch_core.layers import row_of
from nnpatch_core.site import AnySite, Site, execution_order

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

#: A layer has three stages: its input, what is inside, its output.
STAGES = 3
INPUT, INSIDE, OUTPUT = range(STAGES)


def stage_of(layer: int, component: Component) -> int:
    """When a forward reaches a component: three stages a layer, from 0."""
    if component.module:
        return STAGES * layer + INSIDE
    return STAGES * layer + (INPUT if component.side == "input" else OUTPUT)


def first_layer(stage: Integers) -> Integers:
    """The first layer that runs for what enters at a stage; the number of layers if none does."""
    return (stage + 1) // STAGES


@attrs.frozen(eq=False)
class Rows:
    """Patched runs, one row each: a cell patched into a prompt.

    Args:
        cell: `[rows]`, the cell's number.
        prompt: `[rows]`, the prompt's number.
        start: `[rows]`, the leftmost position that the patch changes.
        stage: `[rows]`, where the patch comes in; see `stage_of`.
    """

    cell: Integers
    prompt: Integers
    start: Integers
    stage: Integers

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: Integers | Booleans | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.cell[index], self.prompt[index], self.start[index], self.stage[index])

    def then(self, other: Rows) -> Rows:
        """These rows, and after them others."""
        pairs = zip(attrs.astuple(self), attrs.astuple(other), strict=True)
        return Rows(*(np.concatenate(pair) for pair in pairs))


def rows_of(
    cells: Sequence[AnySite],
    batch: int,
    seq_len: int,
    changes: Callable[[Site], Booleans],
    nnmodel: Any,
) -> Rows:
    """The rows of a sweep; a cell that changes nothing in a prompt has none there.

    What stands left of a patch, or below it, is the target run's own: so a row begins at the first
    token, and at the first site, where what is put differs from what was there.

    Args:
        cells: what is patched, each alone.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        changes: for a site `[batch, seq]`: where patching it puts something else there.
        nnmodel: the model, whose layers may differ in kind.
    """
    model = module_of(nnmodel)
    everyone = np.arange(batch)
    found: list[tuple[Integers, Integers, Integers, Integers]] = []
    for number, cell in enumerate(cells):
        start = np.full(batch, seq_len)
        stage = np.full(batch, -1)
        for site in execution_order(cell.sites, nnmodel):
            changed = changes(site)
            touched = changed.any(1)
            start = np.where(touched, np.minimum(start, changed.argmax(1)), start)
            entry = stage_of(site.layer, row_of(site.api, model, site.layer, site.component))
            stage = np.where(touched & (stage < 0), entry, stage)
        runs = stage >= 0
        prompts = everyone[runs]
        found.append((np.full_like(prompts, number), prompts, start[runs], stage[runs]))
    joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
    return Rows(*joined)
