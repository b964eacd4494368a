"""The engines, opened on some prompts: the target run is made, and what follows is planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnpatch_core._models import module_of
from nnpatch_core.adapters import n_layers
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone import ConeRun
from nnpatch_core.engine.full import FullRun
from nnpatch_core.engine.head import find_head
from nnpatch_core.engine.plan import Plan, make_plan
from nnpatch_core.engine.rows import Booleans, Place, Stop, rows_of, stops_of
from nnpatch_core.engine.target import record_target
from nnpatch_core.memory import Limits
from nnpatch_core.site import AnySite
from nnpatch_core.tracing import Replacement, forward


def open_full(
    nnmodel: Any, target: Batch, cells: Sequence[AnySite], replacement: Replacement
) -> FullRun:
    """Run `target` unpatched, so that cells can be patched into it one by one."""
    return FullRun(nnmodel, target, cells, replacement, forward(nnmodel, target))


def open_cone(
    nnmodel: Any,
    target: Batch,
    cells: Sequence[AnySite],
    replacement: Replacement,
    limits: Limits,
) -> ConeRun:
    """Record `target`, and plan how the cells are patched into it.

    Args:
        nnmodel: the model, wrapped by nnsight.
        target: the prompts that are patched.
        cells: what is patched, each alone.
        replacement: what is put there.
        limits: the memory that the sweep may use.

    Raises:
        EngineError: the model cannot be recorded.
        MemoryBudgetError: a single run does not fit.
    """
    model = module_of(nnmodel)
    sites = [site for cell in cells for site in cell.sites]
    layers = n_layers(sites[0].api, model)
    run = record_target(nnmodel, target, sites, replacement, layers, limits.store)
    stops = stops_of(cells, nnmodel, target.seq_len)
    plan = plan_cells(stops, run.changed, len(target), target.seq_len, layers, limits)
    return ConeRun(nnmodel, sites[0].api.layers, stops, replacement, run, plan, find_head(model))


def plan_cells(
    cells: Sequence[Sequence[Stop]],
    changed: Mapping[Place, Booleans],
    batch: int,
    seq_len: int,
    n_layers: int,
    limits: Limits,
) -> Plan:
    """Plan how cells are patched into prompts, given where a patch changes anything.

    Args:
        cells: the sites of each cell.
        changed: for each place `[batch, seq, heads or 1]`.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        n_layers: the model's layers.
        limits: the memory that the sweep may use.
    """
    return make_plan(
        rows_of(cells, batch, seq_len, changed),
        cells=len(cells),
        batch=batch,
        n_layers=n_layers,
        seq_len=seq_len,
        costs=limits.needs.costs,
        budget=limits.usable,
        recorded=batch * limits.recorded,
    )
