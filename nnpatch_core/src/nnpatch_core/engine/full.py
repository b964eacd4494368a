"""The reference engine: a whole forward for every cell. It defines what is correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._models import Elsewhere
from nnpatch_core.batch import Batch
from nnpatch_core.engine.execution import Part
from nnpatch_core.errors import EngineError, MemoryBudgetError
from nnpatch_core.memory import Beginning, Limits, in_units
from nnpatch_core.tracing import (
    Intervention,
    Patches,
    Prepared,
    Sendable,
    forward,
    patched_there,
    put_site,
    read,
    write,
)


@attrs.frozen(eq=False)
class FullExecution:
    """Each cell patched into a whole forward of all prompts.

    Args:
        patches: the cells, each patched alone.
        target: the prompts that are patched.
        intervention: what is put there.
        unpatched: `[batch, vocab]`, of the unpatched run; None is made if anybody asks for it.
    """

    patches: Patches
    target: Batch
    intervention: Intervention
    unpatched: Tensor | None

    @property
    def logits(self) -> Tensor:
        """See `Execution.logits`."""
        if self.unpatched is None:
            return forward(self.patches.nnmodel, self.target)
        return self.unpatched

    @property
    def elided(self) -> Booleans:
        """Nothing is known without a run."""
        return np.zeros((len(self.patches.cells), len(self.target)), dtype=np.bool_)

    @property
    def begun(self) -> int:
        """One: all prompts of a cell come together."""
        return 1

    def shared_out(self, count: int) -> Integers:
        """Cell by cell in turn: all of them cost the same."""
        shares = np.arange(len(self.patches.cells)) % count
        return np.broadcast_to(shares[:, None], (len(shares), len(self.target)))

    def work(self, done: Booleans) -> float:
        """One for each cell."""
        return float((~done).any(1).sum())

    def parts(self, done: Booleans, ids: Tensor | None) -> Iterator[Part]:
        """One part for each cell, whatever the ids; elsewhere one for each request, of these ids.

        A part has all prompts of its cells, in their order.
        """
        prompts = np.arange(len(self.target))
        wanted = np.flatnonzero((~done).any(1))
        if not isinstance(self.patches.nnmodel, Elsewhere):
            for number in wanted.tolist():
                logits = self._here(number)
                yield Part(np.full_like(prompts, number), prompts, logits, None, 1.0)
            return
        first = 0
        for logits in self._elsewhere(self.patches.nnmodel, wanted, ids):
            some = wanted[first : first + len(logits)]
            first += len(some)
            cells, every = np.repeat(some, len(prompts)), np.tile(prompts, len(some))
            yield Part(cells, every, logits.flatten(0, 1), ids, float(len(some)))

    def _here(self, number: int) -> Tensor:
        """The logits of a cell, run here."""
        if isinstance(self.intervention, Prepared):
            everyone = torch.arange(len(self.target), device="cpu")
            self.intervention.ready(torch.full_like(everyone, number), everyone)
        visit = patching(self.patches, number, self.target, self.intervention)
        return forward(self.patches.nnmodel, self.target, visit)

    def _elsewhere(
        self, nnmodel: Elsewhere, wanted: Integers, ids: Tensor | None
    ) -> Iterator[Tensor]:
        """The logits of cells that run in another process, `[cells, batch, ...]` of a request."""
        if not isinstance(self.intervention, Sendable):
            raise EngineError(
                f"what {type(self.intervention).__name__} puts is code, which a run elsewhere does "
                "not have: leave out remote="
            )
        cells = self.patches.cells.take(wanted)
        return patched_there(nnmodel, self.target, cells, self.intervention, ids)


def patching(
    patches: Patches, number: int, target: Batch, intervention: Intervention
) -> Callable[[Any], None]:
    """A function that patches one cell, inside a trace of `target`."""
    shape = (len(target), target.seq_len)

    def visit(traced: Any) -> None:
        for site in patches.cells[number].sites:
            activation = read(traced, site.place, shape).clone()
            put_site(activation, site, number, intervention)
            write(traced, site.place, activation)

    return visit


def no_reason(_: Patches) -> None:
    """None: this engine runs every sweep."""


def at_once(_: Patches, __: Sequence[Batch]) -> Beginning:
    """None: its prompts run whole."""
    return Beginning()


def open_full(
    patches: Patches,
    target: Batch,
    intervention: Intervention,
    limits: Limits,
    logits: Tensor | None = None,
) -> FullExecution:
    """Run `target` unpatched, so that cells can be patched into it one by one.

    Args:
        patches: the cells.
        target: the prompts.
        intervention: what is put there.
        limits: the memory that the sweep may use, which is enough for one forward.
        logits: those of the unpatched run, where it was run before.

    Raises:
        MemoryBudgetError: prompts fit in memory in pieces alone.
    """
    if limits.pieces is not None:
        raise MemoryBudgetError(
            f"a whole forward of {target.seq_len} tokens needs {in_units(limits.at_once)} with "
            f"what is recorded, and memory_budget is {in_units(limits.budget)}: raise it, or give "
            "shorter prompts. engine='cone' runs prompts in pieces, and cannot run this sweep"
        )
    # A run elsewhere is a request, and mostly these logits have come already.
    if logits is None and not isinstance(patches.nnmodel, Elsewhere):
        logits = forward(patches.nnmodel, target)
    return FullExecution(patches, target, intervention, logits)
