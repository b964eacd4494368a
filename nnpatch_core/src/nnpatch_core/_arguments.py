"""What the user passes, read without trust: whatever it is, it gives our own error or none."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnpatch_core._printable import printable
from nnpatch_core.errors import PatchingError

#: How much of a value an error shows.
_MOST = 160


def shown(value: Any) -> str:
    """A value in one line, as an error shows it.

    Examples:
        >>> import torch
        >>> shown([1, 2]), shown(torch.zeros(2, 1))
        ('[1, 2]', 'tensor([[0.], [0.]])')
    """
    try:
        line = " ".join(repr(value).split())
    except Exception:  # an object may have a representation that fails
        line = f"an object of the type {type(value).__name__}"
    line = printable(line)
    return line if len(line) <= _MOST else f"{line[:_MOST]}…"


def listed(values: Any) -> tuple[Any, ...] | None:
    """What an iterable gives; None if it gives nothing one by one, as a tensor of no axes does."""
    try:
        return tuple(values)
    except (TypeError, NotImplementedError):
        return None


def check_flags(**flags: Any) -> None:
    """Raise `PatchingError`, with the argument's name, for what is neither true nor false."""
    for name, value in flags.items():
        if not isinstance(value, bool | int | np.bool_) or value not in (0, 1):
            raise PatchingError(f"{name} must be True or False, got {shown(value)}")
