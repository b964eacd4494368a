"""A grid of sites: what a sweep patches, one cell at a time, and where the results go."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import nn

from nnpatch_core._arguments import listed
from nnpatch_core._integers import strict_ints
from nnpatch_core._models import module_of
from nnpatch_core._printable import shown
from nnpatch_core.adapters import (
    ModelAPI,
    check_head,
    check_layer,
    component_of,
    find_component,
    layers_with,
    n_heads,
    n_layers,
    place_of,
)
from nnpatch_core.batch import GivenTokens, check_tokens, pack_left, unpack
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import (
    HeadError,
    LayerError,
    PatchingError,
    PositionError,
    SubspaceError,
    UnknownNameError,
)
from nnpatch_core.names import ComponentName, SeqPosName
from nnpatch_core.plugins import find_adapter, find_seq_pos
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import Expansion, PlacedSeqPos, PromptBatch, SeqPos, expansion_of
from nnpatch_core.site import AnySite, MultiSite, Site, check_site
from nnpatch_core.spaces import Space, by_layer
from nnpatch_core.tracing import check_space

_HEAD_AXES = {"query": "head", "key_value": "kv_head"}


@attrs.frozen
class Axis:
    """One axis of a result: its name and the label of each place on it."""

    name: str
    labels: tuple[int | str, ...]


@attrs.frozen(eq=False)
class Grid:
    """The cells of one site name: each a site, and its place in the result.

    Args:
        axes: the result's axes.
        index: for each cell its place, one number per axis; no two cells share a place.
        sites: for each cell what is patched.
    """

    axes: tuple[Axis, ...]
    index: tuple[tuple[int, ...], ...]
    sites: tuple[AnySite, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(len(axis.labels) for axis in self.axes)


class SweepSites(Protocol):
    """The sites of a sweep: `Sites`, or a list of the user's own by `Sites.from_sites`."""

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """Site name to its cells, for prompts of `seq_len` tokens; perhaps for these prompts."""
        ...


