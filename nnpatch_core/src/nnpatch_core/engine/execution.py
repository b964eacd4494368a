"""An engine at work on some prompts, and the parts in which it hands patched runs over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import attrs
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers


@attrs.frozen(eq=False)
class Part:
    """Some patched runs.

    Args:
        cells: `[runs]`, the number of each run's cell.
        prompts: `[runs]`, the number of its prompt.
        logits: `[runs, ids]` at the prompt's last token, in float32 on the CPU; or
            `[runs, places, ids]`, where the target prompts ask for others.
        ids: `[ids]`, which ids of the vocabulary they are of; None is all.
        work: the cost of the part, in a unit of the engine's own.
    """

    cells: Integers
    prompts: Integers
    logits: Tensor
    ids: Tensor | None
    work: float

    def only(self, runs: Booleans) -> Part:
        """Some of the runs; `runs` is `[runs]`."""
        if runs.all():
            return self
        logits = self.logits[torch.from_numpy(runs)]
        return attrs.evolve(self, cells=self.cells[runs], prompts=self.prompts[runs], logits=logits)


class Execution(Protocol):
    """An engine that has run the target prompts, and is ready to patch cells into them."""

    @property
    def logits(self) -> Tensor:
        """`[batch, vocab]` or `[batch, places, vocab]`, of the unpatched target run."""
        ...

    @property
    def elided(self) -> Booleans:
        """`[cells, batch]`: where all that is read is the target run's, so that it need not run."""
        ...

    @property
    def begun(self) -> int:
        """How many cells at most are incomplete at any time: some of their prompts have come."""
        ...

    def shared_out(self, count: int) -> Integers:
        """`[cells, batch]`: which of `count` shares, from 0, has a pair of cell and prompt.

        What shares a trace is in one share. It depends on the sweep and on `count` alone.
        """
        ...

    def work(self, done: Booleans) -> float:
        """The cost of all that is neither elided nor done, in the engine's own unit."""
        ...

    def parts(self, done: Booleans, ids: Tensor | None) -> Iterator[Part]:
        """Run all that is neither elided nor done, and again what shared a trace with that.

        What runs together decides on last digits: so they are those of an unbroken sweep.

        Args:
            done: `[cells, batch]`: what an earlier call has run.
            ids: which ids of the vocabulary will be looked at; None is all.

        Raises:
            EngineError: the model cannot be run in this way.
        """
        ...
