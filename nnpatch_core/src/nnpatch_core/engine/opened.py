"""The engines, opened on some prompts: the target run is made, and what follows is planned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnpatch_core._models import module_of
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone import ConeRun
from nnpatch_core.engine.full import FullRun
from nnpatch_core.engine.head import find_head
from nnpatch_core.engine.limits import Limits
from nnpatch_core.engine.plan import make_plan
from nnpatch_core.engine.replacements import Replacement
from nnpatch_core.engine.rows import rows_of, stops_of
from nnpatch_core.engine.target import record_target
from nnpatch_core.engine.trace import forward
from nnpatch_core.errors import EngineError, PatchingError
from nnpatch_core.layers import n_layers
from nnpatch_core.site import AnySite


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
    try:
        run = record_target(nnmodel, target, sites, replacement, layers, limits.store)
    except (PatchingError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EngineError(
            f"the model does not hand out keys and values: {type(error).__name__}: {error}"
        ) from error
    stops = stops_of(cells, nnmodel, target.seq_len)
    rows = rows_of(stops, len(target), target.seq_len, run.changed)
    plan = make_plan(
        rows,
        cells=len(cells),
        batch=len(target),
        n_layers=layers,
        seq_len=target.seq_len,
        costs=limits.needs.costs,
        budget=limits.budget,
        recorded=len(target) * limits.recorded,
    )
    return ConeRun(nnmodel, sites[0].api.layers, stops, replacement, run, plan, find_head(model))
