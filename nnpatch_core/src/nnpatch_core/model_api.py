"""The adapter protocol: what nnpatch must know of a model family, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._integers import strict_int
from nnpatch_core.components import COMPONENT_NAMES, Component, HeadKind, canonical_name
from nnpatch_core.errors import AdapterError, HeadError, LayerError, UnknownNameError


@runtime_checkable
class ModelAPI(Protocol):
    """An adapter: where the components of one model family live.

    `DecoderAPI` is the table that fits most families; any object with these members will do.
    """

    @property
    def name(self) -> str:
        """The name under which the adapter is registered."""
        ...

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of a Hugging Face config's `model_type` that the adapter is for."""
        ...

    @property
    def layers(self) -> str:
        """Dotted path from the model to its list of layers."""
        ...

    @property
    def components(self) -> Mapping[str, Component]:
        """Component name to where it lives in a layer, in execution order."""
        ...

    def n_heads(self, config: Any, kind: HeadKind) -> int:
        """How many heads of that kind a layer of a model with this config has."""
        ...


def _model_types(values: Iterable[str]) -> tuple[str, ...]:
    # A single string would be taken for its letters.
    found = () if isinstance(values, str) else tuple(values)
    if not found or not all(isinstance(value, str) for value in found):
        raise AdapterError(f"model_types must be a tuple of strings, got {values!r}")
    return found


def _table(components: Mapping[str, Component]) -> Mapping[str, Component]:
    for name, component in components.items():
        if not isinstance(name, str) or not isinstance(component, Component):
            raise AdapterError(
                f"components maps names to Component objects, got {name!r}: {component!r}"
            )
    return MappingProxyType({canonical_name(name): row for name, row in components.items()})


@attrs.frozen(eq=False)
class DecoderAPI:
    """An adapter as a table, for decoders whose config names the numbers of heads.

    Args:
        name: the name to register; must be unique among the installed plugins.
        model_types: which `config.model_type` values it is for.
        components: component name to `Component`, in execution order.
        layers: dotted path from the model to its list of layers.
        query_heads: the config's attribute for the number of query heads.
        key_value_heads: the config's attribute for the number of key/value heads; where a config
            has none, the family has as many as query heads.

    Examples:
        >>> api = DecoderAPI("Tiny", ("tiny",), {"mlp": Component("mlp")})
        >>> api.layers, list(api.components)
        ('model.layers', ['mlp'])
    """

    name: str = attrs.field(validator=attrs.validators.instance_of(str))
    model_types: tuple[str, ...] = attrs.field(converter=_model_types)
    components: Mapping[str, Component] = attrs.field(converter=_table)
    layers: str = "model.layers"
    query_heads: str = "num_attention_heads"
    key_value_heads: str = "num_key_value_heads"

    def n_heads(self, config: Any, kind: HeadKind) -> int:
        """How many heads of that kind a layer has.

        Raises:
            AdapterError: the config does not say.
        """
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        has_own = kind == "key_value" and getattr(config, self.key_value_heads, None) is not None
        attribute = self.key_value_heads if has_own else self.query_heads
        count = getattr(config, attribute, None)
        if not isinstance(count, int) or count < 1:
            raise AdapterError(
                f"adapter {self.name!r} reads the number of heads from config.{attribute}, which "
                f"is {count!r} in this model (model_type {config.model_type!r})"
            )
        return count


def separate_projections(attention: str = "self_attn") -> dict[str, Component]:
    """The rows `q`, `k`, `v` and `o` of a family with one module for each projection.

    `q`, `k`, `v` are the projections' outputs before any rotary embedding; `o` is the *input* of
    the output projection, which is what each query head hands to it.

    Examples:
        >>> separate_projections()["k"].module
        'self_attn.k_proj'
    """
    return {
        "q": Component(f"{attention}.q_proj", heads="query"),
        "k": Component(f"{attention}.k_proj", heads="key_value"),
        "v": Component(f"{attention}.v_proj", heads="key_value"),
        "o": Component(f"{attention}.o_proj", "input", heads="query"),
    }


