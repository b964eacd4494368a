"""How many prompts an edge sweep runs together: recorded runs and changes must fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import attrs

from nnpatch_core._models import module_of
from nnpatch_core.batch import Batch
from nnpatch_core.edges.nodes import Nodes
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import in_units, memory_budgets, placement_of
from nnpatch_core.sweep import Options

#: A layer's stream, attention, MLP and heads of the target run; heads and MLP of the source run.
_KEPT = 6
#: Recorded runs take at most this share of the budget.
_SHARE = 4


class _Swept(Protocol):
    """Edges."""

    @property
    def nodes(self) -> Nodes:
        """The nodes of the model."""
        ...

    @property
    def senders(self) -> Sequence[Any]:
        """The senders that are swept."""
        ...


def fitting_prompts(
    nnmodel: Any,
    batch: Batch,
    options: Options,
    *,
    layers: str,
    estimated: _Swept | None,
    told: bool,
) -> Options:
    """The same options, with as many prompts at once as fit, and the memory that is left.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the target prompts.
        options: how the sweep may run.
        layers: dotted path of the model's list of layers.
        estimated: the edges that are estimated, for which what all senders change is kept, and
            the gradients of all receivers; None if all are measured.
        told: whether the user has said how much memory there is. What a checkpoint says is what was
            left.

    Raises:
        MemoryBudgetError: the runs of one prompt do not fit.
    """
    model: Any = module_of(nnmodel)
    weight = next(model.parameters())
    width = int(model.get_input_embeddings().weight.shape[-1])
    placement = placement_of(model, layers)
    # Where there is one device, it is that of the embedding.
    devices = placement.working if placement.several else placement.devices[:1]
    budgets = memory_budgets(options.memory_budget, model, devices)
    own = 0
    if estimated is not None:
        own = len(estimated.senders) + len(estimated.nodes.receivers)
    prompts = min(options.batch_size or len(batch), len(batch))
    each: dict[str, int] = {}
    for device, budget in budgets.items():
        # What senders change and gradients of receivers come together behind the last layer.
        rows = _KEPT * len(placement.layers_on(device))
        rows += own if device == placement.head or not placement.several else 0
        each[device] = rows * batch.seq_len * width * weight.element_size()
        fitting = budget // _SHARE // max(each[device], 1)
        if fitting < 1 and told:
            at = f" on {device}" if placement.several else ""
            raise MemoryBudgetError(
                f"what is recorded of one prompt of {batch.seq_len} tokens needs "
                f"{in_units(each[device])}{at}, and memory_budget leaves "
                f"{in_units(budget // _SHARE)} of {in_units(budget)} for it: raise it, or give "
                "shorter prompts"
            )
        prompts = min(max(fitting, 1), prompts)
    if not told:
        return attrs.evolve(options, batch_size=prompts)
    left = {device: budget - prompts * each[device] for device, budget in budgets.items()}
    if not placement.several:
        (rest,) = left.values()
        return attrs.evolve(options, batch_size=prompts, memory_budget=rest)
    return attrs.evolve(options, batch_size=prompts, memory_budget=left)
