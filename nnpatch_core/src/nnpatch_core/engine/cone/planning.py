"""From cells to a plan: the planner is pure, and this tells it what it must know."""

from __future__ import annotations

import attrs

from nnpatch_core.engine.cone.patched_runs import Changed, patched_runs
from nnpatch_core.engine.cone.plan import Plan, make_plan
from nnpatch_core.memory import Limits
from nnpatch_core.tracing import Patches


def plan_patches(
    patches: Patches, changed: Changed, batch: int, seq_len: int, limits: Limits
) -> Plan:
    """Plan how cells are patched into prompts.

    Args:
        patches: the cells.
        changed: where patching changes anything.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        limits: the memory that the sweep may use.

    Raises:
        MemoryBudgetError: a single patched run does not fit.
    """
    made = make_plan(
        patched_runs(patches, batch, changed),
        cells=len(patches.cells),
        batch=batch,
        n_layers=patches.n_layers,
        seq_len=seq_len,
        costs=limits.needs.costs,
        budget=limits.usable,
        recorded=batch * limits.recorded,
        rooms=limits.rooms,
    )
    return attrs.evolve(made, pieces=limits.pieces)
