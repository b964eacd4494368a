"""The layout of a picture: the places of its panels, and the lines that have room for a label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from nnpatch_core.results.pictures.panels import Panel

#: Inches: the widest picture, a column where there is room, and the least where there is not.
_WIDEST, _COLUMN, _LEAST_COLUMN = 16.0, 0.42, 0.15
#: Inches: a label of a column or row, and what is beside a panel and beside them all.
_LABEL, _BESIDE, _BAR = 0.15, 1.1, 1.0
#: Inches: a row, the lowest panel and the highest picture.
_ROW, _LOWEST, _HIGHEST = 0.2, 3.0, 32.0


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


def are_wide(panels: Sequence[Panel]) -> bool:
    """Tell whether panels beside one another, with columns of full width, are too wide."""
    return _width(panels, len(panels), _COLUMN) > _WIDEST


def lay_out(panels: Sequence[Panel]) -> Layout:
    """Place panels beside one another, and below where there is no room."""
    highest = max(len(each.up) for each in panels)
    for down in range(1, len(panels) + 1):
        across = math.ceil(len(panels) / down)
        column = _COLUMN
        if _width(panels, across, _COLUMN) > _WIDEST:
            column = _LEAST_COLUMN
        if _width(panels, across, column) <= _WIDEST:
            break
    down = math.ceil(len(panels) / across)
    width = min(_width(panels, across, _COLUMN), _WIDEST)
    height = min(max(_LOWEST, _ROW * highest), max(_LOWEST, _HIGHEST / down))
    columns = max(len(each.across) for each in panels)
    if down == 1:
        columns = sum(len(each.across) for each in panels)
    room = width - _BAR - across * _BESIDE
    return Layout(down, across, width, height, min(_COLUMN, room / columns))


def ticks(count: int, inches: float) -> list[int]:
    """The columns or rows, each so many inches, that have room for a label; the last has one."""
    step = max(1, math.ceil(_LABEL / inches))
    return list(range((count - 1) % step, count, step))


def _width(panels: Sequence[Panel], across: int, column: float) -> float:
    """Inches that panels take, so many of them beside each other."""
    widths = [max(1.6, column * len(each.across)) + _BESIDE for each in panels]
    if across == len(panels):
        return sum(widths) + _BAR
    return across * max(widths) + _BAR
