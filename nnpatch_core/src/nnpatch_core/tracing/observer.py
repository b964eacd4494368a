"""Who looks on as nnpatch runs a model: how many forwards, of how many rows and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

from nnpatch_core._models import with_weights

#: Each observer is kept on the model, under a name of its own, with the model's id: a copy of the
#: model has the entry too, and must not report to it.
#: To set or delete a name is one step, so that no lock is needed.
_OBSERVER = "_nnpatch_observer_"


@attrs.frozen
class Trace:
    """One forward that nnpatch has run."""

    #: How many runs come out at the top: each is one prompt, patched or not.
    rows: int
    #: How many tokens of each row were run; those to their left came from a cache.
    tokens: int
    #: Whether the logits have their graph.
    gradients: bool


@contextmanager
def traces(nnmodel: Any) -> Iterator[list[Trace]]:
    """Look on as nnpatch runs a model: the list fills with one `Trace` for each forward.

    They come in the order in which they end; one that fails is not among them. Observers of one
    model do not hinder each other: all see the forwards of every thread. Afterwards nothing is
    left on the model.

    Args:
        nnmodel: the model, as nnpatch's functions take it. One whose weights are not loaded yet is
            loaded.

    Raises:
        AdapterError: it is no model, or has no weights.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites, activation_patching
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> model = tiny_model()
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> answers = torch.tensor([1]), torch.tensor([2])
        >>> with traces(model) as seen:
        ...     out = activation_patching(
        ...         model, tiny_api(), Sites("resid"), source, target, *answers, progress=False
        ...     )
        >>> seen[0]
        Trace(rows=1, tokens=3, gradients=False)
    """
    model = with_weights(nnmodel)
    seen: list[Trace] = []
    name = f"{_OBSERVER}{id(seen)}"
    model.__dict__[name] = (seen, id(model))
    try:
        yield seen
    finally:
        del model.__dict__[name]


def report(model: nn.Module, rows: int, tokens: int, *, gradients: bool) -> None:
    """Tell whoever looks on at `model`, the Hugging Face model itself, of a forward."""
    for name, seen in model.__dict__.copy().items():
        # A copy of the model still has the entry of the model that it was copied from.
        if name.startswith(_OBSERVER) and seen[1] == id(model):
            seen[0].append(Trace(rows, tokens, gradients))
