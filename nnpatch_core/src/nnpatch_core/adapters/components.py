"""Where an activation lives inside a layer, and how it is read and written in a trace."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import attrs
from torch import Tensor

from nnpatch_core.adapters.heads import HeadColumns, HeadKind
from nnpatch_core.errors import AdapterError

Side: TypeAlias = Literal["input", "output"]


@attrs.frozen
class Component:
    """One row of an adapter's table: where in a layer an activation lives.

    Args:
        module: dotted path of the module inside the layer; `""` is the layer itself.
        side: the module's `"output"`, or its first `"input"`.
        heads: `"query"` or `"key_value"` where the last axis splits into such heads, else None.
        item: which item holds the activation where the module gives a tuple.
        columns: for a component whose heads do not simply stand one after the other: maps the
            activation's width and the layer's `Heads` to the columns of each head,
            `[heads, dim]`. A fused projection names its part here: `Fused("q")`,
            `Interleaved("q")`, or a function of yours.

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
    columns: HeadColumns | None = attrs.field(default=None, kw_only=True)

    @item.validator
    def _of_output(self, _: Any, item: int) -> None:
        if item and self.side == "input":
            raise ValueError("item= is for outputs: the input is a module's first argument")


def read(module: Any, component: Component, run: tuple[int, int] | None = None) -> Tensor:
    """The activation `[batch, seq, width]` at `component` of an envoy, inside a trace.

    Some modules see all tokens in a row, `[batch * seq, width]`; `run`, the batch's shape, tells
    how they are to be parted.

    Raises:
        AdapterError: it has another shape.
    """
    value = module.input if component.side == "input" else module.output
    if isinstance(value, tuple | list) and component.item >= len(value):
        raise AdapterError(
            f"{component.module or 'the layer'!r} gives {len(value)} items, and item "
            f"{component.item} is not among them"
        )
    found = value[component.item] if isinstance(value, tuple | list) else value
    if isinstance(found, Tensor) and found.ndim == 2 and run and len(found) == run[0] * run[1]:
        return found.view(*run, -1)
    if not isinstance(found, Tensor) or found.ndim != 3:
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise AdapterError(
            f"an activation must be a tensor [batch, seq, width], but the {component.side} of "
            f"{component.module or 'the layer'!r} is {shape}"
        )
    return found


def write(module: Any, component: Component, activation: Tensor) -> None:
    """Put `activation` `[batch, seq, width]` at `component` of an envoy, inside a trace."""
    if component.side == "input":
        module.input = activation.reshape(module.input.shape)
        return
    value = module.output
    if isinstance(value, tuple | list):
        items = list(value)
        items[component.item] = activation.reshape(items[component.item].shape)
        module.output = type(value)(items)
    else:
        module.output = activation.reshape(value.shape)
