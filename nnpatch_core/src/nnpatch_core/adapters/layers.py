"""An adapter's table laid on a model: its layers, and their components, heads and columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.adapters.components import Component
from nnpatch_core.adapters.heads import Heads, consecutive
from nnpatch_core.adapters.model_api import ModelAPI, Table
from nnpatch_core.components import COMPONENT_NAMES, canonical_name, did_you_mean_component
from nnpatch_core.errors import AdapterError, HeadError, LayerError, UnknownNameError

#: Columns that an error shows.
_SHOWN = 64


def tables(api: ModelAPI) -> list[Table]:
    """Each table of the adapter: that of most layers, then those of other kinds of layers."""
    return [api.components, *_kinds(api).values()]


def component_names(api: ModelAPI) -> list[str]:
    """Every component that some layer has, in execution order."""
    return list(dict.fromkeys(name for table in tables(api) for name in table))


def find_component(api: ModelAPI, name: str) -> Component:
    """The row of `api`'s tables for a component's name or a synonym, of some kind of layer.

    Raises:
        UnknownNameError: no such component, or this adapter lacks it.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"a component is named by a string, got {shown(name)}")
    for table in tables(api):
        if canonical_name(name) in table:
            return table[canonical_name(name)]
    has = f"adapter {api.name!r} has {', '.join(component_names(api))}"
    if canonical_name(name) in COMPONENT_NAMES:
        raise UnknownNameError(f"adapter {api.name!r} has no component {name!r}; {has}")
    hint = did_you_mean_component(name, component_names(api))
    raise UnknownNameError(f"unknown component {name!r}{hint}; {has}")


def n_layers(api: ModelAPI, model: nn.Module) -> int:
    """How many layers `model` has, or `AdapterError` if the adapter's path leads nowhere."""
    layers = _layers(api, model)
    if len(set(layers)) < len(layers):
        raise AdapterError(
            f"adapter {api.name!r} does not fit {described(model)}: a layer occurs twice, so that "
            "its runs cannot be told apart"
        )
    return len(layers)


def table_of(api: ModelAPI, model: nn.Module, layer: int) -> Table:
    """The table that holds in a layer: that of its kind, or that of most layers."""
    kinds = _kinds(api)
    if not kinds:
        return api.components
    module = _layers(api, model)[layer]
    for path, table in kinds.items():
        if _child(module, path) is not None:
            return table
    return api.components


def component_of(api: ModelAPI, model: nn.Module, layer: int, name: str) -> Component:
    """Where a component is in a layer.

    Raises:
        UnknownNameError: the adapter has no such component.
        LayerError: this layer has not, though others have.
    """
    component = table_of(api, model, layer).get(canonical_name(name))
    if component is None:
        find_component(api, name)
        layers = layers_with(api, model, name)
        having = f"the layers {list(layers)} have one" if layers else "no layer of this model has"
        raise LayerError(f"layer {layer} has no {name!r}; {having}")
    return component


def layers_with(api: ModelAPI, model: nn.Module, name: str) -> tuple[int, ...]:
    """Which layers have a component."""
    wanted = canonical_name(name)
    return tuple(
        layer for layer in range(n_layers(api, model)) if wanted in table_of(api, model, layer)
    )


def heads_of(api: ModelAPI, model: nn.Module, layer: int) -> Heads:
    """How many heads a layer has."""
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    query, key_value = (api.n_heads(config, kind, layer) for kind in ("query", "key_value"))
    return Heads(query, key_value, text_config)


def n_heads(api: ModelAPI, model: nn.Module, name: str) -> int:
    """How many heads a component has, in the layer that has most; 0 if it has none.

    Raises:
        UnknownNameError: the adapter has no such component.
    """
    kind = find_component(api, name).heads
    if kind is None:
        return 0
    return max(
        (api.n_heads(model.config, kind, layer) for layer in layers_with(api, model, name)),
        default=0,
    )


