"""The layout of a picture: the places of its panels, and the lines that have room for a label."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import attrs

from nnpatch_core.results.pictures.panels import Panel

#: Inches: the widest picture, a column where there is room, and the least where there is not.
_WIDEST, _COLUMN, _LEAST_COLUMN = 16.0, 0.42, 0.15
#: Inches: a label of a column or row, and what is beside a panel and beside them all.
_LABEL, _BESIDE, _BAR = 0.15, 1.1, 1.0
#: Inches: a letter of such a label.
_LETTER = 0.09
#: Inches: a row, the lowest panel and the highest picture.
_ROW, _LOWEST, _HIGHEST = 0.2, 3.0, 32.0
#: Inches: a chart of lines, and the bars of a chart with the room for their labels.
_CHART, _CHART_HIGH, _BARS, _BAR_HIGH = 6.0, 3.4, 8.0, 0.26


@attrs.frozen
class Layout:
    """The places of panels; sizes in inches.

    Args:
        down: panels below one another.
        across: panels beside one another.
        width: of the picture.
        height: of a panel.
        column: the width of a panel's column.
    """

    down: int
    across: int
    width: float
    height: float
    column: float

    def weights(self, panels: Sequence[Panel]) -> list[float]:
        """The widths of the panels beside one another, each against the others."""
        if self.down > 1:
            return [1.0] * self.across
        return [max(1.6, self.column * len(each.across)) for each in panels]

    def place(self, number: int) -> tuple[int, int]:
        """The row and the column of a panel, from 0."""
        return divmod(number, self.across)

    def is_lowest(self, number: int, count: int) -> bool:
        """Tell whether no panel stands below this one of so many."""
        return number + self.across >= count


def are_wide(panels: Sequence[Panel]) -> bool:
    """Tell whether panels beside one another, with columns of full width, are too wide."""
    return _width(panels, len(panels), _COLUMN) > _WIDEST


def lay_out(
    panels: Sequence[Panel], columns: int | None = None, size: tuple[float, float] | None = None
) -> Layout:
    """Place heatmaps beside one another, and below where there is no room.

    Args:
        panels: the heatmaps.
        columns: how many belong beside one another, if there is room for them.
        size: of the picture in inches, if the user has set it.
    """
    highest = max(len(each.up) for each in panels)
    for across in _widths(len(panels), columns):
        column = _COLUMN
        if _width(panels, across, _COLUMN) > _WIDEST:
            column = _LEAST_COLUMN
        if _width(panels, across, column) <= _WIDEST:
            break
    down = math.ceil(len(panels) / across)
    width = min(_width(panels, across, _COLUMN), _WIDEST)
    height = min(max(_LOWEST, _ROW * highest), max(_LOWEST, _HIGHEST / down))
    if size is not None:
        width, height = size[0], max(0.5, (size[1] - 0.6) / down - 1.1)
    most = max(len(each.across) for each in panels)
    if down == 1:
        most = sum(len(each.across) for each in panels)
    room = max(width - _BAR - across * _BESIDE, 0.5)
    column = room / most
    return Layout(down, across, width, height, min(_COLUMN, column) if size is None else column)


def lay_out_charts(panels: Sequence[Panel], size: tuple[float, float] | None = None) -> Layout:
    """Place charts of lines, two beside one another."""
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    width, height = _CHART * across + 1.6, _CHART_HIGH
    if size is not None:
        width, height = size[0], max(0.5, (size[1] - 0.6) / down - 0.8)
    return Layout(down, across, width, height, _CHART)


def lay_out_bars(panels: Sequence[Panel], size: tuple[float, float] | None = None) -> Layout:
    """Place charts of bars below one another."""
    most = max(len(each.up) for each in panels)
    width, height = _BARS, min(0.6 + _BAR_HIGH * most, max(_LOWEST, _HIGHEST / len(panels)))
    if size is not None:
        width, height = size[0], max(0.5, (size[1] - 0.6) / len(panels) - 0.8)
    return Layout(len(panels), 1, width, height, width)


def ticks(count: int, inches: float) -> list[int]:
    """The columns or rows, each so many inches, that have room for a label; the last has one."""
    step = max(1, math.ceil(_LABEL / inches))
    return list(range((count - 1) % step, count, step))


def is_slanted(labels: Sequence[str], inches: float) -> bool:
    """Tell whether labels of columns are too long to stand beside one another, so many inches each.

    Numbers of heads are not, tokens are.
    """
    longest = max(map(len, labels))
    marked = ticks(len(labels), inches)
    apart = inches * (marked[1] - marked[0]) if len(marked) > 1 else inches
    return longest > 3 or longest * _LETTER > apart


def in_lines(words: str, letters: int) -> list[str]:
    """The words beside a scale in lines, where need be, what comes after a semicolon on its own.

    Examples:
        >>> in_lines("restored (0 target, 1 source); the largest is 0.2", 30)
        ['restored (0 target, 1 source);', 'the largest is 0.2']
    """
    if len(words) <= letters:
        return [words]
    parts = words.replace("; ", ";\n").split("\n")
    return [line for part in parts for line in textwrap.wrap(part, letters)]


def _widths(count: int, columns: int | None) -> list[int]:
    """How many panels may stand beside one another, the first that fits being taken."""
    if columns is not None:
        return [columns, 1]
    return list(dict.fromkeys(math.ceil(count / down) for down in range(1, count + 1)))


def _width(panels: Sequence[Panel], across: int, column: float) -> float:
    """Inches that panels take, so many of them beside each other."""
    widths = [max(1.6, column * len(each.across)) + _BESIDE for each in panels]
    if across == len(panels):
        return sum(widths) + _BAR
    return across * max(widths) + _BAR
