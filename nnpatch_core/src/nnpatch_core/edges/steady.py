"""Layers give a prompt the same in any row, or edges cannot go by them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core._rounding import rounding
from nnpatch_core.errors import EngineError
from nnpatch_core.tracing import forward_hooks, in_words

if TYPE_CHECKING:
    from nnpatch_core.edges.layers import Layers

#: In so many rows each layer is tried, at least.
_ROWS = 64


def check_rows(layers: Layers) -> None:
    """Raise `EngineError` where a hook treats the rows of a layer in ways of their own.

    Layers are called with rows that stand in no order, so that it would meet other prompts.

    Args:
        layers: the layers, and the target run.
    """
    hooks = forward_hooks(module_of(layers.nnmodel))
    if not hooks:
        return
    run, count = layers.target, len(layers.target.batch)
    # Each prompt in several rows, and none of them in its own alone.
    once = torch.arange(count, device="cpu")
    prompts = torch.cat([once.flip(0), once]).repeat(max(_ROWS // (2 * count), 1))
    for layer in range(layers.nodes.n_layers):
        stream = run.streams[layer][prompts]
        found = layers.received(layer, stream, prompts)
        pairs = [(value, _first_of(value, count)[prompts]) for value in found.values()]
        heads = layers.added_by_heads(layer, run.heads[layer][prompts], prompts)
        pairs.append((heads, layers.attn[layer] * run.attn[layer][prompts]))
        pairs.append((layers.mlp_of(layer, stream, prompts), run.mlp[layer][prompts]))
        real = run.batch.mask.bool()[prompts.to(run.batch.mask.device)].to(stream.device)
        if not all(_same(one[real], other[real]) for one, other in pairs):
            raise EngineError(
                f"the model has {in_words(hooks)}, and layer {layer}, called by itself, gives a "
                "prompt something else in another row than in its own: for edges a hook must treat "
                "all rows alike"
            )


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two activations are one, to the last bit, wherever each lies."""
    other = other.to(one.device)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    # At padding there may be no numbers.
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _first_of(value: Tensor, count: int) -> Tensor:
    """Each prompt's first row, of rows in which they stand the other way round."""
    return value[:count].flip(0)


def _same(one: Tensor, other: Tensor) -> bool:
    allowed = rounding(other) * float(other.abs().max())
    return float((one - other).abs().max()) <= allowed
