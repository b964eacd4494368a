"""Positions as people name them, and as they are in each prompt of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeAlias, TypeGuard

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int, strict_ints
from nnpatch_core._printable import shown
from nnpatch_core.errors import PositionError

#: Positions that are patched together in one forward, ascending and without duplicates.
Group: TypeAlias = tuple[int, ...]
#: Positions of each prompt apart.
PromptGroups: TypeAlias = tuple[Group, ...]
#: Stands where a prompt has fewer positions than another one.
NONE = -1


@attrs.frozen(eq=False, slots=False)
class Positions:
    """Where a site is in each prompt of a batch, and where its values come from.

    Args:
        at: `[batch, k]`, or `[1, k]` where all prompts have the same; int64 on the CPU, ascending
            from 0, with -1 where a prompt has none.
        source: of the same shape, the position of the source run whose value goes there; None is
            the same position.
        columns: of the same shape, which of the prompt's positions each is, as they were named:
            positions of one column belong together, whatever their order in each prompt. None is
            their order.
    """

    at: Tensor
    source: Tensor | None = None
    columns: Tensor | None = None

    @classmethod
    def of(
        cls,
        groups: Iterable[Group],
        sources: Iterable[Group] | None = None,
        columns: Iterable[Group] | None = None,
    ) -> Positions:
        """Positions of each prompt, ascending, each with its source; one group is for all."""
        source, column = (None if each is None else _filled(each) for each in (sources, columns))
        return cls(_filled(groups), source, column)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The positions of each prompt; one group where all have the same."""
        return tuple(tuple(n for n in row if n != NONE) for row in self.at.tolist())

    @cached_property
    def sources(self) -> tuple[Group, ...]:
        """For each of `groups` where their values come from."""
        if self.source is None:
            return self.groups
        rows = zip(self.source.tolist(), self.at.tolist(), strict=True)
        return tuple(
            tuple(taken for taken, to in zip(*row, strict=True) if to != NONE) for row in rows
        )

    def group(self, prompt: int) -> Group:
        """The positions of one prompt."""
        return self.groups[prompt if len(self.groups) > 1 else 0]

    def sources_of(self, prompt: int) -> Group:
        """The positions of the source run that these have their values from."""
        return self.sources[prompt if len(self.sources) > 1 else 0]

    def rows(self, rows: slice | Tensor) -> Positions:
        """Those of some prompts."""
        if len(self.at) == 1:
            return self
        some = (None if each is None else each[rows] for each in (self.source, self.columns))
        return Positions(self.at[rows], *some)

    @property
    def numbered(self) -> Tensor:
        """`[batch, k]` or `[1, k]`: `columns`, or the numbers of the positions in their order."""
        if self.columns is not None:
            return self.columns
        return torch.arange(self.at.shape[1], device="cpu").expand_as(self.at)

    def mask(self, seq_len: int) -> Tensor:
        """`[batch or 1, seq]`, bool: where a prompt has a position."""
        return spread(self.at, seq_len) >= 0

    def picked(self, values: Tensor) -> Tensor:
        """`[batch, seq, ...]`, bool, at the positions: `[batch, k, ...]`, False where one has none.

        `values` are on the CPU.
        """
        at = self.at.clamp(min=0)
        if len(at) == 1:
            # A plan asks thousands of times, most often so.
            chosen = values.index_select(1, at[0])
        else:
            chosen = values[torch.arange(len(values), device="cpu")[:, None], at]
        real = (self.at != NONE).view(*at.shape, *[1] * (values.ndim - 2))
        return chosen & real


def spread(at: Tensor, seq_len: int, values: Tensor | None = None) -> Tensor:
    """`values`, or the positions themselves, as `[rows, seq]`: -1 where there are none."""
    # A column more takes those that are none.
    wide = torch.full((len(at), seq_len + 1), NONE, dtype=torch.int64, device="cpu")
    index = torch.where(at == NONE, seq_len, at)
    return wide.scatter(1, index, at if values is None else values)[:, :seq_len]


