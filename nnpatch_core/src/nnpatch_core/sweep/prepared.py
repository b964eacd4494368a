"""Everything that can be checked of a sweep before a forward runs."""

from __future__ import annotations

from typing import Any, TypeVar

import attrs

from nnpatch_core._models import module_of
from nnpatch_core.engine import beginning_for
from nnpatch_core.metrics import MetricSpec, name_metrics
from nnpatch_core.plugins import find_metric
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep.layout import lay_out
from nnpatch_core.sweep.lined_up import warn_of_columns
from nnpatch_core.sweep.runs import Runs
from nnpatch_core.sweep.sweep import Options, Sweep

_Runs = TypeVar("_Runs", bound=Runs)


def prepare(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    runs: _Runs,
    metric: MetricSpec,
    options: Options,
    *,
    gathers: bool = True,
    engine: str = "full",
) -> tuple[Sweep, _Runs]:
    """A sweep of the cells that some prompt has a token for, and its runs as metrics read them.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: an adapter, its name, or None to find it by the model.
        sites: what the user asks for.
        runs: the runs.
        metric: as the user names it.
        options: how the sweep may run.
        gathers: whether logits wait for those of a cell's other prompts, if a metric wants it.
        engine: that may run it, by name, or `"auto"`.

    Raises:
        PatchingError: one of its kinds, for whatever is wrong.

    Warns:
        AdapterWarning: the adapter does not claim the model's type.
        PromptWarning: a position means something else in each prompt.
    """
    prompts = PromptBatch(runs.target, None if runs.ablation else runs.source, runs.spans)
    layout = lay_out(nnmodel, api, sites, prompts)
    metrics = name_metrics(metric, find_metric)
    given, runs = runs, runs.read_by(metrics, module_of(nnmodel))
    layout = layout.repeated(len(runs.target) // len(prompts))
    padded = any(bool((batch.mask == 0).any()) for batch in runs.batches.values())
    trimmed = gathers and runs.trims
    sweep = Sweep.of(
        layout,
        runs.target,
        metrics,
        options,
        gathers=gathers,
        trimmed=trimmed,
        padded=padded,
        beginning=beginning_for(engine, layout.patches, [*runs.batches.values()])
        if trimmed
        else None,
    )
    runs.check(sweep)
    patches = runs.aligned(layout.patches)
    if patches is not layout.patches:
        sweep = attrs.evolve(sweep, layout=attrs.evolve(layout, patches=patches))
    warn_of_columns(sites, prompts, runs.prompts.strings, given.source)
    return sweep.where_present(runs.mask_of(sweep.patches)), runs
