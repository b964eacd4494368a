"""Logits that wait until those of all prompts of a cell are there, for metrics that need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core.engine import Part
from nnpatch_core.metrics import Metric, MetricContext, as_numbers, called, columns_given

#: A cell by its number, and what each metric gives for its prompts, `[batch]`.
Measured: TypeAlias = tuple[int, dict[str, Tensor]]


@attrs.frozen(eq=False)
class Waiting:
    """The cells of a sweep, as far as some but not all of their prompts were run.

    Args:
        metrics: what is measured once a cell is complete.
        context: what the metrics compare with, for the whole batch.
        ids: which ids of the vocabulary the metrics read; None is all.
        missing: `[cells, batch]`: what was neither run nor elided.
        measured: `[cells]`: which are complete, and were measured.
        logits: for each cell that was begun `[batch, ids]` or `[batch, places, ids]`: the target
            run's where it was not run, or not yet.
    """

    metrics: Mapping[str, Metric]
    context: MetricContext
    ids: Tensor | None
    missing: Booleans
    measured: Booleans
    logits: dict[int, Tensor] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls, metrics: Mapping[str, Metric], context: MetricContext, measured: Booleans
    ) -> Waiting:
        """No cell was begun; some were measured by an earlier call."""
        missing = np.ones((len(measured), len(context.source_answer_index)), dtype=np.bool_)
        ids = columns_given(metrics, context)
        return cls(metrics, context, ids, missing, measured.copy())

    @property
    def width(self) -> int:
        """How many logits of a prompt wait."""
        logits = self.context.target_logits
        ids = logits.shape[-1] if self.ids is None else len(self.ids)
        return ids * logits[0, ..., 0].numel()

    def elide(self, group: slice, chunk: slice, elided: Booleans) -> Iterator[Measured]:
        """Take elided pairs of cell and prompt as run; gives the cells that become complete."""
        self.missing[group, chunk] &= ~elided
        for cell in [*self.logits]:
            yield from self._complete(cell)

    def add(self, part: Part, group: slice, chunk: slice) -> Iterator[Measured]:
        """Some runs have come; gives the cells that are complete by that.

        Args:
            part: the runs, whose cells and prompts are counted from the first of these:
            group: which cells were run.
            chunk: which prompts.
        """
        ids = self._ids_in(part)
        for number in np.unique(part.cells):
            cell, here = group.start + int(number), part.cells == number
            if self.measured[cell]:
                continue
            if cell not in self.logits:
                unpatched = self.context.target_logits
                self.logits[cell] = (
                    unpatched.clone() if self.ids is None else unpatched[..., self.ids]
                )
            prompts = part.prompts[here] + chunk.start
            logits = part.logits[torch.from_numpy(here)]
            self.logits[cell][prompts] = logits if ids is None else logits[..., ids]
            self.missing[cell, prompts] = False
            yield from self._complete(cell)

    def _ids_in(self, part: Part) -> Tensor | None:
        """Which of the part's ids are those that are read; None is all of them."""
        if self.ids is None or part.ids is None:
            return self.ids
        return torch.searchsorted(part.ids, self.ids)

    def _complete(self, cell: int) -> Iterator[Measured]:
        if self.missing[cell].any():
            return
        logits = self.logits.pop(cell)
        self.measured[cell] = True
        yield (
            cell,
            {
                name: as_numbers(called(name, metric, self._whole(logits), self.context))
                for name, metric in self.metrics.items()
            },
        )

    def _whole(self, logits: Tensor) -> Tensor:
        """A copy, as wide as the vocabulary: nan where none was read."""
        if self.ids is None:
            return logits.clone()
        whole = torch.full_like(self.context.target_logits, torch.nan)
        whole[..., self.ids] = logits
        return whole
