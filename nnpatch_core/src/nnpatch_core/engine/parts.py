"""What an engine hands over, as it comes: patched runs, and which cell and prompt each is of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import attrs
from torch import Tensor

from nnpatch_core.engine.rows import Booleans, Integers


@attrs.frozen(eq=False)
class Part:
    """Some patched runs.

    Args:
        cells: `[runs]`, the number of each run's cell.
        prompts: `[runs]`, the number of its prompt.
        logits: `[runs, columns]` at the prompt's last token, in float32 on the CPU.
        columns: `[columns]`, which ids of the vocabulary they are of; None is all.
        work: what the part cost, in a unit of the engine's own.
    """

    cells: Integers
    prompts: Integers
    logits: Tensor
    columns: Tensor | None
    work: float


class EngineRun(Protocol):
    """A sweep over some prompts, ready to run."""

    @property
    def logits(self) -> Tensor:
        """`[batch, vocab]`, of the unpatched target run."""
        ...

    @property
    def elided(self) -> Booleans:
        """`[cells, batch]`: what is the target run itself, so that it need not be run."""
        ...

    @property
    def begun(self) -> int:
        """Of how many cells at most some prompts but not all have come at any time."""
        ...

    def work(self, done: Booleans) -> float:
        """What all that is neither elided nor done costs, in the engine's own unit."""
        ...

    def parts(self, done: Booleans, columns: Tensor | None) -> Iterator[Part]:
        """Run what is neither elided nor done, and again what was run in one trace with that.

        What runs together decides on last digits: so they are those of an unbroken run.

        Args:
            done: `[cells, batch]`: what an earlier call has run.
            columns: which ids of the vocabulary will be looked at; None is all.
        """
        ...
