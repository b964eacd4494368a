"""A grid of sites by components, layers, positions and heads: `Sites`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from torch import nn

from nnpatch_core._arrays import Integers
from nnpatch_core._models import module_of
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
from nnpatch_core.batch import GivenTokens
from nnpatch_core.components import canonical_name
from nnpatch_core.errors import HeadError, LayerError
from nnpatch_core.names import ComponentName, SeqPosName
from nnpatch_core.plugins import find_adapter
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import Expansion, PlacedSeqPos, PromptBatch, SeqPos, expansion_of
from nnpatch_core.site import AnySite, Site
from nnpatch_core.sites.arguments import ascending, layers_of, named_components, strategy_of
from nnpatch_core.sites.grid import Axis, Grid, GridSites
from nnpatch_core.sites.listed import SiteList, prompts_of
from nnpatch_core.spaces import Space, by_layer
from nnpatch_core.tracing import check_space

_HEAD_AXES = {"query": "head", "key_value": "kv_head"}


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
        spaces, wanted = by_layer(subspace), ascending(layers, "layers", LayerError)
        self.__attrs_init__(
            site_names=named_components(site_names),
            layers=layers_of(spaces, wanted),
            strategy=strategy_of(seq_pos_type, seq_pos, source_seq_pos),
            heads=ascending(heads, "heads", HeadError),
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
        prompts = prompts_of(tokens)
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
        having = layers_with(api, model, name)
        if not having:
            raise LayerError(f"no layer of this model has {name!r}")
        component, spaces = canonical_name(name), {}
        columns: list[Integers] = []
        for layer in having if self.layers is None else self.layers:
            heads = self._heads(api, model, layer, name)
            space = (
                self.subspace.get(layer) if isinstance(self.subspace, Mapping) else self.subspace
            )
            if space is not None:
                check_space(space, place_of(api, model, layer, component), heads[0])
                spaces[layer] = space
            numbers = np.array([-1 if head is None else head for head in heads])
            places = np.arange(len(expansion.cells))
            at, head = (each.flatten() for each in np.meshgrid(places, numbers, indexing="ij"))
            columns.append(np.stack([np.full_like(at, layer), head, at]).astype(np.int32))
        layer, head, at = np.concatenate(columns, 1)
        sites = GridSites(api, component, name, layer, head, at, expansion.cells, spaces)
        index = [layer]
        if expansion.axis is not None:
            labels = np.array([cell.label for cell in expansion.cells], dtype=np.int64)
            index.append(labels[at])
        if kind is not None:
            index.append(head)
        return Grid(tuple(axes), np.stack(index, 1), sites)

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
