"""Reads arguments of the user without trust: whatever they are, the error is ours, or none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnpatch_core._printable import shown
from nnpatch_core.errors import PatchingError


def listed(values: Any) -> tuple[Any, ...] | None:
    """List the items of an iterable; None if it has none to give, as a tensor of no axes has."""
    try:
        return tuple(values)
    except (TypeError, NotImplementedError):
        return None


def check_flags(**flags: Any) -> None:
    """Raise `PatchingError`, with the argument's name, for what is neither true nor false."""
    for name, value in flags.items():
        if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
            raise PatchingError(f"{name} must be True or False, got {shown(value)}")


def bound(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a call by name; where they do not fit, the error names the function."""
    try:
        return inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{function.__name__}() {error}") from None
