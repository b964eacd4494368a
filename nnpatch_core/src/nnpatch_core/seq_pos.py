"""Position strategies: which token positions are patched, together or one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import attrs

from nnpatch_core._integers import strict_int, strict_ints
from nnpatch_core.errors import PositionError

#: Positions that are patched together in one forward, ascending and without duplicates.
Group: TypeAlias = tuple[int, ...]


@runtime_checkable
class SeqPos(Protocol):
    """A position strategy: expands a prompt's length into groups of positions.

    Laws: every position `p` of a group satisfies `0 <= p < seq_len`; a group is ascending and has
    no duplicates; groups are ordered by their first position; equal lengths give equal groups.
    """

    @property
    def one_by_one(self) -> bool:
        """Whether an outcome has an axis of positions; a group stands at its first position."""
        ...

    def expand(self, seq_len: int) -> list[Group]:
        """The groups of positions of a prompt of `seq_len` tokens."""
        ...


def normalise(positions: Iterable[int], seq_len: int) -> Group:
    """Positions counted from either end as ascending positions from the start.

    Raises:
        PositionError: a position outside the prompt, or two spellings of one position.

    Examples:
        >>> normalise([-1, 0], seq_len=5)
        (0, 4)
    """
    spelled: dict[int, int] = {}
    for position in positions:
        if not -seq_len <= position < seq_len:
            raise PositionError(
                f"position {position} is out of range for a prompt of {seq_len} tokens: "
                f"allowed are {-seq_len} to {seq_len - 1}"
            )
        index = position % seq_len
        if index in spelled:
            raise PositionError(
                f"positions {spelled[index]} and {position} are the same token "
                f"of a prompt of {seq_len} tokens"
            )
        spelled[index] = position
    return tuple(sorted(spelled))


def groups_of(strategy: SeqPos, seq_len: int) -> list[Group]:
    """`strategy.expand(seq_len)`, held to the laws of a strategy.

    Raises:
        PositionError: the strategy broke a law, or its positions are not in the prompt.
    """
    return checked_groups(strategy, strategy.expand(seq_len), seq_len)


def checked_groups(strategy: SeqPos, expanded: Any, seq_len: int) -> list[Group]:
    """Hold what a strategy gave for a prompt to the laws of a strategy.

    Raises:
        PositionError: as for `groups_of`.
    """
    raw = list(expanded) if isinstance(expanded, Iterable) else [expanded]
    if not raw:
        raise PositionError(f"{strategy!r} gives no positions for a prompt of {seq_len} tokens")
    if not all(isinstance(group, Iterable) for group in raw):
        raise PositionError(f"{strategy!r} must give groups of positions, got {raw!r}")
    what = f"the positions that {strategy!r} gives"
    groups = [tuple(strict_int(number, what, PositionError) for number in group) for group in raw]
    for group in groups:
        ascending = list(group) == sorted(set(group))
        if not group or not ascending or group[0] < 0 or group[-1] >= seq_len:
            raise PositionError(
                f"{strategy!r} gives the positions {list(group)} for a prompt of {seq_len} tokens; "
                "a group must be ascending, without duplicates and inside the prompt"
            )
    firsts = [group[0] for group in groups]
    if firsts != sorted(firsts):
        raise PositionError(
            f"{strategy!r} must give its groups in the order of their first positions, got "
            f"{[list(group) for group in groups]}"
        )
    if len(set(firsts)) < len(firsts) or (len(groups) > 1 and not strategy.one_by_one):
        raise PositionError(
            f"{strategy!r} gives groups that would share a place in the outcome: "
            f"{[list(group) for group in groups]}"
        )
    return groups


def read_positions(values: Any) -> tuple[int, ...]:
    """Positions as a user gives them: one list, for all prompts.

    Raises:
        PositionError: none, no integers, named twice, or a list for each prompt.
    """
    return strict_ints(
        values,
        "seq_pos",
        PositionError,
        nested=": it names positions for all prompts, [k]; positions of each prompt apart, "
        "[batch, k], are not available yet",
    )


def _count(value: int) -> int:
    count = strict_int(value, "seq_pos of 'lastk'", PositionError)
    if count < 1:
        raise PositionError(f"seq_pos of 'lastk' must be at least 1, got {count}")
    return count


@attrs.frozen
class AllPositions:
    """Every position, together in one forward.

    Examples:
        >>> AllPositions().expand(3)
        [(0, 1, 2)]
    """

    one_by_one = False

    def expand(self, seq_len: int) -> list[Group]:
        """One group, of every position."""
        return [tuple(range(seq_len))]


@attrs.frozen
class Each:
    """Every position, one by one.

    Examples:
        >>> Each().expand(3)
        [(0,), (1,), (2,)]
    """

    one_by_one = True

    def expand(self, seq_len: int) -> list[Group]:
        """A group for each position."""
        return [(position,) for position in range(seq_len)]


@attrs.frozen
class Last:
    """The last position.

    Examples:
        >>> Last().expand(3)
        [(2,)]
    """

    one_by_one = False

    def expand(self, seq_len: int) -> list[Group]:
        """One group, of the last position."""
        return [normalise([-1], seq_len)]


@attrs.frozen
class LastK:
    """Each of the last `k` positions, one by one.

    Args:
        k: how many, at least 1.

    Examples:
        >>> LastK(2).expand(5)
        [(3,), (4,)]
    """

    k: int = attrs.field(converter=_count)
    one_by_one = True

    def expand(self, seq_len: int) -> list[Group]:
        """A group for each of the last `k` positions.

        Raises:
            PositionError: the prompt has fewer than `k` tokens.
        """
        if self.k > seq_len:
            raise PositionError(
                f"the last {self.k} positions were asked for, but the prompt has {seq_len} tokens"
            )
        return [(position,) for position in range(seq_len - self.k, seq_len)]


@attrs.frozen
class Custom:
    """The given positions, one by one, counted from the start or (negative) from the end.

    Args:
        positions: at least one, without duplicates.

    Examples:
        >>> Custom([-1, 0]).expand(4)
        [(0,), (3,)]
    """

    positions: tuple[int, ...] = attrs.field(converter=read_positions)
    one_by_one = True

    def expand(self, seq_len: int) -> list[Group]:
        """A group for each of the positions, ascending.

        Raises:
            PositionError: a position outside the prompt, or named twice.
        """
        return [(position,) for position in normalise(self.positions, seq_len)]


@attrs.frozen
class CustomConstant:
    """The given positions, all of them in one forward.

    Args:
        positions: at least one, without duplicates.

    Examples:
        >>> CustomConstant([-1, 0]).expand(4)
        [(0, 3)]
    """

    positions: tuple[int, ...] = attrs.field(converter=read_positions)
    one_by_one = False

    def expand(self, seq_len: int) -> list[Group]:
        """One group, of all the positions.

        Raises:
            PositionError: a position outside the prompt, or named twice.
        """
        return [normalise(self.positions, seq_len)]


BUILTIN_SEQ_POS: Mapping[str, Callable[..., SeqPos]] = {
    "all": AllPositions,
    "custom": Custom,
    "custom_constant": CustomConstant,
    "each": Each,
    "last": Last,
    "lastk": LastK,
}
