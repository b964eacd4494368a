"""Reading integers strictly: a bool or a float is a mistake, not a number."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from nnpatch_core._printable import shown
from nnpatch_core.errors import PatchingError


def strict_int(value: Any, what: str, error: type[PatchingError]) -> int:
    """`value` as an int, or `error`; numpy and torch integers are integers, bools are not."""
    type_name = type(value).__name__
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    # A tensor of one number counts as that number, however many axes it has.
    if not is_bool and getattr(value, "ndim", 0) == 0:
        try:
            return operator.index(value)
        except (TypeError, RuntimeError):  # the second: a tensor without numbers
            pass
    raise error(f"{what} must be an integer, got {shown(value)} ({type_name})")


def strict_seed(value: Any) -> int:
    """`value` as a seed of torch's, or `PatchingError`; None is 0."""
    seed = strict_int(0 if value is None else value, "seed", PatchingError)
    if not -(2**63) <= seed < 2**64:
        raise PatchingError(f"seed must be a number of 64 bits, got {seed}")
    return seed


def strict_ints(
    values: Any, what: str, error: type[PatchingError], nested: str = ""
) -> tuple[int, ...]:
    """`values` as a non-empty tuple of ints without duplicates, or `error`.

    Args:
        values: one list of integers.
        what: they are.
        error: its kind.
        nested: what to say to whoever gives lists of lists.
    """
    is_list = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    if isinstance(values, str | bytes) or not is_list:
        raise error(f"{what} must be a list of integers, got {shown(values)}")
    items = list(values)
    if any(isinstance(item, list | tuple) or getattr(item, "ndim", 0) for item in items):
        raise error(f"{what} must be one list of integers, got {shown(values)}{nested}")
    numbers = tuple(strict_int(item, f"each of {what}", error) for item in items)
    if not numbers:
        raise error(f"{what} is empty; give at least one")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise error(f"{what} names {twice[0]} more than once: {list(numbers)}")
    return numbers
