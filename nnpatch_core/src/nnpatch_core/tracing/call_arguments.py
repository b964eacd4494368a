"""The arguments that a module is called with: kept, and for other rows than it was called with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnpatch_core._upstream import Cache


def of_rows(value: Any, which: Tensor, batch: int) -> Any:
    """Arguments of a module, with a row for each row of its input.

    Masks and position embeddings have one row for each prompt, or one for all.

    Args:
        value: the argument, or several in a tuple, list or dictionary.
        which: `[rows]`, whose row each of them gets.
        batch: how many rows there were.
    """
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(of_rows(each, which, batch) for each in value)
    if isinstance(value, dict):
        return {key: of_rows(each, which, batch) for key, each in value.items()}
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != batch:
        return value
    if batch == 1:
        return value.expand(len(which), *value.shape[1:])
    return value[which.to(value.device)]


def kept_arguments(value: Any) -> Any:
    """The arguments of a call without their graph, and without a cache, which would be added to."""
    if isinstance(value, Cache):
        return None
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: kept_arguments(each) for key, each in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(kept_arguments(each) for each in value)
    return value
