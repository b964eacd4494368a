"""Position strategies: which token positions are patched, together or one by one."""

from __future__ import annotations

from typing import Any, Protocol, TypeGuard, runtime_checkable

import attrs

from nnpatch_core._integers import strict_int
from nnpatch_core.errors import PositionError
from nnpatch_core.seq_pos.positions import (
    Group,
    PromptGroups,
    are_per_prompt,
    check_alike,
    for_all,
    from_start,
    normalise,
    read_positions,
    read_sources,
)
from nnpatch_core.seq_pos.prompts import PromptBatch

_TARGET, _SOURCE = "seq_pos", "source_seq_pos"


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


@attrs.frozen
class PlacedCell:
    """One cell of a strategy that needs the prompts.

    Args:
        name: how the outcome calls it.
        positions: for each prompt the positions that are patched together, ascending from 0 in the
            left-padded batch.
        source: for each of them the position of the source prompt that its value is taken from;
            None is the same.

    Examples:
        >>> PlacedCell("subject", ((3,), (2, 3)))
        PlacedCell(name='subject', positions=((3,), (2, 3)), source=None)
    """

    name: str
    positions: PromptGroups
    source: PromptGroups | None = None


@runtime_checkable
class PlacedSeqPos(Protocol):
    """A position strategy that looks at the prompts, as one that goes by spans does.

    Laws: each cell has a name of its own; its positions of a prompt are tokens of that prompt,
    ascending, without duplicates; so are the source's, of which there are as many; equal prompts
    give equal cells.
    """

    @property
    def one_by_one(self) -> bool:
        """Whether an outcome has an axis of these cells; there is one cell otherwise."""
        ...

    def place(self, prompts: PromptBatch) -> list[PlacedCell]:
        """The cells, with their positions in each prompt."""
        ...


def has_place(strategy: Any) -> TypeGuard[PlacedSeqPos]:
    """Whether a strategy places its cells by the prompts, and not by their length alone."""
    return isinstance(strategy, PlacedSeqPos) and bool(getattr(strategy, "by_prompt", True))


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


def _alike(strategy: Any, _: Any, source: Any) -> None:
    check_alike(strategy.positions, source)


def _read_source(source: Any) -> Group | PromptGroups | None:
    return None if source is None else read_sources(source)


def source_at(positions: Any, source: Any, seq_len: int) -> dict[int, int]:
    """For each position of the target where its value is taken, both from the start."""
    pairs = zip(for_all(positions), for_all(source), strict=True)
    return {from_start(to, seq_len): _from_start(taken, seq_len, _SOURCE) for to, taken in pairs}


def _from_start(position: int, seq_len: int, what: str, prompt: int | None = None) -> int:
    """`from_start`; the error names the argument, and the prompt."""
    try:
        return from_start(position, seq_len)
    except PositionError as error:
        told = "" if prompt is None else f" of prompt {prompt}"
        raise PositionError(f"{what}{told}: {error}") from None


@attrs.frozen
class Custom:
    """The given positions, one by one, counted from the start or (negative) from the end.

    Args:
        positions: `[k]`, at least one, without duplicates, for all prompts; or `[batch, k]`, those
            of each prompt, of which cell i is column i.
        source: of the same shape, where the source run's value is taken; None is the same.

    Examples:
        >>> Custom([-1, 0]).expand(4)
        [(0,), (3,)]
    """

    positions: Group | PromptGroups = attrs.field(converter=read_positions)
    source: Group | PromptGroups | None = attrs.field(
        default=None, converter=_read_source, validator=_alike
    )
    one_by_one = True

    @property
    def by_prompt(self) -> bool:
        """Whether each prompt has positions of its own."""
        return are_per_prompt(self.positions)

    def expand(self, seq_len: int) -> list[Group]:
        """A group for each of the positions, ascending.

        Raises:
            PositionError: a position outside the prompt, or named twice; positions of each prompt,
                which `place` gives.
        """
        return [(position,) for position in normalise(for_all(self.positions), seq_len)]

    def place(self, prompts: PromptBatch) -> list[PlacedCell]:
        """A cell for each column.

        Raises:
            PositionError: a position outside its prompt, or another number of prompts.
        """
        return [
            PlacedCell(
                str(number),
                _column(self.positions, number, prompts.seq_len, _TARGET),
                None
                if self.source is None
                else _column(self.source, number, prompts.seq_len, _SOURCE),
            )
            for number in range(_width(self.positions))
        ]


@attrs.frozen
class CustomConstant:
    """The given positions, all of them in one forward.

    Args:
        positions: `[k]`, at least one, without duplicates, for all prompts; or `[batch, k]`, those
            of each prompt.
        source: of the same shape, where the source run's value is taken; None is the same.

    Examples:
        >>> CustomConstant([-1, 0]).expand(4)
        [(0, 3)]
    """

    positions: Group | PromptGroups = attrs.field(converter=read_positions)
    source: Group | PromptGroups | None = attrs.field(
        default=None, converter=_read_source, validator=_alike
    )
    one_by_one = False

    @property
    def by_prompt(self) -> bool:
        """Whether each prompt has positions of its own."""
        return are_per_prompt(self.positions)

    def expand(self, seq_len: int) -> list[Group]:
        """One group, of all the positions.

        Raises:
            PositionError: a position outside the prompt, or named twice; positions of each prompt,
                which `place` gives.
        """
        return [normalise(for_all(self.positions), seq_len)]

    def place(self, prompts: PromptBatch) -> list[PlacedCell]:
        """One cell, of all columns.

        Raises:
            PositionError: a position outside its prompt, or named twice for it.
        """
        groups, sources, _ = resolved(self.positions, self.source, prompts.seq_len)
        return [PlacedCell("all", groups, sources)]


def _width(positions: Any) -> int:
    return len(positions[0])


def _column(positions: Any, number: int, seq_len: int, what: str) -> PromptGroups:
    return tuple(
        (_from_start(row[number], seq_len, what, prompt),) for prompt, row in enumerate(positions)
    )


def resolved(
    positions: Any, source: Any, seq_len: int
) -> tuple[PromptGroups, PromptGroups | None, PromptGroups | None]:
    """Positions of each prompt from the start, ascending, each with that of its source.

    And with the number that it was named by; None where that is their order in every prompt.

    Raises:
        PositionError: one is outside its prompt, or named twice for it.
    """
    groups, sources, columns = [], [], []
    for prompt, row in enumerate(positions):
        taken = row if source is None else source[prompt]
        named = [
            (
                _from_start(to, seq_len, _TARGET, prompt),
                _from_start(value, seq_len, _SOURCE, prompt),
                number,
            )
            for number, (to, value) in enumerate(zip(row, taken, strict=True))
        ]
        if len({to for to, *_ in named}) < len(named):
            raise PositionError(
                f"seq_pos names one token of prompt {prompt} twice: {list(row)} of {seq_len} tokens"
            )
        group, values, numbers = zip(*sorted(named), strict=True)
        groups.append(group)
        sources.append(values)
        columns.append(numbers)
    turned = any(list(numbers) != sorted(numbers) for numbers in columns)
    return (
        tuple(groups),
        None if source is None else tuple(sources),
        tuple(columns) if turned else None,
    )
