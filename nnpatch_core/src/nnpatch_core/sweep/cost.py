"""The cost of a sweep in the cone engine, told from its prompts, before anything runs."""

from __future__ import annotations

import torch

from nnpatch_core._arrays import Booleans
from nnpatch_core.engine import Plan, joined, plan_patches
from nnpatch_core.memory import Limits
from nnpatch_core.seq_pos import NONE
from nnpatch_core.tracing import BoundSite, Patches


def plan_of(patches: Patches, limits: Limits, changed: Booleans) -> Plan:
    """The plan of a sweep in the cone engine.

    Args:
        patches: the cells.
        limits: the memory that the sweep may use.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Raises:
        MemoryBudgetError: a single run does not fit.
    """
    batch, seq_len = changed.shape
    plans = []
    for chunk in limits.chunks(batch):
        here = changed[chunk]

        def at(_: int, site: BoundSite, here: Booleans = here) -> Booleans:
            positions = site.positions
            picked = positions.picked(torch.from_numpy(here))
            if positions.source is not None:
                # Taken from elsewhere, it is another value, whatever the tokens are.
                picked |= (positions.source != positions.at) & (positions.at != NONE)
            changes: Booleans = picked.numpy()
            return changes

        plans.append(plan_patches(patches.rows(chunk), at, len(here), seq_len, limits))
    return joined(plans)
