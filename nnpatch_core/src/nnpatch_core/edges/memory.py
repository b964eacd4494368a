"""How many prompts an edge sweep runs together: recorded runs and changes must fit in memory."""

from __future__ import annotations

from typing import Any

import attrs

from nnpatch_core.edges.sites import EdgeSites
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import in_units
from nnpatch_core.sweep import Sweep

#: A layer's stream, attention, MLP and heads of the target run; heads and MLP of the source run.
_KEPT = 6
#: Recorded runs take at most this share of the budget.
_SHARE = 4


def fitting_prompts(sweep: Sweep, sites: EdgeSites, *, estimated: bool) -> Sweep:
    """The same sweep with as many prompts at once as fit, and the memory that is left.

    The budget itself stays, so that a checkpoint knows that of the call.

    Args:
        sweep: the edges.
        sites: the same, as they were asked for.
        estimated: whether what all senders change is kept, and the gradients of all receivers.

    Raises:
        MemoryBudgetError: the runs of one prompt do not fit in a budget that was given.
    """
    model: Any = sweep.patches.model
    limits, given = sweep.limits, sweep.options.memory_budget is not None
    weight = next(model.parameters())
    width = int(model.get_input_embeddings().weight.shape[-1])
    own = len(sites.senders) + len(sites.nodes.receivers)
    rows = _KEPT * sites.nodes.n_layers + (own if estimated else 0)
    each = rows * sweep.seq_len * width * weight.element_size()
    # Beside them one patched run needs room.
    spare = (
        limits.usable - limits.recorded - limits.needs.costs.bytes_of(sweep.seq_len, sweep.seq_len)
    )
    room = min(limits.budget // _SHARE, spare)
    if each > room and given:
        raise MemoryBudgetError(
            f"what is recorded of one prompt of {sweep.seq_len} tokens needs {in_units(each)}, and "
            f"memory_budget leaves {in_units(max(room, 0))} of {in_units(limits.budget)} for it: "
            "raise it, or give shorter prompts"
        )
    prompts = min(max(room // each, 1), limits.prompts)
    left = max(limits.usable - prompts * each, limits.usable - max(room, 0))
    return attrs.evolve(sweep, limits=attrs.evolve(limits, prompts=prompts, usable=left))
