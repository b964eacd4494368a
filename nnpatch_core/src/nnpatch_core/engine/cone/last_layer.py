"""The last layer's MLP: where the last token alone is read, it need not see the others."""

from __future__ import annotations

from typing import Any

from torch import nn

from nnpatch_core._models import follow
from nnpatch_core.adapters import Place


def mlp_inside(layer: nn.Module, attention: Place | None) -> str | None:
    """The child of a layer that is its MLP, told by its size; None if no child is most of it.

    Args:
        layer: the layer.
        attention: a component of its attention, if one is known: whatever has it is no MLP.
    """
    inside = "" if attention is None else attention.component.module.partition(".")[0]
    sizes = {
        name: sum(weight.numel() for weight in child.parameters())
        for name, child in layer.named_children()
        if name != inside
    }
    if not sizes:
        return None
    largest = max(sizes, key=lambda name: sizes[name])
    return largest if 2 * sizes[largest] > sum(sizes.values()) else None


def only_last_token(traced: Any, path: str, width: int) -> None:
    """Inside a trace: let a module that adds to the stream see each row's last token alone.

    What it gives stands for all tokens of the row, of which the last one alone is looked at.

    Args:
        traced: the envoy of the model.
        path: where the module is.
        width: of the stream; a module that sees something else is left alone.
    """
    envoy = follow(traced, path)
    seen = envoy.input
    if seen.ndim == 3 and seen.shape[-1] == width:
        envoy.input = seen[:, -1:]
        output = envoy.output
        several = isinstance(output, tuple | list)
        own = output[0] if several else output
        # A copy, as some layers go on in place.
        whole = own.expand(-1, seen.shape[1], -1).clone()
        envoy.output = type(output)([whole, *output[1:]]) if several else whole
