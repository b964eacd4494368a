"""How an activation is read and written inside a trace."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnpatch_core._models import follow
from nnpatch_core.adapters import Component, Place
from nnpatch_core.errors import AdapterError

#: The residual stream before and after a layer.
LAYER_INPUT = Component("", "input")
LAYER_OUTPUT = Component("", "output")


def read(traced: Any, place: Place, shape: tuple[int, int] | None = None) -> Tensor:
    """The whole activation `[batch, seq, width]` at a place, inside a trace.

    Args:
        traced: the envoy of the Hugging Face model that is traced.
        place: where.
        shape: `(batch, seq)` of the run, if it is known: the activation is held to it.

    Raises:
        AdapterError: the activation has another shape.
    """
    activation = read_component(follow(traced, place.path), place.component, shape)
    if shape is not None and activation.shape[:2] != shape:
        raise AdapterError(
            f"component {place.name!r} of adapter {place.api.name!r} must be "
            f"[batch, seq, width], and is {list(activation.shape)} in a run of "
            f"{list(shape)} tokens"
        )
    return activation


def write(traced: Any, place: Place, activation: Tensor) -> None:
    """Put a whole activation `[batch, seq, width]` at a place, inside a trace."""
    write_component(follow(traced, place.path), place.component, activation)


def skip(envoy: Any, value: Any) -> None:
    """Let a module give `value` without running it, inside a trace."""
    envoy.skip(value)


def read_component(
    envoy: Any, component: Component, shape: tuple[int, int] | None = None
) -> Tensor:
    """The activation `[batch, seq, width]` at `component` of an envoy, inside a trace.

    Some modules see all tokens in a row, `[batch * seq, width]`; `shape` tells how these are to be
    parted.

    Raises:
        AdapterError: the activation has another shape.
    """
    value = envoy.input if component.side == "input" else envoy.output
    if isinstance(value, tuple | list) and component.item >= len(value):
        raise AdapterError(
            f"{component.module or 'the layer'!r} gives {len(value)} items, and item "
            f"{component.item} is not among them"
        )
    activation = value[component.item] if isinstance(value, tuple | list) else value
    if isinstance(activation, Tensor):
        if activation.ndim == 3:
            return activation
        if activation.ndim == 2 and shape and len(activation) == shape[0] * shape[1]:
            return activation.view(*shape, -1)
    told = list(activation.shape) if isinstance(activation, Tensor) else type(activation).__name__
    raise AdapterError(
        f"an activation must be a tensor [batch, seq, width], but the {component.side} of "
        f"{component.module or 'the layer'!r} is {told}"
    )


def write_component(envoy: Any, component: Component, activation: Tensor) -> None:
    """Put `activation` `[batch, seq, width]` at `component` of an envoy, inside a trace."""
    if component.side == "input":
        envoy.input = activation.reshape(envoy.input.shape)
        return
    value = envoy.output
    if isinstance(value, tuple | list):
        items = list(value)
        items[component.item] = activation.reshape(items[component.item].shape)
        envoy.output = type(value)(items)
    else:
        envoy.output = activation.reshape(value.shape)
