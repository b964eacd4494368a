"""How many prompts, and how many rows, a graph is kept of at once."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import Limits, in_units

#: Beside the graph there are a prompt's source, target and gradients.
_COPIES = 3


@attrs.frozen
class GraphLimits:
    """The most that attribution may hold at once.

    Args:
        prompts: prompts whose graphs are kept together.
        rows: rows of a graph from one layer on, or of one attention.
    """

    prompts: int
    rows: int


def graph_limits(
    limits: Limits,
    batch: int,
    seq_len: int,
    layers: int,
    *,
    given: bool,
    batch_size: int | None,
    held: bool,
) -> GraphLimits:
    """Cut prompts to the memory that there is.

    Args:
        limits: what a sweep may use, and what one forward needs.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        layers: how many layers have a graph.
        given: whether the user has given the budget.
        batch_size: how many prompts may run together.
        held: whether the gradients of each held layer are kept, for the layers below it.

    Raises:
        MemoryBudgetError: one prompt does not fit in a budget that was given.
    """
    row = layers * limits.needs.costs.bytes_of(seq_len, seq_len) + 4 * limits.needs.logits
    each = row + _COPIES * limits.needs.recorded
    if held:
        each += limits.needs.recorded * layers // 2
    if each > limits.usable and given:
        raise MemoryBudgetError(
            f"attributing one prompt of {seq_len} tokens needs {in_units(each)}, as its graph is "
            f"kept, and memory_budget leaves {in_units(limits.usable)}: raise it, ask for fewer "
            "layers or components at once, or give shorter prompts"
        )
    fitting = max(limits.usable // each, 1)
    prompts = min(fitting, batch_size or batch, batch)
    return GraphLimits(prompts, max(limits.usable // row, 1))


def waiting_paths(
    limits: Limits, places: int, batch: int, steps: int, metrics: Sequence[str]
) -> tuple[int, Limits]:
    """How many paths are looked at together where logits wait for those of all prompts.

    Args:
        limits: what a sweep may use.
        places: how many paths there are.
        batch: the number of prompts.
        steps: points on each path.
        metrics: the names of the metrics that are given all prompts together.

    Returns:
        The number of paths, and what is left for graphs.

    Raises:
        MemoryBudgetError: the logits along one path do not fit.
    """
    # The logits, and for each metric its gradient.
    each = steps * batch * limits.needs.logits * (1 + len(metrics))
    if 2 * each > limits.usable:
        names = ", ".join(map(repr, metrics))
        raise MemoryBudgetError(
            f"the logits of {batch} prompts at {steps} points of a path, given to {names} together,"
            f" need {in_units(each)}, and memory_budget leaves {in_units(limits.usable // 2)} for "
            f"them: raise it, declare {names} with @per_prompt, if each prompt has a number of its "
            "own, take fewer steps, or give fewer prompts at once"
        )
    paths = min(max(limits.usable // 4 // each, 1), places)
    return paths, attrs.evolve(limits, usable=limits.usable - paths * each)
