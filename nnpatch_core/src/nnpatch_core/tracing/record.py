"""Whole activations of a run, kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.tracing.activations import read
from nnpatch_core.tracing.begun import Begun
from nnpatch_core.tracing.trace import forward


def record(
    nnmodel: Any,
    batch: Batch,
    places: Sequence[Place],
    store: torch.device | None = None,
    first: int = 0,
    begun: Begun | None = None,
) -> tuple[Tensor, dict[Location, Tensor]]:
    """Run `batch` and keep the whole activations at some places.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        places: where, in the order in which a forward reaches them.
        store: the device on which activations lie; None is where they were computed.
        first: the first position that is kept.
        begun: the prompts, if they have been run up to that position or less.

    Returns:
        The logits as `forward` gives them, and `[batch, positions from first on, width]` for each
        `Place.location`.
    """
    kept: dict[Location, Tensor] = {}
    start = 0 if begun is None else begun.start
    shape = (batch.tokens.shape[0], batch.tokens.shape[1] - start)

    def visit(traced: Any) -> None:
        for place in places:
            if place.location not in kept:
                activation = read(traced, place, shape)
                kept[place.location] = _kept(activation[:, first - start :], store)

    cache = None if begun is None else begun.given
    return forward(nnmodel, batch, visit, cache=cache, start=start), kept


def _kept(activation: Tensor, store: torch.device | None) -> Tensor:
    # A copy: later layers may work in place.
    return activation.clone() if store is None else activation.to(store, copy=True)
