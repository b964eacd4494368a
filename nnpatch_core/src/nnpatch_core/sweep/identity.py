"""The identity of a sweep: a few short words for each part that its numbers depend on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from nnpatch_core._models import input_device
from nnpatch_core.adapters import Component, ModelAPI, head_columns, n_layers, table_of
from nnpatch_core.errors import AdapterError
from nnpatch_core.metrics import MetricContext, columns_given
from nnpatch_core.results import Baseline
from nnpatch_core.seq_pos import Positions
from nnpatch_core.spaces import Space
from nnpatch_core.sweep.checksum import digest, word
from nnpatch_core.sweep.fingerprint import fingerprint, settings
from nnpatch_core.sweep.labels import versions
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.spaces_told import space_word, spaces_told
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import forward_functions

#: Part of a sweep to words for it; equal words are equal sweeps.
Identity: TypeAlias = dict[str, str]
#: The part that names what could not be put into words.
UNTOLD = "not compared"


def identity(
    sweep: Sweep,
    runs: Runs,
    values: Values,
    engine: str,
    context: MetricContext,
    baseline: Mapping[str, Baseline],
) -> Identity:
    """The parts of a sweep: two sweeps with the same give the same numbers, to the last bit.

    Args:
        sweep: what is patched.
        runs: the prompts of each run.
        values: what is put at the sites.
        engine: the name of the engine.
        context: the answers.
        baseline: the metrics of the unpatched runs.
    """
    model = sweep.patches.model
    answers = [context.source_answer_index]
    if context.target_answer_index is not None:
        answers.append(context.target_answer_index)
    unpatched = [value for each in baseline.values() for value in (each.source, each.target)]
    untold: set[str] = set()
    adapters = {
        id(api): f"{api.name} {_table(api, model, untold)}" for api in sweep.patches.adapters
    }
    cells = [
        [name, cell.label, *(adapters[id(site.api)] for site in cell.sites)]
        for name, grid in sweep.layout.grids.items()
        for cell in grid.sites
    ]
    # The label of a site whose positions have a name tells no number.
    named = any(site.where is not None for cell in sweep.patches.cells for site in cell.named.sites)
    own = {
        at: number
        for number, at in enumerate(sweep.patches.positions)
        if named or len(at.at) > 1 or at.source is not None
    }
    code = [fingerprint(metric) for metric in sweep.metrics.values()]
    untold.update(*(each.untold for each in code))
    metrics = [[name, each.digest] for name, each in zip(sweep.metrics, code, strict=True)]
    hooks = [(words, fingerprint(function)) for words, function in forward_functions(model)]
    untold.update(*(each.untold for _, each in hooks))
    config = getattr(model, "config", None)
    device = input_device(model)
    prompts = {
        f"{name} prompts": digest(batch.tokens, batch.mask) for name, batch in runs.batches.items()
    }
    return {
        "kind": runs.kind,
        "model": f"{type(model).__name__} {sweep.options.call.weights(model)}",
        "config": _word(settings(config)),
        "attention": str(getattr(config, "_attn_implementation", None)),
        "device": "none" if device is None else device.type,
        **prompts,
        "answers": digest(*answers),
        **_told(runs),
        "sites": f"{len(cells)} {_word(cells)}",
        **({"positions": _positions(sweep, own)} if own else {}),
        **_spaces(sweep, untold),
        "adapter": ", ".join(sorted(set(adapters.values()))),
        "metric": f"{', '.join(sweep.metrics)} {_word(metrics)}",
        "hooks": _word([[words, each.digest] for words, each in hooks]) if hooks else "none",
        "unpatched runs": digest(*unpatched),
        "given all prompts": _together(sweep, context),
        "engine": engine,
        "prompts at once": str(sweep.limits.prompts),
        "memory_budget": sweep.limits.word,
        **{name: digest(value) for name, value in values.depends.items()},
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **versions(),
        **({UNTOLD: ", ".join(sorted(untold))} if untold else {}),
    }


def _spaces(sweep: Sweep, untold: set[str]) -> Identity:
    """The subspaces, and which site has which, if any has one."""
    told = spaces_told(sweep.patches)
    if told is None:
        return {}
    untold.update(told.untold)
    sites = [site for cell in sweep.patches.cells for site in cell.sites]
    which = [told.number.get(id(site.space)) for site in sites]
    return {"subspace": f"{', '.join(dict.fromkeys(told.words))} {_word([told.words, which])}"}


def _told(runs: Runs) -> Identity:
    """The data that metrics are given, and where they read logits, if there is any."""
    told = {}
    if runs.data:
        words = [f"{name} {digest(value)}" for name, value in sorted(runs.data.items())]
        told["metric_data"] = ", ".join(words)
    if runs.reading is not None:
        columns = sorted(runs.reading.columns.items())
        word_of = digest(runs.reading.source, runs.reading.target)
        sites = [
            [name, site.api.name, site.label, site.source_seq_pos, _part(site.subspace)]
            for name, each in sorted(runs.reading.sites.items())
            for site in each
        ]
        told["positions read"] = f"{word_of} {_word([columns, runs.reading.last, sites])}"
    return told


def _part(space: Space | None) -> str | None:
    return None if space is None else space_word(space).digest


def _positions(sweep: Sweep, own: Mapping[Positions, int]) -> str:
    """A word for positions that a cell's label does not tell, and for which site has which."""
    tensors = [each for at in own for each in (at.at, at.at if at.source is None else at.source)]
    sites = [site for cell in sweep.patches.cells for site in cell.sites]
    return f"{digest(*tensors)} {_word([own.get(site.positions) for site in sites])}"


