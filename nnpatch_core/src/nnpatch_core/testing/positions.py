"""Holds a third party's position strategy to the laws of every strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nnpatch_core.batch import pack_left
from nnpatch_core.conformance import CheckError
from nnpatch_core.errors import PositionError
from nnpatch_core.seq_pos import (
    PlacedCell,
    PlacedSeqPos,
    PromptBatch,
    SeqPos,
    checked_cells,
    checked_groups,
    has_place,
)


def check_seq_pos(
    strategy: Any,
    lengths: Iterable[int] = range(1, 33),
    *,
    prompts: Iterable[PromptBatch] | None = None,
) -> None:
    """Raise unless a position strategy keeps the laws, for prompts of some lengths.

    Every position is inside the prompt; a group is ascending and has no duplicates; groups come in
    the order of their first positions, each of which is another; only a strategy with `one_by_one`
    gives several; asked again, it gives the same. A prompt that is too short for it is refused
    with `PositionError`, and whatever is longer than one that is not, is not refused either.

    A strategy with `place` is asked about batches in place of lengths: each cell has a name of its
    own, and in each prompt as many tokens of the source as of the target, ascending, none of which
    is padding; only a strategy with `one_by_one` gives several; asked again, it gives the same.

    Args:
        strategy: the strategy, an object with `one_by_one`, and `expand` or `place`.
        lengths: of the prompts, in tokens.
        prompts: for a strategy with `place`: the batches, such as ones with the spans that it looks
            for. None is a batch of prompts of each length, and shorter ones, without spans.

    Raises:
        CheckError: the law that is broken, and at which length.

    Examples:
        >>> from nnpatch_core import LastK
        >>> check_seq_pos(LastK(3))
    """
    if isinstance(strategy, type) or not isinstance(strategy, SeqPos | PlacedSeqPos):
        raise CheckError(
            f"a strategy is an object with one_by_one, and expand or place, got {strategy!r}"
        )
    if not isinstance(strategy.one_by_one, bool):
        raise CheckError(f"one_by_one of {strategy!r} must be True or False")
    if has_place(strategy):
        _check_placed(strategy, map(_batch, lengths) if prompts is None else prompts)
        return
    assert isinstance(strategy, SeqPos)
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


def _check_placed(strategy: PlacedSeqPos, batches: Iterable[PromptBatch]) -> None:
    accepted = 0
    for batch in batches:
        cells = _cells(strategy, batch)
        if cells is None:
            continue
        accepted += 1
        if _cells(strategy, batch) != cells:
            raise CheckError(f"{strategy!r} gives other cells when it is asked again")
    if not accepted:
        raise CheckError(f"{strategy!r} refuses every batch of prompts that was tried")


def _cells(strategy: PlacedSeqPos, batch: PromptBatch) -> tuple[PlacedCell, ...] | None:
    """The cells, or None if the prompts are refused."""
    try:
        placed = strategy.place(batch)
    except PositionError:
        return None
    except Exception as error:
        raise CheckError(
            f"{strategy!r} refuses prompts with {type(error).__name__}, not PositionError: {error}"
        ) from error
    try:
        return checked_cells(strategy, placed, batch)
    except PositionError as error:
        raise CheckError(str(error)) from error


def _batch(length: int) -> PromptBatch:
    """A prompt of a length, and shorter ones, each with another prompt as its source."""
    lengths = torch.tensor([length, max(length - 1, 1), max(length // 2, 1)], device="cpu")
    mask = (torch.arange(length, device="cpu")[None] >= length - lengths[:, None]).long()
    tokens = torch.arange(3 * length, device="cpu").view(3, length) % 50 + 3
    return PromptBatch(pack_left(tokens, mask), pack_left(tokens.flip(1), mask))