def _filled(groups: Iterable[Group]) -> Tensor:
    rows = list(groups)
    # A column at least, though all are empty where no prompt has a token.
    width = max(1, *map(len, rows))
    filled = [[*row, *[NONE] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device="cpu").reshape(len(rows), width)


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
        index = from_start(position, seq_len)
        if index in spelled:
            raise PositionError(
                f"positions {spelled[index]} and {position} are the same token "
                f"of a prompt of {seq_len} tokens"
            )
        spelled[index] = position
    return tuple(sorted(spelled))


def from_start(position: int, seq_len: int) -> int:
    """A position counted from either end as one from the start.

    Raises:
        PositionError: it is outside the prompt.
    """
    if not -seq_len <= position < seq_len:
        raise PositionError(
            f"position {position} is out of range for a prompt of {seq_len} tokens: "
            f"allowed are {-seq_len} to {seq_len - 1}"
        )
    return position % seq_len


def are_per_prompt(positions: Any) -> TypeGuard[PromptGroups]:
    """Whether positions name a group for each prompt."""
    return bool(positions) and isinstance(positions[0], tuple)


def for_all(positions: Group | PromptGroups) -> Group:
    """Positions that are the same in all prompts, as such.

    Raises:
        PositionError: each prompt has its own.
    """
    group: list[int] = []
    for position in positions:
        if isinstance(position, tuple):
            raise PositionError("each prompt has positions of its own, and there is no one group")
        group.append(position)
    return tuple(group)


def read_positions(values: Any) -> Group | PromptGroups:
    """Positions as a user gives them: `[k]` for all prompts, or `[batch, k]`.

    Raises:
        PositionError: none, no integers, or one list that names a position twice.
    """
    values = _kept(values)
    rows = _rows(values, "seq_pos")
    return strict_ints(values, "seq_pos", PositionError) if rows is None else rows


def read_sources(values: Any) -> Group | PromptGroups:
    """Positions of a source run, of which one may stand several times; see `read_positions`."""
    values = _kept(values)
    rows = _rows(values, "source_seq_pos")
    if rows is not None:
        return rows
    is_list = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    if isinstance(values, str | bytes) or not is_list:
        raise PositionError(f"source_seq_pos must be a list of integers, got {shown(values)}")
    each = "each of source_seq_pos"
    return tuple(strict_int(number, each, PositionError) for number in values)


def check_alike(positions: Any, sources: Any) -> None:
    """Raise `PositionError` unless source positions have the shape of the target's."""
    if sources is None:
        return
    shapes = [
        [len(each), len(each[0])] if are_per_prompt(each) else [len(each)]
        for each in (sources, positions)
    ]
    if shapes[0] != shapes[1]:
        raise PositionError(
            f"source_seq_pos must have the shape of seq_pos, {shapes[1]}, got {shapes[0]}: it says "
            "for each position of the target where the source's value is taken"
        )


def _kept(values: Any) -> Any:
    """The same values; those that can be read but once are read."""
    return list(values) if isinstance(values, Iterator) else values


def _rows(values: Any, what: str) -> PromptGroups | None:
    """Positions of each prompt; None where one list is given, or something that is none."""
    if getattr(values, "ndim", 1) == 0 or isinstance(values, str | bytes):
        return None
    items = list(values) if isinstance(values, Iterable) else []
    if not any(isinstance(item, Sequence) or getattr(item, "ndim", 0) for item in items):
        return None
    rows = []
    for prompt, item in enumerate(items):
        is_list = isinstance(item, Iterable) and getattr(item, "ndim", 1) == 1
        if isinstance(item, str | bytes) or not is_list:
            raise PositionError(f"{what} of prompt {prompt} must be integers, got {shown(item)}")
        each = f"each of {what} of prompt {prompt}"
        if any(isinstance(number, Sequence) or getattr(number, "ndim", 0) for number in item):
            raise PositionError(f"{what} of prompt {prompt} must be integers, got {shown(item)}")
        rows.append(tuple(strict_int(number, each, PositionError) for number in item))
    widths = {len(row) for row in rows}
    if widths != {len(rows[0])} or not rows[0]:
        raise PositionError(
            f"{what} must be [k] or [batch, k], as many positions for each prompt and at least "
            f"one, got {' to '.join(map(str, sorted({min(widths), max(widths)})))} of them"
        )
    return tuple(rows)