def _together(sweep: Sweep, context: MetricContext) -> str:
    """Which metrics are, and of how many cells the logits wait for that: it decides on buckets."""
    if not sweep.waiting:
        return "no metric"
    columns = columns_given(sweep.waiting, context)
    logits = context.target_logits
    width = logits.shape[-1] if columns is None else len(columns)
    width *= logits[0, ..., 0].numel()
    cells = sweep.limits.cells(len(context.source_answer_index), width)
    return f"{', '.join(sweep.waiting)}, {cells} cells at once"


def _table(api: ModelAPI, model: nn.Module, untold: set[str]) -> str:
    """A word for an adapter as it is laid on a model."""
    tags = [getattr(api, tag, None) for tag in ("residual", "padding", "cone")]
    layers = [
        [
            [_heads(api, model, kind, layer) for kind in ("query", "key_value")],
            [
                [
                    *(name, each.module, each.side, each.item, each.heads),
                    _columns(api, model, layer, name, each, untold),
                ]
                for name, each in table_of(api, model, layer).items()
            ],
        ]
        for layer in range(n_layers(api, model))
    ]
    return _word([api.layers, tags, layers])


def _heads(api: ModelAPI, model: Any, kind: Any, layer: int) -> int | None:
    try:
        return api.n_heads(model.config, kind, layer)
    except AdapterError:
        return None


def _columns(
    api: ModelAPI, model: nn.Module, layer: int, name: str, component: Component, untold: set[str]
) -> str | None:
    """A word for the columns of a component's heads; None where they stand in order."""
    if component.heads is None or component.columns is None:
        return None
    module = model.get_submodule(f"{api.layers}.{layer}.{component.module}".rstrip("."))
    width = getattr(module, f"{'in' if component.side == 'input' else 'out'}_features", None)
    if isinstance(width, int):
        columns = head_columns(api, model, layer, name, width)
        return None if columns is None else digest(columns)
    code = fingerprint(component.columns)
    untold.update(code.untold)
    return code.digest


def _word(content: Any) -> str:
    return word(json.dumps(content, sort_keys=True, default=str).encode())
