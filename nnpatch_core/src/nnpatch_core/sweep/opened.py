"""Some prompts of a sweep, opened in the first engine that can run them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine import Choice, Engine, Execution
from nnpatch_core.errors import EngineError, MemoryBudgetError
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Intervention


@attrs.frozen(eq=False)
class Opened:
    """Some prompts of a sweep, opened in an engine.

    Args:
        target: the prompts that are patched.
        intervention: what is put there.
        execution: the engine at work.
        engine: which engine.
        others: the engines that are left, should this one fail.
        fallback: why it is not the one that was wanted.
        source_logits: `[batch, vocab]` of the run where activations were taken, if there is one.
    """

    target: Batch
    intervention: Intervention
    execution: Execution
    engine: Engine
    others: Sequence[Engine]
    fallback: str | None
    source_logits: Tensor | None

    def reopened(self, sweep: Sweep, reason: str) -> Opened:
        """The same prompts in the next engine, which need not run them unpatched again."""
        told, logits = _joined(self.fallback, reason), self.execution.logits
        return _opened(
            sweep, self.others, told, self.target, self.intervention, self.source_logits, logits
        )


def open_prompts(
    sweep: Sweep,
    choice: Choice,
    target: Batch,
    intervention: Intervention,
    source_logits: Tensor | None,
) -> Opened:
    """Make the target run of some prompts, in the first engine that can.

    Args:
        sweep: what is patched.
        choice: the engines.
        target: the prompts.
        intervention: what is put there.
        source_logits: `[batch, vocab]` of the run where activations were taken, if there is one.

    Raises:
        EngineError: the last of the engines cannot.
    """
    fallback = choice.fallback
    return _opened(sweep, choice.engines, fallback, target, intervention, source_logits, None)


def _opened(
    sweep: Sweep,
    engines: Sequence[Engine],
    fallback: str | None,
    target: Batch,
    intervention: Intervention,
    source_logits: Tensor | None,
    logits: Tensor | None,
) -> Opened:
    engine, others = engines[0], engines[1:]
    try:
        execution = engine.open(sweep.patches, target, intervention, sweep.limits, logits)
    except EngineError as error:
        if not others:
            raise
        told = _joined(fallback, str(error))
    except MemoryBudgetError as error:
        if fallback is None:
            raise
        raise MemoryBudgetError(f"{error}, as {fallback}") from error
    else:
        return Opened(target, intervention, execution, engine, others, fallback, source_logits)
    return _opened(sweep, others, told, target, intervention, source_logits, logits)


def _joined(before: str | None, reason: str) -> str:
    """The reasons against all engines that came before."""
    return reason if before is None else f"{before}; {reason}"
