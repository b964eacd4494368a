"""Where an activation lives inside a layer: one row of an adapter's table."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import attrs

from nnpatch_core.adapters.heads import HeadColumns, HeadKind

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