def head_columns(
    api: ModelAPI, model: nn.Module, layer: int, name: str, width: int
) -> Tensor | None:
    """Which columns of a component's activation each head has, `[heads, dim]`; None without heads.

    Raises:
        AdapterError: the width does not split into the heads, or the adapter's columns are none.
    """
    component = component_of(api, model, layer, name)
    if component.heads is None:
        return None
    misfit = _misfit(api, model, name)
    if component.columns is None:
        return consecutive(width, _split(api, model, layer, component, width, misfit))
    heads = heads_of(api, model, layer)
    count = heads.count(component.heads)
    try:
        columns = torch.as_tensor(component.columns(width, heads), device="cpu")
    except (RuntimeError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise AdapterError(
            f"{misfit} is {width} wide, which does not split into {count} heads: {error}"
        ) from error
    if columns.ndim != 2 or len(columns) != count or columns.shape[1] < 1:
        raise AdapterError(
            f"{misfit} must have its columns as [{count} heads, dim], got {list(columns.shape)}"
        )
    if columns.is_floating_point() or columns.min() < 0 or columns.max() >= width:
        raise AdapterError(f"{misfit} is {width} wide, and its columns are {_shown(columns)}")
    if columns.flatten().long().bincount().max() > 1:
        raise AdapterError(f"{misfit} has a column twice: {_shown(columns)}")
    return columns


def _misfit(api: ModelAPI, model: nn.Module, name: str) -> str:
    return f"adapter {api.name!r} does not fit {described(model)}: component {name!r}"


def _shown(columns: Tensor) -> str:
    """Some columns, in an error: of a wide component they would fill the screen."""
    if columns.numel() <= _SHOWN:
        return f"{columns.tolist()}"
    return f"{columns.flatten()[:_SHOWN].tolist()} and so on"


def _split(
    api: ModelAPI, model: nn.Module, layer: int, component: Component, width: int, misfit: str
) -> int:
    """The number of heads, if a width splits into them, one after the other."""
    assert component.heads is not None
    count = api.n_heads(model.config, component.heads, layer)
    if count == 0 or width % count:
        raise AdapterError(f"{misfit} is {width} wide, which does not split into {count} heads")
    return count


def check_layer(layer: Any, count: int) -> int:
    """`layer` as an int, or `LayerError` if a model of `count` layers does not have it."""
    number = strict_int(layer, "a layer", LayerError)
    if not 0 <= number < count:
        raise LayerError(f"layer {number} is out of range: the model has layers 0 to {count - 1}")
    return number


def check_head(head: Any, name: str, component: Component, count: int | None = None) -> int:
    """`head` as an int, or `HeadError` if the component does not have that head."""
    number = strict_int(head, "a head", HeadError)
    if component.heads is None:
        raise HeadError(f"component {name!r} has no heads, but head {number} was asked for")
    if number < 0 or (count is not None and number >= count):
        last = "" if count is None else f" to {count - 1}"
        kind = component.heads.replace("_", "/")
        raise HeadError(
            f"head {number} of {name!r} is out of range: its {kind} heads are numbered 0{last}"
        )
    return number


def check_fits(api: ModelAPI, model: nn.Module) -> None:
    """Raise `AdapterError` unless every component of `api` is to be found in its layers."""
    layers = _layers(api, model)
    if not len(layers):
        raise AdapterError(f"{described(model)} has no layers: the list at {api.layers!r} is empty")
    for index, layer in enumerate(layers):
        table = table_of(api, model, index)
        for name, component in table.items():
            _check_component(api, model, index, layer, name, component)
        if {"query", "key_value"} <= {component.heads for component in table.values()}:
            heads = heads_of(api, model, index)
            if heads.query % heads.key_value:
                raise AdapterError(
                    f"{described(model)} has {heads.query} query heads in layer {index}, which "
                    f"{heads.key_value} key/value heads cannot share"
                )


def of_other_type(api: ModelAPI, model: nn.Module) -> str:
    """That an adapter does not claim the model's type; "" if it does.

    What fits by its names may still live elsewhere, as norms after a block do.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in api.model_types:
        return ""
    types = ", ".join(api.model_types) or "of none"
    return (
        f"adapter {api.name!r} is for model_type {types}, but the model's is {model_type!r}: "
        "make sure that its components live in the same places"
    )


def _check_component(
    api: ModelAPI,
    model: nn.Module,
    index: int,
    layer: nn.Module,
    name: str,
    component: Component,
) -> None:
    module = _child(layer, component.module)
    if module is None:
        children = ", ".join(child for child, _ in layer.named_children())
        raise AdapterError(
            f"adapter {api.name!r} does not fit {described(model)}: component {name!r} is at "
            f"{component.module!r}, and layer {index} ({type(layer).__name__}) has {children}"
        )
    width = getattr(module, f"{'in' if component.side == 'input' else 'out'}_features", None)
    if isinstance(width, int) and component.columns is not None:
        head_columns(api, model, index, name, width)
    elif isinstance(width, int) and component.heads is not None:
        # Whether it splits is told without the columns, which a wide component has many of.
        _split(api, model, index, component, width, _misfit(api, model, name))


def _kinds(api: ModelAPI) -> Mapping[str, Table]:
    kinds: Mapping[str, Table] = getattr(api, "kinds", {})
    return kinds


def _layers(api: ModelAPI, model: nn.Module) -> nn.ModuleList:
    layers = _child(model, api.layers)
    if not isinstance(layers, nn.ModuleList):
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        known = model_type is None or model_type in api.model_types
        raise AdapterError(
            f"adapter {api.name!r} does not fit {described(model)}: it has no list of layers at "
            f"{api.layers!r}"
            + ("" if known else f"; it is for {', '.join(api.model_types)}, and api=None finds one")
        )
    return layers


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def described(model: nn.Module) -> str:
    """A model's class and type, for an error."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {model_type!r})"