def decoder_components(*, attn: str = "self_attn", mlp: str = "mlp") -> dict[str, Component]:
    """The whole table of a decoder laid out like Llama.

    Args:
        attn: path of the module whose output attention adds to the residual stream.
        mlp: path of the module whose output the MLP adds to the residual stream. A family with
            norms after its blocks names those norms here.

    Examples:
        >>> list(decoder_components())
        ['resid_pre', 'q', 'k', 'v', 'o', 'attn', 'mlp', 'resid']
    """
    return {
        "resid_pre": Component("", "input"),
        **separate_projections(),
        "attn": Component(attn),
        "mlp": Component(mlp),
        "resid": Component(""),
    }


def find_component(api: ModelAPI, name: str) -> Component:
    """The row of `api`'s table for a component's name or alias.

    Raises:
        UnknownNameError: no such component, or this adapter lacks it.
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"a component is named by a string, got {name!r}")
    component = api.components.get(canonical_name(name))
    if component is not None:
        return component
    has = f"adapter {api.name!r} has {', '.join(api.components)}"
    if canonical_name(name) in COMPONENT_NAMES:
        raise UnknownNameError(f"adapter {api.name!r} has no component {name!r}; {has}")
    raise UnknownNameError(f"unknown component {name!r}; {has}")


def n_layers(api: ModelAPI, model: nn.Module) -> int:
    """How many layers `model` has, or `AdapterError` if the adapter's path leads nowhere."""
    return len(_layers(api, model))


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
    """Raise `AdapterError` unless every component of `api` is to be found in every layer."""
    for index, layer in enumerate(_layers(api, model)):
        for name, component in api.components.items():
            _check_component(api, model, index, layer, name, component)


def _layers(api: ModelAPI, model: nn.Module) -> nn.ModuleList:
    try:
        layers = model.get_submodule(api.layers)
    except AttributeError:
        layers = None
    misfit = f"adapter {api.name!r} does not fit {_described(model)}"
    if not isinstance(layers, nn.ModuleList):
        raise AdapterError(f"{misfit}: it has no list of layers at {api.layers!r}")
    if len(set(layers)) < len(layers):
        raise AdapterError(f"{misfit}: a layer occurs twice, so that its runs cannot be told apart")
    return layers


def _check_component(
    api: ModelAPI,
    model: nn.Module,
    index: int,
    layer: nn.Module,
    name: str,
    component: Component,
) -> None:
    misfit = f"adapter {api.name!r} does not fit {_described(model)}"
    try:
        module = layer.get_submodule(component.module)
    except AttributeError as error:
        children = ", ".join(child for child, _ in layer.named_children())
        raise AdapterError(
            f"{misfit}: component {name!r} is at {component.module!r}, "
            f"and layer {index} ({type(layer).__name__}) has {children}"
        ) from error
    width = getattr(module, f"{'in' if component.side == 'input' else 'out'}_features", None)
    if isinstance(width, int):
        split_heads(api, name, torch.empty(1, 1, width), model)


def split_heads(api: ModelAPI, name: str, activation: Tensor, model: nn.Module) -> Tensor:
    """A view of a component's activation `[batch, seq, width]`, as `[batch, seq, heads, dim]`.

    A component without heads is itself.

    Raises:
        AdapterError: the width does not split into the heads, or the adapter's `view` is none.
    """
    row = api.components[name]
    if row.heads is None:
        return activation
    config: Any = model.config
    count = api.n_heads(config, row.heads)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    misfit = f"adapter {api.name!r} does not fit {_described(model)}: component {name!r}"
    try:
        if row.view is None:
            view = activation.view(*activation.shape[:-1], count, -1)
        else:
            view = row.view(activation, text_config)
    except (RuntimeError, IndexError) as error:
        raise AdapterError(
            f"{misfit} is {activation.shape[-1]} wide, which does not split into {count} heads: "
            f"{error}"
        ) from error
    if view.ndim != 4 or view.shape[:3] != (*activation.shape[:2], count):
        raise AdapterError(
            f"{misfit} must be seen as [batch, seq, {count} heads, dim], but its view of "
            f"{list(activation.shape)} is {list(view.shape)}"
        )
    if view.untyped_storage().data_ptr() != activation.untyped_storage().data_ptr():
        raise AdapterError(f"{misfit} is seen through a copy, so that a patch would change nothing")
    return view


def _described(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {model_type!r})"
