"""Picks some of many pairs: by their numbers, or by what they have in a column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._hints import did_you_mean
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import TokensError, UnknownNameError


def numbers_of(picked: Any, count: int) -> list[int]:
    """Read which of some pairs are meant: a slice, numbers, or true and false for each pair.

    Raises:
        IndexError: one number that no pair has; so that a loop over the pairs ends.
        TokensError: anything else that picks no pairs.
    """
    items = None if isinstance(picked, str | bytes | Mapping) else listed(picked)
    if isinstance(picked, slice):
        try:
            numbers = list(range(count)[picked])
        except (TypeError, ValueError) as error:
            raise TokensError(f"{shown(picked)} picks no pairs: {error}") from None
    elif items is None:
        number = strict_int(picked, "the number of a pair", TokensError)
        if not -count <= number < count:
            raise IndexError(f"there is no pair {number}; there are {count}")
        return [number % count]
    else:
        numbers = _listed_numbers(items, count)
    if not numbers:
        raise TokensError(f"{shown(picked)} picks none of {count} pairs")
    return numbers


def _listed_numbers(items: Sequence[Any], count: int) -> list[int]:
    flags = [isinstance(item, bool) or "bool" in str(getattr(item, "dtype", "")) for item in items]
    if all(flags) and items:
        if len(items) != count:
            raise TokensError(f"a mask of {len(items)} picks of {count} pairs; give one for each")
        return [number for number, item in enumerate(items) if item]
    numbers = [strict_int(item, "the number of a pair", TokensError) for item in items]
    for number in numbers:
        if not -count <= number < count:
            raise TokensError(f"there is no pair {number}; there are {count}")
    return [number % count for number in numbers]


def grouped(columns: Mapping[Any, Sequence[Any]], name: Any) -> dict[Any, list[int]]:
    """Number the pairs of each value in a column, in order of first appearance.

    What is missing, as None, nan and pandas' NA, is None.

    Raises:
        UnknownNameError: there is no such column.
        TokensError: its values cannot be told apart, as lists cannot.
    """
    if name not in columns:
        there = ", ".join(map(named, columns)) or "none"
        hint = did_you_mean(name, map(str, columns)) if isinstance(name, str) else ""
        raise UnknownNameError(f"no column {shown(name)}{hint}; there are {there}")
    groups: dict[Any, list[int]] = {}
    for number, value in enumerate(columns[name]):
        key = None if is_missing(value) else value
        try:
            groups.setdefault(key, []).append(number)
        except TypeError:
            raise TokensError(
                f"column {named(name)} makes no groups: pair {number} has {shown(value)} there"
            ) from None
    return groups


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none."""
    if value is None:
        return True
    try:
        return bool(value != value)
    # pandas' NA is neither equal nor unequal to itself; an array is in part.
    except (TypeError, ValueError, RuntimeError):
        return type(value).__name__ == "NAType"


def without_padding(tokens: Sequence[Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Take off the columns in front that are padding in all prompts: tokens, then masks."""
    used = torch.stack([mask.any(0) for mask in masks]).any(0)
    start = int(used.int().argmax())
    return tuple(tensor[:, start:].clone() for tensor in (*tokens, *masks))


def filled(rows: Sequence[Sequence[int]]) -> Tensor:
    """Lists of tokens as one tensor, `[rows, longest]`, with -1 behind the shorter ones."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device="cpu")


def without_fill(tokens: Tensor | None, numbers: Sequence[int]) -> Tensor | None:
    """Some rows of such a tensor, as wide as their longest."""
    if tokens is None:
        return None
    some = tokens[list(numbers)]
    return some[:, : int((some >= 0).sum(1).max())].clone()
