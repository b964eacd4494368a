"""The reference engine: a whole forward for every cell. It defines what is correct."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine.parts import Part
from nnpatch_core.engine.rows import Booleans
from nnpatch_core.site import AnySite, execution_order
from nnpatch_core.tracing import Replacement, forward


@attrs.frozen(eq=False)
class FullRun:
    """Each cell patched into a whole forward of all prompts.

    Args:
        nnmodel: the model, wrapped by nnsight.
        target: the prompts that are patched.
        cells: what is patched, each alone.
        replacement: what is put there.
        logits: `[batch, vocab]`, of the unpatched run.
    """

    nnmodel: Any
    target: Batch
    cells: Sequence[AnySite]
    replacement: Replacement
    logits: Tensor

    @property
    def elided(self) -> Booleans:
        """Nothing is known without a run."""
        return np.zeros((len(self.cells), len(self.target)), dtype=np.bool_)

    @property
    def begun(self) -> int:
        """All prompts of a cell come together."""
        return 1

    def work(self, done: Booleans) -> float:
        """One for each cell."""
        return float((~done).any(1).sum())

    def parts(self, done: Booleans, columns: Tensor | None) -> Iterator[Part]:
        """One part for each cell, of all prompts in their order, whatever the columns."""
        prompts = np.arange(len(self.target))
        for number, cell in enumerate(self.cells):
            if not done[number].all():
                logits = forward(self.nnmodel, self.target, self._patch(cell))
                yield Part(np.full_like(prompts, number), prompts, logits, None, 1.0)

    def _patch(self, cell: AnySite) -> Any:
        values = []
        for site in execution_order(cell.sites, self.nnmodel):
            whole = self.replacement.at(site.location(self.nnmodel))
            value = None if whole is None else site.select(whole, self.nnmodel)
            values.append((site, value))

        def visit(traced: Any) -> None:
            for site, value in values:
                site.write(traced, value, self.replacement.mask)

        return visit
