"""How many prompts, and how many rows, a graph is kept of at once."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import Costs, Limits, in_units

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
        limits: what a sweep may use, and what one forward needs. Where the model lies on several
            devices, the graph of each layer lies on its own, and the tightest one counts.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        layers: how many layers have a graph.
        given: whether the user has given the budget.
        batch_size: how many prompts may run together.
        held: whether the gradients of each held layer are kept, for the layers below it.

    Raises:
        MemoryBudgetError: one prompt does not fit in a budget that was given.
    """
    prompts, rows = min(batch_size or batch, batch), None
    for there in _devices(limits, layers):
        row = there.layers * there.costs.bytes_of(seq_len, seq_len)
        row += 4 * limits.needs.logits if there.head else 0
        each = row + _COPIES * there.recorded
        if held:
            each += there.recorded * there.layers // 2
        if each > there.usable and given:
            at = f" on {there.device}" if there.device else ""
            raise MemoryBudgetError(
                f"attributing one prompt of {seq_len} tokens needs {in_units(each)}{at}, as its "
                f"graph is kept, and memory_budget leaves {in_units(there.usable)}: raise it, ask "
                "for fewer layers or components at once, or give shorter prompts"
            )
        prompts = min(max(there.usable // max(each, 1), 1), prompts)
        fitting = max(there.usable // max(row, 1), 1)
        rows = fitting if rows is None else min(fitting, rows)
    return GraphLimits(prompts, rows or 1)


@attrs.frozen
class _Device:
    """A device, as a graph finds it.

    Args:
        device: its name; empty where there is but one.
        layers: how many layers have a graph there.
        head: whether logits are computed there.
        costs: what a row needs there in one layer.
        recorded: bytes of a prompt's recorded runs there.
        usable: bytes that may be used there.
    """

    device: str
    layers: int
    head: bool
    costs: Costs
    recorded: int
    usable: int


def _devices(limits: Limits, layers: int) -> list[_Device]:
    """The devices of a graph that has as many of the highest layers."""
    needs = limits.needs
    if not limits.rooms:
        return [_Device("", layers, True, needs.costs, needs.recorded, limits.usable)]
    lowest = 1 + max(max(each.layers, default=-1) for each in needs.devices) - layers
    return [
        _Device(
            each.device,
            sum(layer >= lowest for layer in each.layers),
            each.head,
            each.costs,
            each.recorded,
            room.usable,
        )
        for each, room in zip(needs.devices, limits.rooms, strict=True)
    ]


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
    return paths, limits.less(paths * each)