@attrs.frozen(init=False)
class Sites:
    """A grid of sites: components x layers x positions x heads, each cell patched alone.

    Args:
        site_names: component names, or one; `COMPONENT_NAMES` lists them, `SYNONYMS` their other
            names. The outcome has the names that are given here.
        layers: which layers; None is all.
        seq_pos_type: which positions, patched together or one by one: `None` (all at once),
            `"each"`, `"last"`, `"lastk"`, `"custom"`, `"custom_constant"`, the name of a plugin's
            strategy, or a strategy object; `"spans"` goes by names.
        seq_pos: what the named strategy takes: a number for `"lastk"`; positions for `"custom"`
            and `"custom_constant"`, `[k]` for all prompts or `[batch, k]`, those of each (a list,
            an array or a tensor); names for `"spans"`.
        heads: of components with heads, which ones; None is each of them.
        source_seq_pos: for `"custom"` and `"custom_constant"`, of the shape of `seq_pos`: where the
            source run's values for these positions are taken. None is the same positions.
        subspace: the part of each activation that is patched: a `Subspace` (of one head's, where
            the components have heads), an object with `encode` and `decode`, or a mapping from
            layers to those; None is all of it. Of a mapping, the layers are its own.

    Raises:
        UnknownNameError: no component named, one named twice, or an unknown strategy.
        LayerError, HeadError, PositionError: malformed numbers; `seq_pos` missing or not wanted.
        SubspaceError: `subspace` is none, or lacks a layer that is asked for.

    Examples:
        >>> Sites(["resid", "o"], layers=[1, 2], seq_pos_type="lastk", seq_pos=3).strategy
        LastK(k=3)
    """

    site_names: tuple[str, ...]
    layers: tuple[int, ...] | None
    strategy: SeqPos | PlacedSeqPos
    heads: tuple[int, ...] | None
    subspace: Space | Mapping[int, Space] | None = attrs.field(hash=False)

    def __init__(
        self,
        site_names: ComponentName | str | Sequence[ComponentName | str],
        layers: Sequence[int] | None = None,
        seq_pos_type: SeqPosName | str | SeqPos | PlacedSeqPos | None = None,
        seq_pos: Any = None,
        heads: Sequence[int] | None = None,
        *,
        source_seq_pos: Any = None,
        subspace: Any = None,
    ) -> None:
        spaces, wanted = by_layer(subspace), _ascending(layers, "layers", LayerError)
        self.__attrs_init__(
            site_names=_component_names(site_names),
            layers=_layers_of(spaces, wanted),
            strategy=strategy_of(seq_pos_type, seq_pos, source_seq_pos),
            heads=_ascending(heads, "heads", HeadError),
            subspace=spaces,
        )

    @staticmethod
    def from_sites(sites: Iterable[AnySite]) -> SiteList:
        """The user's own list of `Site` and `MultiSite` objects, each patched alone.

        The outcome has one axis, `site`, for each name, in the order of the list.
        """
        return SiteList(sites)

    def get_sites_dict(
        self, nnmodel: Any, api: Any, tokens: GivenTokens | PromptPairs
    ) -> dict[str, list[Site]]:
        """Site name to the list of its sites, for prompts of the width of `tokens`.

        Args:
            nnmodel: the model, as for `activation_patching`.
            api: an adapter, its name, or None to find it by the model.
            tokens: `[batch, seq]`, a tokenizer's output, or a `PromptPairs`.
        """
        prompts = _prompts(tokens)
        grids = self.grids(nnmodel, api, prompts.seq_len, prompts)
        return {
            name: [site for cell in grid.sites for site in cell.sites]
            for name, grid in grids.items()
        }

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """Site name to its cells, for prompts of `seq_len` tokens.

        Raises:
            PatchingError: a component, layer, head or position that is not there, or a strategy
                that needs the prompts, and there are none.
        """
        model = module_of(nnmodel)
        adapter = find_adapter(api, model)
        for layer in self.layers or ():
            check_layer(layer, n_layers(adapter, model))
        components = {name: find_component(adapter, name) for name in self.site_names}
        if self.heads is not None and not any(each.heads for each in components.values()):
            raise HeadError(
                f"heads={list(self.heads)} was given, but "
                f"{', '.join(map(repr, components))} "
                f"{'have' if len(components) > 1 else 'has'} no heads"
            )
        expansion = expansion_of(self.strategy, seq_len, prompts)
        return {name: self._grid(adapter, name, expansion, model) for name in components}

    def _grid(self, api: ModelAPI, name: str, expansion: Expansion, model: nn.Module) -> Grid:
        axes = [Axis("layer", tuple(range(n_layers(api, model))))]
        if expansion.axis is not None:
            axes.append(Axis(expansion.axis, expansion.labels))
        kind = find_component(api, name).heads
        if kind is not None:
            axes.append(Axis(_HEAD_AXES[kind], tuple(range(n_heads(api, model, name)))))
        index, sites, component = [], [], canonical_name(name)
        having = layers_with(api, model, name)
        if not having:
            raise LayerError(f"no layer of this model has {name!r}")
        for layer in having if self.layers is None else self.layers:
            heads = self._heads(api, model, layer, name)
            space = (
                self.subspace.get(layer) if isinstance(self.subspace, Mapping) else self.subspace
            )
            if space is not None:
                check_space(space, place_of(api, model, layer, component), heads[0])
            for cell in expansion.cells:
                place = [] if cell.label is None else [cell.label]
                for head in heads:
                    index.append((layer, *place, *([] if head is None else [head])))
                    sites.append(
                        Site(
                            api,
                            component,
                            layer,
                            head,
                            cell.seq_pos,
                            source_seq_pos=cell.source,
                            subspace=space,
                            asked=name,
                            where=cell.name,
                        )
                    )
        return Grid(tuple(axes), tuple(index), tuple(sites))

    def _heads(
        self, api: ModelAPI, model: nn.Module, layer: int, name: str
    ) -> Sequence[int | None]:
        """The heads to patch in a layer; one None for a component without heads."""
        component = component_of(api, model, layer, name)
        if component.heads is None:
            return [None]
        count = api.n_heads(model.config, component.heads, layer)
        wanted = range(count) if self.heads is None else self.heads
        return [check_head(head, name, component, count) for head in wanted]


def _prompts(tokens: GivenTokens | PromptPairs) -> PromptBatch:
    """The prompts; `TokensError` where they are none."""
    if isinstance(tokens, PromptPairs):
        return tokens.batch
    ids, mask = unpack("tokens", tokens)
    check_tokens("tokens", ids)
    mask = torch.ones_like(ids, dtype=torch.int64) if mask is None else mask
    return PromptBatch(pack_left(ids, mask))


def _site_list(sites: Any) -> tuple[AnySite, ...]:
    given = listed(sites)
    if given is None:
        raise PatchingError(f"from_sites takes a list of sites, got {shown(sites)}")
    if not given:
        raise PatchingError("the list of sites is empty; give at least one")
    for site in given:
        if not isinstance(site, Site | MultiSite):
            raise PatchingError(f"from_sites takes Site and MultiSite objects, got {shown(site)}")
    return given


@attrs.frozen
class SiteList:
    """The user's own sites, each patched alone; made by `Sites.from_sites`."""

    sites: tuple[AnySite, ...] = attrs.field(converter=_site_list)

    def get_sites_dict(
        self, nnmodel: Any, api: Any, tokens: GivenTokens | PromptPairs
    ) -> dict[str, list[AnySite]]:
        """Site name to the list of its sites, in the order of the list."""
        prompts = _prompts(tokens)
        grids = self.grids(nnmodel, api, prompts.seq_len, prompts)
        return {name: list(grid.sites) for name, grid in grids.items()}

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """Site name to its cells; each site keeps the adapter that it was made with.

        Raises:
            PatchingError: a component, layer, head or position that is not there.
        """
        model = module_of(nnmodel)
        if api is not None:
            find_adapter(api)
        by_name: dict[str, list[AnySite]] = {}
        for cell in self.sites:
            for site in cell.sites:
                check_site(site, model, seq_len)
            by_name.setdefault(cell.name, []).append(cell)
        return {
            name: Grid(
                (Axis("site", _labels(cells)),),
                tuple((index,) for index in range(len(cells))),
                tuple(cells),
            )
            for name, cells in by_name.items()
        }


