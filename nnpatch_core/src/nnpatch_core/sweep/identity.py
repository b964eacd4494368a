"""The identity of a sweep: a few short words for each part that its numbers depend on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nnpatch_core._arrays import Integers
from nnpatch_core._models import Elsewhere
from nnpatch_core._printable import told_as_is
from nnpatch_core.adapters import Component, ModelAPI, head_columns, n_layers, table_of
from nnpatch_core.errors import AdapterError
from nnpatch_core.memory import placement_of
from nnpatch_core.metrics import MetricContext, columns_given
from nnpatch_core.results import Baseline
from nnpatch_core.seq_pos import Positions
from nnpatch_core.site import MultiSite, Site
from nnpatch_core.sites import GridSites
from nnpatch_core.spaces import Space
from nnpatch_core.sweep.checksum import digest, word
from nnpatch_core.sweep.fingerprint import fingerprint, settings
from nnpatch_core.sweep.labels import versions
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.spaces_told import space_word, spaces_told
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import backward_functions, forward_functions

#: Part of a sweep to words for it; equal words are equal sweeps.
Identity: TypeAlias = dict[str, str]
#: How long a setting may be to be told as it is.
_LONGEST = 60
#: The part that names what could not be put into words.
UNTOLD = "not compared"


def identity(
    sweep: Sweep,
    runs: Runs,
    values: Values,
    kind: str,
    engine: str,
    cut: Mapping[str, str],
    context: MetricContext,
    baseline: Mapping[str, Baseline],
) -> Identity:
    """The parts of a sweep: two sweeps with the same give the same numbers, to the last bit.

    Args:
        sweep: what is patched.
        runs: the prompts of each run.
        values: what is put at the sites.
        kind: how an outcome calls the sweep.
        engine: the name of the engine.
        cut: how much runs together, by names that people know.
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
    code = [fingerprint(metric) for metric in sweep.metrics.values()]
    untold.update(*(each.untold for each in code))
    metrics = [[name, each.digest] for name, each in zip(sweep.metrics, code, strict=True)]
    if isinstance(sweep.nnmodel, Elsewhere) and sweep.nnmodel.away:
        untold.add(f"the weights and the releases of {sweep.nnmodel.where}")
    prompts = {
        f"{name} prompts": digest(batch.tokens, batch.mask) for name, batch in runs.batches.items()
    }
    return {
        "kind": kind,
        "model": f"{type(model).__name__} {_weights(sweep, model)}",
        **around(model, untold, gradients=engine == "gradient"),
        **_where(sweep, model),
        **prompts,
        "answers": digest(*answers),
        **_told(runs),
        "sites": _sites(sweep, adapters),
        **_positions(sweep),
        **_spaces(sweep, untold),
        "adapter": ", ".join(sorted(set(adapters.values()))),
        "metric": f"{', '.join(sweep.metrics)} {_word(metrics)}",
        "unpatched runs": digest(*unpatched),
        "engine": engine,
        **cut,
        "memory_budget": sweep.limits.word,
        **{name: digest(value) for name, value in values.depends.items()},
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **versions(),
        **({UNTOLD: ", ".join(sorted(untold))} if untold else {}),
    }


def differences(before: Mapping[str, Any], now: Identity) -> str:
    """Tell the parts that differ; "" if none does.

    Args:
        before: the parts that a file has.
        now: those of the call.
    """
    return "; ".join(
        f"{told_as_is(name)}: {_said(before.get(name))} then, {_said(now.get(name))} now"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name)
    )


def _said(value: Any) -> str:
    """Words of a part, which is no part of the other where it is None."""
    return told_as_is("none" if value is None else str(value))


def around(model: nn.Module, untold: set[str], *, gradients: bool) -> Identity:
    """The settings and hooks by which a model computes, besides its weights.

    Args:
        model: the model.
        untold: is given what they depend on and was not looked into.
        gradients: whether gradients are computed too.
    """
    config = getattr(model, "config", None)
    functions = [*forward_functions(model), *(backward_functions(model) if gradients else ())]
    hooks = [(words, fingerprint(function)) for words, function in functions]
    untold.update(*(each.untold for _, each in hooks))
    return {
        # Each alone, so that a difference can be told.
        **{f"config.{name}": _short(value) for name, value in (settings(config) or {}).items()},
        "attention": str(getattr(config, "_attn_implementation", None)),
        "hooks": _word([[words, each.digest] for words, each in hooks]) if hooks else "none",
    }


