"""An outcome, or a sum of outcomes, as a notebook shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nnpatch_core._html import block, heading, table
from nnpatch_core.results.top import make_top, pieces
from nnpatch_core.results.words import in_digits, unit_of

if TYPE_CHECKING:
    from nnpatch_core.results.combination import Combination
    from nnpatch_core.results.outcome import Outcome

#: The entries of an outcome's `info` that are shown, if they are there.
_FACTS = ("model", "weights", "adapter", "engine", "fallback", "elided", "hooks", "started")
_STRONGEST = 5


def as_html(outcome: Outcome | Combination) -> str:
    """An outcome as HTML: its metric, model and prompts, its grids, and the strongest cells."""
    batch, seq_len = outcome.count, outcome.prompts.target_tokens.shape[1]
    prompts = f"{batch} of {seq_len} tokens"
    if len({term.outcome.count for term in outcome.terms}) > 1:
        counts = ", ".join(str(term.outcome.count) for term in outcome.terms)
        prompts = f"{counts} of {seq_len} tokens"
    facts = [
        ("metric", f"{outcome.metric}, {unit_of(outcome)}"),
        *((name, outcome.info[name]) for name in _FACTS if name in outcome.info),
        ("prompts", prompts),
    ]
    # Without p-values, which take all cells and not these alone: a page is shown unasked.
    top = make_top(outcome, _STRONGEST, None, True, flips=0)
    return block(
        heading(f"{type(outcome).__name__}: {outcome.kind}"),
        table((), facts),
        table(("site", "shape", "cells", "lowest", "highest"), map(_grid(outcome), outcome)),
        pieces(top, f"The strongest {len(top)}; out.top() has more"),
    )


def _grid(outcome: Outcome | Combination) -> Any:
    def row(name: str) -> list[str]:
        values = outcome[name][outcome.swept(name)]
        shape = [len(axis.labels) for axis in outcome.axes(name)]
        axes = f"{shape} {', '.join(axis.name for axis in outcome.axes(name))}"
        ends = [_written(end.item()) for end in values.aminmax()] if len(values) else ["", ""]
        return [name, axes, str(len(values)), *ends]

    return row


def _written(value: Any) -> str:
    return in_digits(value) if isinstance(value, float) else str(value)
