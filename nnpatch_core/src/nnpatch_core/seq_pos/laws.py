"""Holds what a strategy gives to the laws of strategies, and lays it out in cells."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import PositionError
from nnpatch_core.seq_pos.positions import Group, Positions, PromptGroups
from nnpatch_core.seq_pos.prompts import PromptBatch
from nnpatch_core.seq_pos.strategies import (
    Custom,
    CustomConstant,
    PlacedCell,
    PlacedSeqPos,
    SeqPos,
    has_place,
    source_at,
)

NO_SOURCE = (
    "source_seq_pos says where a source run's values are taken, and there is no source run: an "
    "ablation has none, and get_sites_dict is given both runs by a PromptPairs"
)


@attrs.frozen
class CellPositions:
    """The positions of one cell, as a site takes them.

    Args:
        label: its place on the axis of positions; None where there is none.
        seq_pos: the positions.
        source: where values are taken; None is the same.
        name: what they are called, if they have a name.
    """

    label: int | None
    seq_pos: Group | PromptGroups
    source: Group | PromptGroups | None = None
    name: str | None = None


@attrs.frozen
class Expansion:
    """All cells of a strategy.

    Args:
        axis: the axis that they stand on; None where there is one cell.
        labels: of the axis.
        cells: the cells.
    """

    axis: str | None
    labels: tuple[int | str, ...]
    cells: tuple[CellPositions, ...]


def expansion_of(
    strategy: SeqPos | PlacedSeqPos, seq_len: int, prompts: PromptBatch | None
) -> Expansion:
    """The cells of a strategy, for prompts of `seq_len` tokens.

    Raises:
        PositionError: the strategy broke a law, or its positions are not in the prompts, or it
            needs the prompts and there are none.
    """
    if has_place(strategy):
        return _placed(strategy, prompts)
    assert isinstance(strategy, SeqPos)
    groups = groups_of(strategy, seq_len)
    sources = _sources(strategy, seq_len)
    cells = (
        CellPositions(
            group[0] if strategy.one_by_one else None,
            group,
            None if sources is None else tuple(sources[position] for position in group),
        )
        for group in groups
    )
    if strategy.one_by_one:
        return Expansion("position", tuple(range(seq_len)), tuple(cells))
    return Expansion(None, (), tuple(cells))


def _sources(strategy: SeqPos, seq_len: int) -> dict[int, int] | None:
    """For each position of the target where the source's value is taken; None is the same."""
    if not isinstance(strategy, Custom | CustomConstant) or strategy.source is None:
        return None
    return source_at(strategy.positions, strategy.source, seq_len)


def _placed(strategy: PlacedSeqPos, prompts: PromptBatch | None) -> Expansion:
    if prompts is None:
        raise PositionError(
            f"{shown(strategy)} places its cells by the prompts: pass them, as a PromptPairs or as "
            "the tokens of a sweep"
        )
    cells = checked_cells(strategy, strategy.place(prompts), prompts)
    if isinstance(strategy, Custom):
        numbers = tuple(range(len(cells)))
        return Expansion("column", numbers, tuple(_cell(n, c) for n, c in enumerate(cells)))
    if strategy.one_by_one:
        names = tuple(cell.name for cell in cells)
        named = tuple(_cell(n, cell, cell.name) for n, cell in enumerate(cells))
        return Expansion("span", names, named)
    if isinstance(strategy, CustomConstant):
        # As the user has them: a column is one part of the prompts, wherever it stands in each.
        seq_len = prompts.seq_len
        rows = (_counted(strategy.positions, seq_len), _counted(strategy.source, seq_len))
        return Expansion(None, (), (CellPositions(None, rows[0] or (), rows[1]),))
    return Expansion(None, (), (_cell(None, cells[0]),))


def _counted(rows: Any, seq_len: int) -> PromptGroups | None:
    """The same positions of each prompt, counted from the start, in their order."""
    if rows is None:
        return None
    return tuple(tuple(position % seq_len for position in row) for row in rows)


def _cell(label: int | None, cell: PlacedCell, name: str | None = None) -> CellPositions:
    return CellPositions(label, cell.positions, cell.source, name)


def checked_cells(
    strategy: PlacedSeqPos, placed: Any, prompts: PromptBatch
) -> tuple[PlacedCell, ...]:
    """Hold what a strategy gave for prompts to the laws of a strategy.

    Raises:
        PositionError: it broke one.
    """
    cells = tuple(placed) if isinstance(placed, Iterable) else (placed,)
    told = shown(strategy)
    if not cells or not all(isinstance(cell, PlacedCell) for cell in cells):
        raise PositionError(f"{told} must place at least one PlacedCell, got {shown(placed)}")
    names = [cell.name for cell in cells]
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            raise PositionError(f"{told} must give each cell a name of its own, got {shown(name)}")
    if len(cells) > 1 and not strategy.one_by_one:
        raise PositionError(f"{told} gives {len(cells)} cells that would share a place")
    for cell in cells:
        check_cell(told, cell, prompts)
    return cells


def check_cell(told: str, cell: PlacedCell, prompts: PromptBatch) -> None:
    """Raise `PositionError` unless a cell's positions are tokens of the prompts.

    Args:
        told: the words for whoever gave it.
        cell: the cell.
        prompts: the prompts.
    """
    if cell.source is not None and prompts.source is None:
        raise PositionError(NO_SOURCE)
    sides = [(cell.positions, prompts.target, "")]
    if prompts.source is not None:
        taken = cell.positions if cell.source is None else cell.source
        sides.append((taken, prompts.source, " of the source"))
    for groups, batch, side in sides:
        real = batch.mask.bool().cpu().numpy()
        if len(groups) != len(prompts):
            raise PositionError(
                f"{told} has positions of {len(groups)} prompts{side}, and there are {len(prompts)}"
            )
        for prompt, group in enumerate(groups):
            for number in group:
                position = strict_int(number, f"a position of {told}", PositionError)
                if not 0 <= position < prompts.seq_len:
                    raise PositionError(
                        f"{told} gives position {position}{side} for prompt {prompt} of "
                        f"{prompts.seq_len} tokens"
                    )
                if not real[prompt, position]:
                    raise prompts.padding_error(prompt, position, batch, f"{told}{side}")
    for prompt, group in enumerate(cell.positions):
        if not group or list(group) != sorted(set(group)):
            raise PositionError(
                f"{told} gives the positions {list(group)} for prompt {prompt}; they must be "
                "ascending, without duplicates, and at least one"
            )
        if cell.source is not None and len(cell.source[prompt]) != len(group):
            raise PositionError(
                f"{told} has {len(group)} positions of prompt {prompt} and "
                f"{len(cell.source[prompt])} of its source: there must be as many"
            )


def present_in(prompts: PromptBatch, group: Group, sources: Group | None = None) -> Positions:
    """The same positions in all prompts, without those where a prompt or its source has padding.

    Args:
        prompts: the prompts.
        group: the positions.
        sources: for each of them where its value is taken; None is the same.

    Raises:
        PositionError: there is no source run.
    """
    if prompts.source is None:
        raise PositionError(NO_SOURCE)
    taken = group if sources is None else sources
    target, source = (each.mask.bool().tolist() for each in (prompts.target, prompts.source))
    pairs = [
        [(to, of) for to, of in zip(group, taken, strict=True) if here[to] and there[of]]
        for here, there in zip(target, source, strict=True)
    ]
    return Positions.of(
        [tuple(to for to, _ in row) for row in pairs], [tuple(of for _, of in row) for row in pairs]
    )


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