@attrs.frozen
class Together:
    """Several grids of sites in one sweep, of different names."""

    parts: tuple[SweepSites, ...]

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """See `SweepSites.grids`."""
        found: dict[str, Grid] = {}
        for part in self.parts:
            found |= part.grids(nnmodel, api, seq_len, prompts)
        return found


def _labels(cells: Sequence[AnySite]) -> tuple[str, ...]:
    """The label of each cell; with a number where nothing but its subspaces part it from others."""
    spaces: dict[str, dict[tuple[int, ...], int]] = {}
    numbers = []
    for cell in cells:
        own = spaces.setdefault(cell.label, {})
        numbers.append(own.setdefault(tuple(id(site.subspace) for site in cell.sites), len(own)))
    pairs = zip(cells, numbers, strict=True)
    return tuple(
        cell.label if len(spaces[cell.label]) == 1 else f"{cell.label} #{number + 1}"
        for cell, number in pairs
    )


def _ascending(
    numbers: Sequence[int] | None, what: str, error: type[PatchingError]
) -> tuple[int, ...] | None:
    """In execution order, whatever order they were named in."""
    return None if numbers is None else tuple(sorted(strict_ints(numbers, what, error)))


def _layers_of(spaces: Any, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The layers that are swept: those that have a space of their own, where each has one."""
    if not isinstance(spaces, Mapping):
        return layers
    lacking = sorted(set(layers or ()) - set(spaces))
    if lacking:
        raise SubspaceError(
            f"subspace= has none for layers {lacking}; it has those of layers {sorted(spaces)}"
        )
    return tuple(sorted(spaces)) if layers is None else layers


def _component_names(names: Any) -> tuple[str, ...]:
    given = (names,) if isinstance(names, str) else listed(names)
    if given is None:
        raise UnknownNameError(f"site_names must be component names, got {shown(names)}")
    if not given:
        raise UnknownNameError("site_names is empty; name at least one component")
    for name in given:
        if not isinstance(name, str):
            raise UnknownNameError(f"a component is named by a string, got {shown(name)}")
    canonical = [canonical_name(name) for name in given]
    for name in canonical:
        if canonical.count(name) > 1:
            raise UnknownNameError(f"site_names names {name!r} more than once: {list(given)}")
    return given


def strategy_of(seq_pos_type: Any, seq_pos: Any, source: Any = None) -> SeqPos | PlacedSeqPos:
    """The strategy that the arguments of `Sites` stand for.

    Raises:
        UnknownNameError: `seq_pos_type` is none.
        PositionError: the others do not go with it.
    """
    if isinstance(seq_pos_type, str) or seq_pos_type is None:
        return make_strategy("all" if seq_pos_type is None else seq_pos_type, seq_pos, source)
    if isinstance(seq_pos_type, type) or not isinstance(seq_pos_type, SeqPos | PlacedSeqPos):
        raise UnknownNameError(
            f"seq_pos_type must be a strategy, the name of one or None, got {shown(seq_pos_type)}"
        )
    for name, value in (("seq_pos", seq_pos), ("source_seq_pos", source)):
        if value is not None:
            raise PositionError(
                f"{name}={shown(value)} means nothing beside the strategy object "
                f"{shown(seq_pos_type)}"
            )
    return seq_pos_type


def make_strategy(name: str, seq_pos: Any = None, source: Any = None) -> SeqPos | PlacedSeqPos:
    """The strategy that `seq_pos_type=name, seq_pos=seq_pos, source_seq_pos=source` stands for.

    Raises:
        UnknownNameError: no such strategy.
        PositionError: an argument is missing, malformed, or given where it means nothing.
    """
    factory = find_seq_pos(name)
    parameters = inspect.signature(factory).parameters
    named = "None" if name == "all" else repr(name)
    if seq_pos is None and any(each.default is each.empty for each in parameters.values()):
        raise PositionError(f"seq_pos_type={named} needs seq_pos=")
    if seq_pos is not None and not parameters:
        raise PositionError(f"seq_pos={shown(seq_pos)} means nothing with seq_pos_type={named}")
    given = [] if seq_pos is None else [seq_pos]
    if source is not None:
        if "source" not in parameters:
            raise PositionError(
                f"source_seq_pos={shown(source)} means nothing with seq_pos_type={named}: it goes "
                "with 'custom' and 'custom_constant'"
            )
        given.append(source)
    strategy = factory(*given)
    if not isinstance(strategy, SeqPos | PlacedSeqPos):
        raise PositionError(f"seq_pos_type={named} stands for {strategy!r}, which is no strategy")
    return strategy
