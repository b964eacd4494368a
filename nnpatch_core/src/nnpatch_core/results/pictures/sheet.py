"""A sheet: panels with all that stands around them, before any library draws them."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from nnpatch_core.results.neighbours import distinct_cells
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
    """For each panel its cells among the `k` strongest of its scale, as `Outcome.top` has them.

    Neighbouring layers with almost the same value are one fact, and its strongest cell is taken.
    """
    found: list[list[tuple[int, int]]] = [[] for _ in panels]
    for scale in {each.scale for each in panels} if k else ():
        cells = [
            (number, up, across)
            for number, each in enumerate(panels)
            if each.scale == scale
            for up, across in np.argwhere(np.isfinite(each.values) & (each.values != 0)).tolist()
        ]
        values = [float(panels[number].values[up, across]) for number, up, across in cells]
        layers = [_layer(panels[number], up) for number, up, _ in cells]
        # A row has a layer, or a layer and a head.
        others = [
            (number, panels[number].up[up].partition(".")[2], across)
            for number, up, across in cells
        ]
        for group in distinct_cells(values, layers, others, k):
            number, up, across = cells[group[0]]
            found[number].append((up, across))
    return found


def _layer(panel: Panel, up: int) -> int | None:
    return None if panel.layers is None else panel.layers[up]
