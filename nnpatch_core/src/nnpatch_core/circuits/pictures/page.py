"""A circuit's graph as one HTML file: a picture that a script of its own makes answer the mouse.

Nothing in it is loaded from elsewhere, and its policy forbids that. Texts are escaped; what the
script shows, it puts in as text.
"""

from __future__ import annotations

import html
import json
from importlib import resources
from typing import Any

from nnpatch_core.circuits.pictures import colours
from nnpatch_core.circuits.pictures.boxes import shared_name
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
from nnpatch_core.circuits.pictures.shown import Link
from nnpatch_core.edges import Nodes
from nnpatch_core.results import in_digits

#: Pixels of an inch and of a point.
_INCH, _POINT = 96.0, 96 / 72
#: So many edges does a page show before somebody moves its slider.
_FIRST = 60
#: Only what the page itself has may run, and nothing may be loaded.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_COLOURS = ("POSITIVE", "NEGATIVE", "PLAIN", "INK", "QUIET", "PAPER", "EDGE", "FRAME", "BAND")
_HELP = (
    "Layers go up. An edge leads from a node that writes to the residual stream to one that reads "
    "it; q, k and v are a head's query, key and value.",
    "Point at an edge for its value, or at a node for all of its edges. A click keeps them, "
    "another one or Esc lets go.",
)
_FRAMES = "A frame holds heads that share a key and a value (kv)."


def page_of(drawing: Drawing, nodes: Nodes, total: int) -> str:
    """The page.

    Args:
        drawing: of the edges that are drawn.
        nodes: of the model.
        total: how many edges the circuit has.
    """
    shown = drawing.shown
    title = html.escape(shown.title)
    helps = [*_HELP, *([_FRAMES] if drawing.frames else [])]
    style = _part("page.css")
    for name in _COLOURS:
        style = style.replace(name, getattr(colours, name))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>\n{style}</style>",
            "</head>",
            "<body>",
            "<header>",
            f"<h1>{title}</h1>",
            _key(drawing),
            *(f"<p>{html.escape(note)}</p>" for note in shown.notes),
            "</header>",
            "<main>",
            f'<div id="graph">{_picture(drawing)}</div>',
            f'<aside id="side">{"".join(f"<p>{html.escape(each)}</p>" for each in helps)}</aside>',
            "</main>",
            '<div id="tip" role="status" hidden></div>',
            f'<script type="application/json" id="data">{_data(drawing, nodes, total)}</script>',
            f"<script>\n{_part('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")


def _data(drawing: Drawing, nodes: Nodes, total: int) -> str:
    """The data of the script, without a letter that could end its element."""
    shown = drawing.shown
    reads, about = _groups(drawing, nodes)
    edges = [
        {
            "name": link.name,
            "from": link.sender.name,
            "into": _cell_of(link, nodes),
            "words": "" if link.score != link.score else in_digits(link.score),
            "size": "" if link.score != link.score else in_digits(abs(link.score)),
            "kind": {None: "", True: "estimate", False: "exact"}[link.estimate],
        }
        for link in shown.links
    ]
    written = json.dumps(
        {"edges": edges, "total": total, "mixed": shown.mixed, "reads": reads, "about": about}
    )
    return written.replace("<", "\\u003c").replace("&", "\\u0026")