def _weights(sweep: Sweep, model: nn.Module) -> str:
    """A word for the weights, or, where they are not here, the name by which they are asked for."""
    there = sweep.nnmodel
    if isinstance(there, Elsewhere) and there.away:
        return there.key
    return sweep.options.call.weights(model)


def _where(sweep: Sweep, model: nn.Module) -> Identity:
    """Where the model runs."""
    there = sweep.nnmodel
    if isinstance(there, Elsewhere) and there.away:
        return {"remote": there.where}
    return {"device": placement_of(model, sweep.patches.layers).kinds}


def _spaces(sweep: Sweep, untold: set[str]) -> Identity:
    """The subspaces, and which site has which, if any has one."""
    told = spaces_told(sweep.patches)
    if told is None:
        return {}
    untold.update(told.untold)
    cells = sweep.patches.cells
    number = np.array([told.number.get(id(space), -1) for space in cells.spaces])
    which = digest(torch.from_numpy(number[cells.sites.space]))
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


def _sites(sweep: Sweep, adapters: Mapping[int, str]) -> str:
    """A word for the cells, by arrays: a million of them have no label each."""
    cells, grids = sweep.patches.cells, sweep.layout.grids
    sites = cells.sites
    places = {
        number: _word([each.layer, each.name, each.location, adapters[id(each.api)]])
        for number in cells.used("place")
        for each in [cells.places[number]]
    }
    # Those that are each prompt's own are told apart by a word of their own, too.
    at = {number: digest(*_tensors(cells.positions[number])) for number in cells.used("positions")}
    numbers = (cells.ends, sites.head, _met(sites.place, places), _met(sites.positions, at))
    # What is more than its sites, as an edge is, is told by its label.
    labels = [
        cell.label
        for grid in grids.values()
        if not isinstance(grid.sites, GridSites)
        for cell in grid.sites
        if not isinstance(cell, Site | MultiSite)
    ]
    names = [[name, len(grid.sites)] for name, grid in grids.items()]
    words = [dict.fromkeys(each.values()) for each in (places, at)]
    content = [names, labels, *map(list, words), digest(*map(torch.from_numpy, numbers))]
    return f"{len(cells)} {_word(content)}"


def _positions(sweep: Sweep) -> Identity:
    """The positions that have a name, are each prompt's own, or have sources elsewhere, if any."""
    cells, named = sweep.patches.cells, _are_named(sweep)
    every = [cells.positions[number] for number in cells.used("positions")]
    own = [at for at in every if named or len(at.at) > 1 or at.source is not None]
    if not own:
        return {}
    return {"positions": f"{len(own)} {digest(*(each for at in own for each in _tensors(at)))}"}


def _are_named(sweep: Sweep) -> bool:
    """Whether some site's positions have a name, which tells no number."""
    return any(
        site.where is not None
        for grid in sweep.layout.grids.values()
        # Those of a grid all have one, or none has.
        for cell in (grid.sites[:1] if isinstance(grid.sites, GridSites) else grid.sites)
        for site in cell.sites
    )


def _tensors(at: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """All that positions are."""
    return at.at, at.at if at.source is None else at.source, at.numbered


def _met(numbers: Integers, words: Mapping[int, str]) -> Integers:
    """Numbers by the order in which their words are met, whatever else was numbered."""
    order = {word: number for number, word in enumerate(dict.fromkeys(words.values()))}
    known = np.zeros(max(words, default=0) + 1, dtype=np.int64)
    known[[*words]] = [order[word] for word in words.values()]
    found: Integers = known[numbers]
    return found


def cut_of(sweep: Sweep, context: MetricContext) -> dict[str, str]:
    """How prompts and cells of a sweep are cut that is measured; see `identity`."""
    return {
        "given all prompts": _together(sweep, context),
        "prompts at once": str(sweep.limits.prompts),
    }


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


def _short(value: Any) -> str:
    """A setting as it reads, if that is short, or a word for it."""
    text = json.dumps(value, sort_keys=True, default=str)
    return text if len(text) <= _LONGEST else word(text.encode())


def _word(content: Any) -> str:
    return word(json.dumps(content, sort_keys=True, default=str).encode())
