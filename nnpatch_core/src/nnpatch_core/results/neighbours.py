"""Cells that say one thing: neighbouring layers with almost the same value."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

#: How far a value may be from that of the strongest cell beside it, as a share of that.
NEAR = 0.05


def by_strength(values: Sequence[float]) -> list[int]:
    """The numbers of values by size, nan before all others; of equal ones the first comes first.

    Examples:
        >>> by_strength([0.1, -0.9, float("nan"), 0.9])
        [2, 1, 3, 0]
    """
    sizes = [-math.inf if math.isnan(value) else -abs(value) for value in values]
    return sorted(
        range(len(values)), key=lambda number: (not math.isnan(values[number]), sizes[number])
    )


def distinct_cells(
    values: Sequence[float],
    layers: Sequence[int | None],
    others: Sequence[Hashable],
    count: int,
) -> list[list[int]]:
    """Groups of cells that say one thing, strongest first, of each the numbers of its cells.

    A group grows from the strongest cell that is in none yet, up and down from one swept layer to
    the next, as far as the next one's value is within 5 percent of that cell's.

    Args:
        values: of each cell.
        layers: of each cell; None is a cell by itself.
        others: what else tells a cell from others, as its site name, position and head.
        count: of groups, at most.

    Returns:
        The groups; of each the strongest cell comes first, then the others from the lowest layer
        up.

    Examples:
        >>> distinct_cells([0.2, 0.97, 1.0, 0.99], [0, 1, 2, 3], ["resid"] * 4, 2)
        [[2, 1, 3], [0]]
    """
    columns = _columns(layers, others)
    taken: set[int] = set()
    groups: list[list[int]] = []
    for strongest in by_strength(values):
        if len(groups) >= count:
            break
        if strongest in taken:
            continue
        taken.add(strongest)
        column, own = columns[strongest]
        below: list[int] = []
        above: list[int] = []
        for found, side in ((below, column[:own][::-1]), (above, column[own + 1 :])):
            for number in side:
                if number in taken or not _is_near(values[number], values[strongest]):
                    break
                taken.add(number)
                found.append(number)
        groups.append([strongest, *reversed(below), *above])
    return groups


def _columns(
    layers: Sequence[int | None], others: Sequence[Hashable]
) -> list[tuple[list[int], int]]:
    """For each cell those that differ from it in their layer alone, in order, and its place."""
    alike: dict[Hashable, list[int]] = {}
    for number, (layer, other) in enumerate(zip(layers, others, strict=True)):
        alike.setdefault((other,) if layer is not None else number, []).append(number)
    found: list[tuple[list[int], int]] = [([], 0)] * len(layers)
    for column in alike.values():
        column.sort(key=lambda number: layers[number] or 0)
        for place, number in enumerate(column):
            found[number] = column, place
    return found


def _is_near(value: float, strongest: float) -> bool:
    if math.isfinite(strongest):
        return abs(value - strongest) <= NEAR * abs(strongest)
    return value == strongest or (math.isnan(value) and math.isnan(strongest))
