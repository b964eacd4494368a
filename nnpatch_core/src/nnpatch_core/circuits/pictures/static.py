"""A circuit's graph in matplotlib."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path

from nnpatch_core.circuits.pictures import colours
from nnpatch_core.circuits.pictures.drawing import (
    HIGH,
    LABELS,
    PORT_WIDE,
    PORTS,
    Curve,
    Drawing,
    Placed,
    Point,
    width_of,
)
from nnpatch_core.circuits.pictures.legend import key_of
from nnpatch_core.results import letters_of, new_picture

#: Inches: the title, a line of the note, and the key.
_TITLE, _LINE, _KEY = 0.42, 0.17, 0.3
#: Inches: the least width, a sample edge of the key, and the corners of a node.
_NARROWEST, _SAMPLE, _ROUND = 6.0, 0.28, 0.03
#: Letters that an inch has room for: of the note, of the title.
_LETTERS, _TITLE_LETTERS = 14.0, 8.7
#: Points: letters of nodes, of ports, of words and of the title, and the smallest.
_NODE, _PORT, _WORDS, _HEAD, _SMALLEST = 8.0, 6.5, 8.0, 11.0, 1.0
_READ = "Edges lead upwards; q, k, v: into a head's query, key, value."
_SHARED = "A frame: heads that share a key and a value (kv)."
_DASHES = (0, (3.0, 1.5))


def draw(drawing: Drawing, size: tuple[float, float] | None) -> Any:
    """Draw it; a size of the user's own scales all of it.

    Args:
        drawing: of the edges.
        size: in inches.
    """
    shown = drawing.shown
    wide = max(drawing.width, _NARROWEST)
    words = [*shown.notes, _READ, *([_SHARED] if drawing.frames else [])]
    note = textwrap.wrap(" ".join(words), int(wide * _LETTERS))
    letters = letters_of([shown.title])
    title = textwrap.wrap(letters.shown(shown.title), int(wide * _TITLE_LETTERS))
    below = _KEY + _LINE * len(note) + 0.1
    high = drawing.height + below + _TITLE + _LINE * max(0, len(title) - 1)
    scale = 1.0 if size is None else min(size[0] / wide, size[1] / high)
    figure = new_picture(*((wide, high) if size is None else size))
    figure.set_layout_engine("none")
    # One unit is an inch of the drawing, which stands in the middle of the figure.
    across, up = (wide, high) if size is None else (size[0] / scale, size[1] / scale)
    middle, low = drawing.width / 2, -below - (up - high) / 2
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(middle - across / 2, middle + across / 2)
    axis.set_ylim(low, low + up)
    pen = _Pen(axis, scale)
    for band in drawing.bands:
        pen.box(0, band.low, drawing.width, band.high - band.low, 0, colours.BAND, None)
        pen.text(LABELS / 2, (band.low + band.high) / 2, band.label, _WORDS, color=colours.QUIET)
    for left, foot, right, head in drawing.frames:
        pen.box(left, foot, right - left, head - foot, 1, colours.PAPER, colours.FRAME)
    for curve in drawing.curves:
        pen.edge(curve, shown.scored, bool(shown.mixed and curve.link.estimate))
    for placed, box in drawing.nodes:
        _node(pen, placed, box)
    top = drawing.height + _TITLE + _LINE * max(0, len(title) - 1)
    pen.text(middle, top - 0.08, "\n".join(title), _HEAD, va="top", family=letters.families)
    _key(pen, drawing, middle, -0.14)
    for number, line in enumerate(note):
        pen.text(middle, -_KEY - _LINE * (number + 0.5), line, _WORDS, color=colours.QUIET)
    return figure


class _Pen:
    """Draws into axes at a scale."""

    def __init__(self, axis: Any, scale: float) -> None:
        self._axis, self._scale = axis, scale

    def text(self, x: float, y: float, words: str, points: float, **how: Any) -> None:
        options = {"ha": "center", "va": "center", "color": colours.INK, "zorder": 5, **how}
        size = max(_SMALLEST, points * self._scale)
        self._axis.text(x, y, words, fontsize=size, **options).set_parse_math(False)

    def box(
        self, x: float, y: float, wide: float, high: float, order: int, fill: str, line: str | None
    ) -> None:
        self._axis.add_patch(
            Rectangle(
                (x, y),
                wide,
                high,
                zorder=order,
                facecolor=fill,
                edgecolor=line or "none",
                linewidth=0.6 * self._scale,
            )
        )

    def node(self, x: float, y: float, wide: float, high: float) -> None:
        self._axis.add_patch(
            FancyBboxPatch(
                (x + _ROUND, y + _ROUND),
                wide - 2 * _ROUND,
                high - 2 * _ROUND,
                boxstyle=f"round,pad={_ROUND},rounding_size=0.05",
                facecolor=colours.PAPER,
                edgecolor=colours.EDGE,
                linewidth=0.9 * self._scale,
                zorder=4,
            )
        )

    def edge(self, curve: Curve, scored: bool, dashed: bool) -> None:
        points: list[Point] = []
        codes: list[Any] = []
        for number, piece in enumerate(curve.pieces()):
            points += piece
            codes += [Path.LINETO if number else Path.MOVETO, *[Path.CURVE4] * 3]
        self._axis.add_patch(
            PathPatch(
                Path(points, codes),
                facecolor="none",
                edgecolor=_colour(curve.link.score, scored),
                linewidth=curve.width * self._scale,
                alpha=0.75,
                capstyle="butt",
                linestyle=_DASHES if dashed else "solid",
                zorder=2,
            )
        )

    def sample(self, x: float, y: float, points: float, colour: str, dashed: bool) -> None:
        self._axis.add_line(
            Line2D(
                [x, x + _SAMPLE],
                [y, y],
                color=colour,
                linewidth=points * self._scale,
                linestyle=_DASHES if dashed else "solid",
                solid_capstyle="butt",
                alpha=0.75,
            )
        )


def _colour(score: float, scored: bool) -> str:
    if not scored or math.isnan(score):
        return colours.PLAIN
    return colours.NEGATIVE if score < 0 else colours.POSITIVE


def _node(pen: _Pen, placed: Placed, box: float) -> None:
    cell = placed.cell
    left, low, wide = placed.x - cell.width / 2 + 0.02, placed.y - HIGH / 2, cell.width - 0.04
    if cell.shared:
        pen.box(left, low, wide, HIGH, 4, colours.PAPER, colours.FRAME)
    else:
        pen.node(left, low, wide, HIGH)
    ink = colours.QUIET if cell.shared else colours.INK
    pen.text(placed.x, placed.y, cell.label, _NODE, color=ink)
    for letter in cell.ports:
        if letter:
            x, y = placed.port(box, letter)
            corner = x - PORT_WIDE / 2, y - PORTS / 2 + 0.02
            pen.box(*corner, PORT_WIDE, PORTS - 0.02, 3, colours.PAPER, colours.EDGE)
            pen.text(x, y, letter, _PORT)


def _key(pen: _Pen, drawing: Drawing, x: float, y: float) -> None:
    """Samples of widths and colours, with what they mean, beside one another."""
    shown = drawing.shown
    entries = key_of(shown)
    widths = [_SAMPLE + 0.28 + len(entry.words) / _LETTERS for entry in entries]
    place = x - sum(widths) / 2
    for entry, width in zip(entries, widths, strict=True):
        colour = _colour(entry.score, shown.scored)
        pen.sample(place, y, width_of(entry.score, shown), colour, entry.dashed)
        pen.text(place + _SAMPLE + 0.06, y, entry.words, _WORDS, ha="left")
        place += width
