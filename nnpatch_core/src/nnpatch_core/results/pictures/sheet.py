"""A sheet: panels with all that stands around them, before any library draws them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from nnpatch_core.results.pictures.layout import Layout
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.request import PictureKind

#: The narrowest column and lowest line, in inches, in which a value can be read.
_WIDE, _HIGH = 0.36, 0.15
#: Unless the user asks, values are written where a picture has no more cells than these.
_FEW = 250


@attrs.frozen
class Colours:
    """A scale of colours, or of lengths, that panels share.

    Args:
        legend: the words beside it.
        limit: the value of the darkest colours; of lines and bars the end of the axis.
    """

    legend: str
    limit: float


@attrs.frozen(eq=False)
class Sheet:
    """Panels with all that stands around them.

    Args:
        kind: how the panels are drawn.
        panels: what is drawn.
        layout: their places.
        title: above them.
        own: whether the user wrote the title, who may have meant markup in it.
        note: below them; it names what was left out and washed out.
        scales: those of the panels.
        marked: for each panel the cells that are outlined, `(up, across)`.
        values: whether values are written in cells; None is where they fit.
        size: of the picture in inches, if the user has set it.
    """

    kind: PictureKind
    panels: Sequence[Panel]
    layout: Layout
    title: str
    own: bool
    note: str
    scales: Sequence[Colours]
    marked: Sequence[Sequence[tuple[int, int]]]
    values: bool | None = None
    size: tuple[float, float] | None = None

    def writes_values(self, column: float, row: float) -> bool:
        """Tell whether cells of so many inches have their values in them."""
        if self.values is not None:
            return self.values
        cells = sum(each.values.size for each in self.panels)
        return column >= _WIDE and row >= _HIGH and cells <= _FEW

    def own_limits(self) -> bool:
        """Tell whether panels have scales of their own."""
        return len(self.scales) > 1


def strongest(panels: Sequence[Panel], k: int) -> list[list[tuple[int, int]]]:
    """For each panel its cells among the `k` of largest absolute value, of all of its scale."""
    found: list[list[tuple[int, int]]] = [[] for _ in panels]
    for scale in {each.scale for each in panels}:
        cells = [
            (-abs(value), number, place)
            for number, each in enumerate(panels)
            if each.scale == scale
            for place, value in np.ndenumerate(each.values)
            if np.isfinite(value) and value
        ]
        for _, number, (up, across) in sorted(cells)[:k]:
            found[number].append((up, across))
    return found
