"""The cost of a sweep in the cone engine, told from its prompts, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from nnpatch_core._arrays import Booleans
from nnpatch_core.engine import Plan, joined, plan_patches
from nnpatch_core.memory import Limits
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.tracing import BoundSite, Patches

Known: TypeAlias = Mapping[Positions, Booleans]


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
        here, some = changed[chunk], patches.rows(chunk)
        # Looked up by positions, of which there are far fewer than cells.
        known = {each: _changes(each, here) for each in some.positions}

        def at(_: int, site: BoundSite, known: Known = known) -> Booleans:
            return known[site.positions]

        plans.append(plan_patches(some, at, len(here), seq_len, limits))
    return joined(plans)


def _changes(positions: Positions, here: Booleans) -> Booleans:
    """`[batch, positions]`, where one may change something, of `[batch, seq]`."""
    picked = positions.picked(torch.from_numpy(here))
    if positions.source is not None:
        # Taken from elsewhere, it is another value, whatever the tokens are.
        picked |= (positions.source != positions.at) & (positions.at != NONE)
    changes: Booleans = picked.numpy()
    return changes
