"""Holds a third party's position strategy to the laws of every strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnpatch_core.conformance import CheckError
from nnpatch_core.errors import PositionError
from nnpatch_core.seq_pos import SeqPos, checked_groups


def check_seq_pos(strategy: Any, lengths: Iterable[int] = range(1, 33)) -> None:
    """Raise unless a position strategy keeps the laws, for prompts of some lengths.

    Every position is inside the prompt; a group is ascending and has no duplicates; groups come in
    the order of their first positions, each of which is another; only a strategy with `one_by_one`
    gives several; asked again, it gives the same. A prompt that is too short for it is refused
    with `PositionError`, and whatever is longer than one that is not, is not refused either.

    Args:
        strategy: the strategy, an object with `one_by_one` and `expand`.
        lengths: of the prompts, in tokens.

    Raises:
        CheckError: the law that is broken, and at which length.

    Examples:
        >>> from nnpatch_core import LastK
        >>> check_seq_pos(LastK(3))
    """
    if isinstance(strategy, type) or not isinstance(strategy, SeqPos):
        raise CheckError(f"a strategy is an object with one_by_one and expand, got {strategy!r}")
    if not isinstance(strategy.one_by_one, bool):
        raise CheckError(f"one_by_one of {strategy!r} must be True or False")
    accepted: list[int] = []
    for length in sorted(set(lengths)):
        groups = _groups(strategy, length)
        if groups is None:
            if accepted:
                raise CheckError(
                    f"{strategy!r} refuses a prompt of {length} tokens, but not one of "
                    f"{accepted[-1]}"
                )
            continue
        accepted.append(length)
        if _groups(strategy, length) != groups:
            raise CheckError(f"{strategy!r} gives other groups when it is asked again")
    if not accepted:
        raise CheckError(f"{strategy!r} refuses prompts of every length that was tried")


def _groups(strategy: SeqPos, length: int) -> list[tuple[int, ...]] | None:
    """The groups, or None if the prompt is refused as too short."""
    try:
        expanded = strategy.expand(length)
    except PositionError:
        return None
    except Exception as error:
        raise CheckError(
            f"{strategy!r} refuses a prompt of {length} tokens with {type(error).__name__}, not "
            f"PositionError: {error}"
        ) from error
    try:
        return checked_groups(strategy, expanded, length)
    except PositionError as error:
        raise CheckError(str(error)) from error
