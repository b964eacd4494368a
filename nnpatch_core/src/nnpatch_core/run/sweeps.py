"""The kinds of analysis: what is swept, and the call of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from nnpatch_core.adapters import component_names
from nnpatch_core.circuits import find_circuit
from nnpatch_core.edges import likely_nodes
from nnpatch_core.errors import SettingsError
from nnpatch_core.metrics import name_metrics
from nnpatch_core.patching import (
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    path_patching,
)
from nnpatch_core.plugins import find_metric
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.run.numbers import read_numbers
from nnpatch_core.run.settings import SITES, Settings, draws
from nnpatch_core.sites import Sites, SweepSites, Together
from nnpatch_core.spaces import Subspace
from nnpatch_core.subspace import sweep_subspaces
from nnpatch_core.sweep import ShareFile

#: What is swept where nobody says: blocks at each position, heads at the last.
_BLOCKS, _HEADS = ("resid", "attn", "mlp"), ("o",)


@attrs.frozen(eq=False)
class Asked:
    """All that the call of an analysis takes.

    Args:
        settings: of the run.
        nnmodel: the model.
        api: its adapter.
        pairs: the prompts.
        reference: the tokens and the mask of a data set, if there is one.
        checkpoint: where a sweep is kept that is under way.
        progress: whether a bar shows it.
    """

    settings: Settings
    nnmodel: Any
    api: Any
    pairs: PromptPairs
    reference: Any
    checkpoint: Path | ShareFile
    progress: bool

    @property
    def over_sites(self) -> tuple[Any, Any, SweepSites, PromptPairs]:
        """The first arguments of a sweep over sites."""
        return self.nnmodel, self.api, sites_of(self.settings, self.api), self.pairs

    def given(self, *names: str, **renamed: str) -> dict[str, Any]:
        """The settings that were given, as arguments of a call; others keep its own defaults."""
        arguments = {name: name for name in names} | renamed
        values = {name: getattr(self.settings, key) for name, key in arguments.items()}
        given = {name: value for name, value in values.items() if value is not None}
        if self.settings.metrics:
            given["metric"] = list(self.settings.metrics)
        if self.reference is not None:
            given["reference"] = self.reference
        return {**given, "progress": self.progress}


def run_sweep(asked: Asked) -> Any:
    """Run the analysis that the settings name.

    Raises:
        PatchingError: one of its kinds, as the analysis raises it.
    """
    return _CALLS[asked.settings.method](asked)


def name_checks(settings: Settings, model: Any, api: Any) -> Iterator[Callable[[], object]]:
    """Checks before any weights are there: each raises for a metric or a node that there is not.

    Args:
        settings: of the run.
        model: the model, perhaps without weights.
        api: its adapter.
    """
    for metric in settings.metrics:
        yield partial(name_metrics, [metric], find_metric)
    if settings.metrics:
        yield partial(name_metrics, list(settings.metrics), find_metric)
    if settings.method == "edges":
        nodes = likely_nodes(api, model)
        yield from (partial(nodes.sender, name) for name in settings.senders)
        yield from (partial(nodes.receiver, name) for name in settings.receivers)


def sites_of(settings: Settings, api: Any) -> SweepSites:
    """The sites that settings ask for.

    Args:
        settings: of the run.
        api: the adapter of the model.

    Raises:
        PatchingError: one of its kinds, for names and numbers that there are not.
    """
    assert settings.method in SITES
    layers, heads = (read_numbers(each, getattr(settings, each)) for each in ("layers", "heads"))
    if settings.sites:
        positions = settings.positions or ("last" if settings.method == "subspace" else "each")
        return _grid(settings, list(settings.sites), layers, positions, heads)
    if settings.subspace is not None:
        raise SettingsError("subspace: say of which sites, with --sites")
    for name in ("heads", "positions"):
        if getattr(settings, name):
            raise SettingsError(f"{name}: say of which sites, with --sites")
    if settings.method == "subspace":
        return Sites("resid", layers, "last")
    known = component_names(api)
    parts: list[SweepSites] = []
    for names, positions in ((_BLOCKS, "each"), (_HEADS, "last")):
        there = [name for name in names if name in known]
        parts += [Sites(there, layers, positions)] if there else []
    return Together(tuple(parts))


def _grid(
    settings: Settings,
    names: list[str],
    layers: list[int] | None,
    positions: str,
    heads: list[int] | None,
) -> Sites:
    """A grid of sites of some names, perhaps limited to subspaces."""
    at = _at(settings, positions)
    source = read_numbers("source_at", settings.source_at)
    spaces = None if settings.subspace is None else read_spaces(settings.subspace)
    return Sites(names, layers, positions, at, heads, source_seq_pos=source, subspace=spaces)


def read_spaces(name: str) -> Subspace | dict[int, Subspace]:
    """The subspace of a folder or a repository; by layer, where that is known.

    Raises:
        SubspaceError: it is none.
        SettingsError: a run found several in one layer.
    """
    folders = sorted(Path(name).glob("subspace-*"), key=lambda each: (len(each.name), each.name))
    sources: list[Path | str] = [*folders] or [name]
    found = [Subspace.from_pretrained(each) for each in sources]
    if len(found) == 1 and found[0].site is None:
        return found[0]
    spaces: dict[int, Subspace] = {}
    for folder, each in zip(sources, found, strict=True):
        if each.site is None or each.site.layer in spaces:
            told = "tells no layer" if each.site is None else f"is a second one at {each.site}"
            raise SettingsError(f"subspace: {folder} {told}: name one of the folders in {name}")
        spaces[each.site.layer] = each
    return spaces


def _at(settings: Settings, positions: str) -> Any:
    """The argument of a strategy: a number, numbers, or names; all spans where none is named."""
    if positions == "spans":
        named = [part.partition("=")[0] for part in settings.spans]
        return list(settings.at) or named or None
    if not settings.at:
        return None
    numbers = read_numbers("at", settings.at)
    assert numbers is not None
    return numbers[0] if positions == "lastk" and len(numbers) == 1 else numbers


def _activation(asked: Asked) -> Any:
    return activation_patching(
        *asked.over_sites,
        force_model_confidence=asked.settings.confident,
        checkpoint=asked.checkpoint,
        **asked.given(
            "engine",
            "batch_size",
            "memory_budget",
            "screen",
            "top_k",
            "spot_checks",
            "keep",
            **_seed(asked),
        ),
    )


def _seed(asked: Asked) -> Mapping[str, str]:
    """A call refuses a seed where nothing is drawn."""
    return {"seed": "seed"} if draws(asked.settings) else {}


def _attribution(asked: Asked) -> Any:
    return attribution_patching(
        *asked.over_sites,
        force_model_confidence=asked.settings.confident,
        per_position=asked.settings.per_position,
        checkpoint=asked.checkpoint,
        **asked.given(
            "batch_size", "memory_budget", "steps", "ablation", "qk_fix", "grad_drop", "keep"
        ),
    )


def _ablation(asked: Asked) -> Any:
    return ablation_patching(
        *asked.over_sites,
        checkpoint=asked.checkpoint,
        per_position=asked.settings.per_position,
        **asked.given(
            "engine", "batch_size", "memory_budget", "keep", method="ablation", **_seed(asked)
        ),
    )


def _path(asked: Asked) -> Any:
    settings = asked.settings
    return path_patching(
        asked.nnmodel,
        asked.api,
        list(settings.senders) or None,
        list(settings.receivers) or None,
        asked.pairs,
        path=list(settings.path) or None,
        force_model_confidence=settings.confident,
        checkpoint=asked.checkpoint,
        **asked.given("engine", "batch_size", "memory_budget", "through", "keep"),
    )


def _edges(asked: Asked) -> Any:
    settings = asked.settings
    at = {} if settings.positions is None else {"seq_pos": _at(settings, settings.positions)}
    return edge_patching(
        asked.nnmodel,
        asked.api,
        asked.pairs,
        senders=list(settings.senders) or None,
        receivers=list(settings.receivers) or None,
        force_model_confidence=settings.confident,
        per_position=settings.per_position,
        checkpoint=asked.checkpoint,
        **at,
        **asked.given(
            "engine",
            "batch_size",
            "memory_budget",
            "ablation",
            "top_k",
            "spot_checks",
            "steps",
            method="estimate",
            seq_pos_type="positions",
            **_seed(asked),
        ),
    )


def _circuit(asked: Asked) -> Any:
    return find_circuit(
        asked.nnmodel,
        asked.api,
        asked.pairs,
        per_position=asked.settings.per_position,
        **asked.given(
            "faithfulness",
            "top_k",
            "evaluations",
            "prune",
            "threshold",
            "steps",
            "ablation",
            "batch_size",
            "memory_budget",
            "seed",
            method="estimate",
        ),
    )


def _subspace(asked: Asked) -> Any:
    return sweep_subspaces(
        *asked.over_sites,
        asked.settings.rank,
        checkpoint=asked.checkpoint,
        **asked.given(
            "epochs",
            "held_out",
            "batch_size",
            "lr",
            "weight_decay",
            "warmup",
            "kl",
            "patience",
            "random_labels",
            "random_model",
            "engine",
            "memory_budget",
            "seed",
        ),
    )


_CALLS: Mapping[str, Callable[[Asked], Any]] = {
    "activation": _activation,
    "attribution": _attribution,
    "ablation": _ablation,
    "path": _path,
    "edges": _edges,
    "circuit": _circuit,
    "subspace": _subspace,
}
