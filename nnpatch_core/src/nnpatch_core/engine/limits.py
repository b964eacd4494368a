"""How a sweep is cut to the memory that it may use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._models import input_device
from nnpatch_core.engine.memory import Needs, memory_budget, needs_of
from nnpatch_core.engine.plan import in_units
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.site import Site

_HOST = torch.device("cpu")
#: How many rows of logits metrics are tried out on, and copies of them.
_TRIED = 40
#: In host memory the allocator keeps pieces of what is freed: about so much, whatever the budget.
_ALLOCATOR = 16 * 2**20


@attrs.frozen(eq=False)
class Limits:
    """What a sweep may use, and what follows from it.

    Args:
        needs: what the sweep needs.
        budget: bytes that it may use on the device besides the weights.
        usable: how many of them there are for recorded runs and rows.
        prompts: how many prompts run together.
        store: where recorded runs lie; None is where they were computed.
    """

    needs: Needs
    budget: int
    usable: int
    prompts: int
    store: torch.device | None

    @property
    def recorded(self) -> int:
        """Bytes on the device that the recorded run of a prompt takes."""
        return 0 if self.store is not None else self.needs.recorded


def limits_of(
    sites: Sequence[Site],
    nnmodel: Any,
    model: nn.Module,
    batch: int,
    seq_len: int,
    given: Any,
    batch_size: int | None,
    whole: bool,
) -> Limits:
    """Decide how many prompts run together, and where what is recorded of them lies.

    Recorded runs take at most half of the budget, so that the other half is left for rows. Where
    they do not fit on a device of its own memory, they lie in host memory.

    Args:
        sites: every site of the sweep.
        nnmodel: the model, wrapped by nnsight.
        model: the same, as it is.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        given: bytes, a string such as `"4 GiB"`, or None for half of what is free.
        batch_size: how many prompts may run together; None is as many as fit.
        whole: whether the logits of the whole vocabulary are computed for each row.

    Raises:
        MemoryBudgetError: `given` is malformed, or one prompt does not fit in it.
    """
    needs = needs_of(sites, nnmodel, model, seq_len, whole)
    budget = memory_budget(given, model)
    wanted = min(batch_size or batch, batch)
    device = input_device(model)
    own = device is not None and device.type != "cpu"
    room = max(needs.forward, needs.costs.bytes_of(seq_len, seq_len))
    recorded = needs.recorded
    # The logits of both runs stay, and all of them are in host memory.
    fixed = 0 if own else needs.logits * (2 * batch + _TRIED)
    kept_back = 0 if own else _ALLOCATOR
    usable = budget - fixed - min(kept_back, (budget - fixed) // 2)
    fitting = usable // 2 // (recorded + needs.forward)
    if own and fitting < wanted:
        recorded = 0
        fitting = usable // 2 // needs.forward
    least = recorded + room
    if least > usable:
        enough = fixed + least + min(kept_back, least)
        if given is not None:
            raise MemoryBudgetError(
                f"a sweep of one prompt of {seq_len} tokens needs {in_units(enough)}, of which its "
                f"recorded runs take {in_units(recorded)}, and memory_budget is "
                f"{in_units(budget)}: raise it, sweep fewer layers or components at once, or give "
                "shorter prompts"
            )
        # Our estimate is on the safe side: with what there is, it may still do.
        budget, usable = enough, least
    return Limits(needs, budget, usable, max(min(fitting, wanted), 1), None if recorded else _HOST)
