"""Reading integers strictly: a bool or a float is a mistake, not a number."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from nnpatch_core.errors import PatchingError


def strict_int(value: Any, what: str, error: type[PatchingError]) -> int:
    """`value` as an int, or `error`; numpy and torch integers are integers, bools are not."""
    type_name = type(value).__name__
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if not is_bool:
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise error(f"{what} must be an integer, got {value!r} ({type_name})")


def strict_ints(values: Any, what: str, error: type[PatchingError]) -> tuple[int, ...]:
    """`values` as a non-empty tuple of ints without duplicates, or `error`."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise error(f"{what} must be a list of integers, got {values!r}")
    numbers = tuple(strict_int(value, f"each of {what}", error) for value in values)
    if not numbers:
        raise error(f"{what} is empty; give at least one")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise error(f"{what} names {twice[0]} more than once: {list(numbers)}")
    return numbers
