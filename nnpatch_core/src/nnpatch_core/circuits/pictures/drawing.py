"""A picture before it is drawn: lengths in inches, y upwards, from the lower left corner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from nnpatch_core.circuits.pictures.arrange import arrange
from nnpatch_core.circuits.pictures.boxes import Box, Boxes, Cell, boxes_of
from nnpatch_core.circuits.pictures.shown import Link, Shown

if TYPE_CHECKING:
    from nnpatch_core.edges import Nodes

#: Inches: the height of a node, of the ports below it, and the width of one.
HIGH, PORTS, PORT_WIDE = 0.24, 0.15, 0.15
#: Inches: between two rows, at least and at most.
_GAP, _WIDEST_GAP = 0.26, 1.0
#: Inches: the labels of layers at the left, and the margin elsewhere.
LABELS, MARGIN = 0.75, 0.2
#: Points: the widest and the narrowest edge.
_WIDE, _NARROW = 5.0, 0.6

Point = tuple[float, float]


@attrs.frozen
class Curve:
    """An edge as it is drawn.

    Args:
        link: the edge.
        start: where it leaves its sender.
        bends: pairs of points, at the foot and the head of each row that it passes.
        end: where it enters its receiver.
        width: in points.
    """

    link: Link
    start: Point
    bends: tuple[tuple[Point, Point], ...]
    end: Point
    width: float

    def pieces(self) -> list[tuple[Point, Point, Point, Point]]:
        """Cubic curves that leave and enter straight up, from one row to the next.

        Between them it goes straight.
        """
        starts = [self.start, *(head for _, head in self.bends)]
        ends = [*(foot for foot, _ in self.bends), self.end]
        return [
            (one, (one[0], (one[1] + other[1]) / 2), (other[0], (one[1] + other[1]) / 2), other)
            for one, other in zip(starts, ends, strict=True)
        ]


@attrs.frozen
class Placed:
    """A node as it is drawn.

    Args:
        cell: the node.
        x, y: of its middle.
    """

    cell: Cell
    x: float
    y: float

    def port(self, box: float, letter: str) -> Point:
        """The middle of a port; `box` is the x of its box."""
        return box + self.cell.ports[letter], self.y - HIGH / 2 - PORTS / 2


@attrs.frozen
class Band:
    """A layer.

    Args:
        label: its name.
        low, high: where it begins and ends.
    """

    label: str
    low: float
    high: float


@attrs.frozen
class Drawing:
    """A picture before it is drawn.

    Args:
        width, height: of it.
        bands: the layers, upwards.
        frames: the left, lower, right and upper ends of groups of heads.
        nodes: the nodes, each with the x of its box.
        curves: the edges, weakest first.
        shown: the edges and the words.
    """

    width: float
    height: float
    bands: tuple[Band, ...]
    frames: tuple[tuple[float, float, float, float], ...]
    nodes: tuple[tuple[Placed, float], ...]
    curves: tuple[Curve, ...]
    shown: Shown


def drawing_of(nodes: Nodes, shown: Shown) -> Drawing:
    """Lay a picture out."""
    boxes = boxes_of(nodes, shown.links)
    found = arrange(boxes, shown.links)
    shift = LABELS + MARGIN - found.left
    feet = _feet(found.crowds)
    placed, frames = [], []
    for box, middle in zip(boxes.all, found.boxes, strict=True):
        x, y = middle + shift, feet[box.row] + PORTS + HIGH / 2
        placed += [(Placed(cell, x + cell.x, y), x) for cell in box.cells]
        if box.framed:
            side = box.width / 2
            frames.append((x - side, feet[box.row] - 0.02, x + side, y + HIGH / 2 + 0.05))
    curves = [
        _curve(link, boxes, [x + shift for x in route], feet, shown)
        for link, route in zip(shown.links, found.routes, strict=True)
    ]
    return Drawing(
        width=found.right + shift + MARGIN,
        height=feet[-1] + PORTS + HIGH + MARGIN,
        bands=_bands(boxes.all, feet),
        frames=tuple(frames),
        nodes=tuple(placed),
        curves=tuple(reversed(curves)),
        shown=shown,
    )


def width_of(score: float, shown: Shown) -> float:
    """The width of an edge in points: as its score is large."""
    if not shown.scored:
        return 1.2
    if math.isnan(score):
        return _NARROW
    return max(_NARROW, _WIDE * min(1.0, abs(score) / shown.largest))


def _feet(crowds: Sequence[tuple[int, float]]) -> list[float]:
    """The y of the foot of each row; where many edges go far, there is more room between rows."""
    feet = [MARGIN - PORTS]
    for count, far in crowds:
        gap = min(_WIDEST_GAP, _GAP + 0.004 * count + 0.05 * far)
        feet.append(feet[-1] + PORTS + HIGH + gap)
    return feet


def _curve(
    link: Link, boxes: Boxes, route: Sequence[float], feet: Sequence[float], shown: Shown
) -> Curve:
    first = boxes.all[boxes.starts[link.sender.name][0]].row
    letterless = link.receiver.head is None
    return Curve(
        link,
        (route[0], feet[first] + PORTS + HIGH),
        tuple(
            ((x, feet[row]), (x, feet[row] + PORTS + HIGH))
            for row, x in enumerate(route[1:-1], first + 1)
        ),
        (route[-1], feet[first + len(route) - 1] + PORTS * letterless),
        width_of(link.score, shown),
    )


def _bands(boxes: Sequence[Box], feet: Sequence[float]) -> tuple[Band, ...]:
    rows: dict[str, list[int]] = {}
    for box in boxes:
        if box.layer:
            rows.setdefault(box.layer, []).append(box.row)
    return tuple(
        Band(label, feet[min(own)] - 0.06, feet[max(own)] + PORTS + HIGH + 0.1)
        for label, own in rows.items()
    )