def _groups(drawing: Drawing, nodes: Nodes) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Which nodes of the picture each head reads by, and what a shared key and value is."""
    reads: dict[str, list[str]] = {}
    about: dict[str, str] = {}
    for layer, (query, shared) in enumerate(zip(nodes.query, nodes.key_value, strict=True)):
        size = query // shared
        for head in range(query if size > 1 else 0):
            name, own = shared_name(layer, head // size), f"a{layer}.h{head}"
            reads[own] = [own, name]
            first = head - head % size
            about[name] = f"the key and the value of heads {first} to {first + size - 1}"
    drawn = {placed.cell.node for placed, _ in drawing.nodes}
    return (
        {name: each for name, each in reads.items() if name in drawn},
        {name: each for name, each in about.items() if name in drawn},
    )


def _cell_of(link: Link, nodes: Nodes) -> str:
    receiver = link.receiver
    if receiver.head is None:
        return receiver.name
    is_shared = nodes.query[receiver.layer] > nodes.key_value[receiver.layer]
    if receiver.kind != "q" and is_shared:
        return shared_name(receiver.layer, receiver.head)
    return f"a{receiver.layer}.h{receiver.head}"


def _key(drawing: Drawing) -> str:
    """The samples, and what can be set."""
    shown = drawing.shown
    parts = []
    for entry in key_of(shown):
        wide = _POINT * width_of(entry.score, shown)
        parts.append(
            f'<span><svg width="28" height="10" aria-hidden="true"><path d="M0 5H28" '
            f'class="{_classes(entry.score, entry.dashed)}" stroke-width="{wide:.2f}"/></svg>'
            f"{html.escape(entry.words)}</span>"
        )
    count = len(shown.links)
    if count > 1 and shown.scored:
        first = min(count, _FIRST)
        parts.append(
            f'<label>edges: <input id="count" type="range" min="1" max="{count}" value="{first}">'
            '<output id="told" for="count"></output></label>'
        )
    parts.append('<label><input id="fit" type="checkbox"> whole picture</label>')
    return f'<div class="key">{"".join(parts)}</div>'


def _picture(drawing: Drawing) -> str:
    wide, high = drawing.width * _INCH, drawing.height * _INCH
    draw = _Pencil(drawing)
    parts = [
        *(draw.band(number) for number in range(len(drawing.bands))),
        *(draw.frame(number) for number in range(len(drawing.frames))),
        *(draw.edge(curve) for curve in drawing.curves),
        *(draw.hit(curve) for curve in drawing.curves),
        *(draw.node(placed, box) for placed, box in drawing.nodes),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        f'viewBox="0 0 {wide:.0f} {high:.0f}" role="group" aria-label="graph of the circuit">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _classes(score: float, dashed: bool | None) -> str:
    sign = "" if score != score else " down" if score < 0 else " up"
    return f"edge{sign}{' estimate' if dashed else ''}"


class _Pencil:
    """Draws parts as SVG, in pixels, y downwards."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing
        self._order = {link.name: number for number, link in enumerate(drawing.shown.links)}

    def band(self, number: int) -> str:
        band = self._drawing.bands[number]
        low, high = self._y(band.low), self._y(band.high)
        wide = self._drawing.width * _INCH
        return (
            f'<rect class="band" x="0" y="{high:.1f}" width="{wide:.0f}" height="{low - high:.1f}"'
            f"/>{self._text(LABELS * _INCH / 2, (low + high) / 2, band.label, 'layer')}"
        )

    def frame(self, number: int) -> str:
        x0, y0, x1, y1 = self._drawing.frames[number]
        return self._rect(x0 * _INCH, self._y(y1), (x1 - x0) * _INCH, (y1 - y0) * _INCH, "frame")

    def edge(self, curve: Curve) -> str:
        dashed = self._drawing.shown.mixed and curve.link.estimate
        return (
            f'<path class="{_classes(curve.link.score, dashed)}" '
            f'data-edge="{self._order[curve.link.name]}" stroke-width="{curve.width * _POINT:.2f}" '
            f'd="{self._path(curve)}"/>'
        )

    def hit(self, curve: Curve) -> str:
        """The part of an edge that the mouse meets, wider than the edge."""
        words = curve.link.name
        if curve.link.score == curve.link.score:
            words += f": {in_digits(curve.link.score)}"
        return (
            f'<path class="hit" data-edge="{self._order[curve.link.name]}" '
            f'd="{self._path(curve)}"><title>{html.escape(words)}</title></path>'
        )

    def node(self, placed: Placed, box: float) -> str:
        cell = placed.cell
        wide, high = (cell.width - 0.04) * _INCH, HIGH * _INCH
        x, y = placed.x * _INCH, self._y(placed.y)
        parts = [self._rect(x - wide / 2, y - high / 2, wide, high, "", 0 if cell.shared else 5)]
        parts.append(self._text(x, y, cell.label))
        for letter in cell.ports:
            if letter:
                at, below = placed.port(box, letter)
                left, top = (at - PORT_WIDE / 2) * _INCH, self._y(below + PORTS / 2 - 0.02)
                parts.append(self._rect(left, top, PORT_WIDE * _INCH, (PORTS - 0.02) * _INCH, ""))
                parts.append(self._text(at * _INCH, self._y(below), letter, "letter"))
        name, kind = html.escape(cell.node), "node shared" if cell.shared else "node"
        return (
            f'<g class="{kind}" data-node="{name}" tabindex="0" role="button" '
            f'aria-label="{name}">{"".join(parts)}</g>'
        )

    def _y(self, up: float) -> float:
        return (self._drawing.height - up) * _INCH

    def _at(self, point: Point) -> str:
        return f"{point[0] * _INCH:.1f} {self._y(point[1]):.1f}"

    def _path(self, curve: Curve) -> str:
        parts = []
        for number, (start, *others) in enumerate(curve.pieces()):
            parts.append(f"{'L' if number else 'M'}{self._at(start)}")
            parts.append(f"C{' '.join(map(self._at, others))}")
        return "".join(parts)

    def _rect(
        self, x: float, y: float, wide: float, high: float, kind: str, round_: float = 0
    ) -> str:
        named = f' class="{kind}"' if kind else ""
        return (
            f'<rect{named} x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" '
            f'rx="{round_:g}"/>'
        )

    def _text(self, x: float, y: float, words: Any, kind: str = "") -> str:
        named = f' class="{kind}"' if kind else ""
        return f'<text{named} x="{x:.1f}" y="{y:.1f}">{html.escape(str(words))}</text>'
