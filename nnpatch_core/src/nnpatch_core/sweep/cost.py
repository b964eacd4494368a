"""The cost of a sweep in the cone engine, told from its prompts, before anything runs."""

from __future__ import annotations

import attrs
import numpy as np
import torch

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.engine import NEVER, Plan, joined, leftmost, plan_patches
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import Limits
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Cells, Patches


def plan_of(patches: Patches, limits: Limits, changed: Booleans) -> Plan:
    """The plan of a sweep in the cone engine.

    Args:
        patches: the cells.
        limits: the memory that the sweep may use.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Raises:
        MemoryBudgetError: a single run does not fit.
    """
    return joined(plans_of(patches, limits, changed))


def plans_of(patches: Patches, limits: Limits, changed: Booleans) -> list[Plan]:
    """The plan of each chunk of the prompts; arguments and errors are those of `plan_of`."""
    batch, seq_len = changed.shape
    plans = []
    for chunk in limits.chunks(batch):
        here, some = changed[chunk], patches.rows(chunk)
        plans.append(plan_patches(some, _Told(here), len(here), seq_len, limits))
    return plans


def shared_work(sweep: Sweep, changed: Booleans) -> tuple[Integers, Integers]:
    """The work of recording each chunk of the prompts, and of its patched runs, in token-layers.

    Args:
        sweep: what is patched.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Returns:
        `[chunks]` of both.
    """
    patches, limits = sweep.patches, sweep.limits
    sizes = np.array([chunk.stop - chunk.start for chunk in sweep.chunks])
    whole = sizes * sweep.seq_len * patches.n_layers
    # A source run and a target run; of an ablation it is one, or as many.
    recorded = 2 * whole
    try:
        plans = plans_of(patches, limits, changed)
    except MemoryBudgetError:
        # Too long to be run from the middle, so that each is a whole forward.
        return recorded, whole * len(patches.cells)
    return recorded, np.array([plan.token_layers for plan in plans])


@attrs.frozen(eq=False)
class _Told:
    """Where patching may change anything, by the prompts alone: `[batch, seq]`."""

    here: Booleans

    def starts(self, cells: Cells, first: int) -> Integers:
        """See `Changed.starts`."""
        known = np.full((len(cells.positions), len(self.here)), NEVER, dtype=np.int32)
        # Looked up by positions, of which there are far fewer than cells.
        for number in cells.used("positions"):
            at = cells.positions[number]
            known[number] = leftmost(at, _changes(at, self.here))
        return known[cells.sites.positions]


def _changes(positions: Positions, here: Booleans) -> Booleans:
    """`[batch, positions]`, where one may change something, of `[batch, seq]`."""
    picked = positions.picked(torch.from_numpy(here))
    if positions.source is not None:
        # Taken from elsewhere, it is another value, whatever the tokens are.
        picked |= (positions.source != positions.at) & (positions.at != NONE)
    changes: Booleans = picked.numpy()
    return changes
