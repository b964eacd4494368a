"""Where an activation lives inside a layer, and how it is read and written in a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import attrs
from torch import Tensor

Side: TypeAlias = Literal["input", "output"]
HeadKind: TypeAlias = Literal["query", "key_value"]
HeadView: TypeAlias = Callable[[Tensor, int], Tensor]

#: The components of a layer that nnpatch knows, in execution order.
COMPONENT_NAMES = ("resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid")
_ALIASES = {"z": "o"}


def canonical_name(name: str) -> str:
    """The name that an alias stands for: `z` is `o`; any other name is itself.

    Examples:
        >>> canonical_name("z")
        'o'
    """
    return _ALIASES.get(name, name)


def consecutive_heads(activation: Tensor, n_heads: int) -> Tensor:
    """`[batch, seq, heads * dim]` as `[batch, seq, heads, dim]`, one head after the other."""
    return activation.view(*activation.shape[:-1], n_heads, -1)


@attrs.frozen
class Component:
    """One row of an adapter's table: where in a layer an activation lives.

    Args:
        module: dotted path of the module inside the layer; `""` is the layer itself.
        side: the module's `"output"`, or its first `"input"`.
        heads: `"query"` or `"key_value"` where the last axis splits into such heads, else None.
        item: which item holds the activation where the module gives a tuple.
        view: for a component with heads, maps the activation `[batch, seq, width]` and the number
            of heads to `[batch, seq, heads, dim]`. It must return a *view*: what is assigned to
            the result is how a head is written. A fused projection slices here.

    Examples:
        >>> Component("self_attn.q_proj", heads="query").side
        'output'
    """

    module: str = attrs.field(validator=attrs.validators.instance_of(str))
    side: Side = attrs.field(default="output", validator=attrs.validators.in_(("input", "output")))
    heads: HeadKind | None = attrs.field(
        default=None,
        kw_only=True,
        validator=attrs.validators.in_((None, "query", "key_value")),
    )
    item: int = attrs.field(
        default=0,
        kw_only=True,
        validator=[attrs.validators.instance_of(int), attrs.validators.ge(0)],
    )
    view: HeadView = attrs.field(default=consecutive_heads, kw_only=True)


def read(module: Any, component: Component) -> Tensor:
    """The activation `[batch, seq, width]` at `component` of an envoy, inside a trace."""
    value = module.input if component.side == "input" else module.output
    found: Tensor = value[component.item] if isinstance(value, tuple) else value
    return found


def write(module: Any, component: Component, activation: Tensor) -> None:
    """Put `activation` `[batch, seq, width]` at `component` of an envoy, inside a trace."""
    if component.side == "input":
        module.input = activation
        return
    value = module.output
    if isinstance(value, tuple):
        before, after = value[: component.item], value[component.item + 1 :]
        module.output = (*before, activation, *after)
    else:
        module.output = activation
