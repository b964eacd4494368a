"""Pictures of circuits, from the arguments of `Circuit.plot` and `Circuit.page`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nnpatch_core._arguments import listed
from nnpatch_core._extras import extra
from nnpatch_core._files import check_file, reason, write_whole
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import named, shown
from nnpatch_core.circuits.pictures.drawing import Drawing, drawing_of
from nnpatch_core.circuits.pictures.page import page_of
from nnpatch_core.circuits.pictures.shown import shown_of
from nnpatch_core.errors import EdgeError

if TYPE_CHECKING:
    from nnpatch_core.circuits.circuit import Circuit

#: Inches: the widest and highest picture that is drawn to a size.
_LARGEST = 200.0


def draw_static(circuit: Circuit, *, path: Any, size: Any, edges: Any, title: Any) -> Any:
    """Draw by matplotlib; see `Circuit.plot`."""
    inches = _size(size)
    drawing = _drawing(circuit, edges, title)
    extra("matplotlib.figure", "plot")
    from nnpatch_core.circuits.pictures.static import draw

    target = None if path is None else check_file(path, EdgeError)
    figure = draw(drawing, inches)
    if target is not None:
        form = target.suffix.removeprefix(".").lower()
        known = figure.canvas.get_supported_filetypes()
        if form not in known:
            raise EdgeError(
                f"{named(path)} must end in one of {', '.join(sorted(known))}, to say which kind "
                "of picture it is"
            )
        try:
            write_whole(path, lambda part: figure.savefig(part, format=form), EdgeError)
        except (ValueError, RuntimeError) as cause:
            if isinstance(cause, EdgeError):
                raise
            raise EdgeError(f"{named(path)} could not be written: {reason(cause)}") from cause
    return figure


def draw_page(
    circuit: Circuit, *, path: str | os.PathLike[str] | None, edges: Any, title: Any
) -> str:
    """Draw as a page; see `Circuit.page`."""
    made = page_of(_drawing(circuit, edges, title), circuit.nodes, len(circuit))
    if path is not None:
        write_whole(path, lambda part: part.write_text(made, "utf-8", newline="\n"), EdgeError)
    return made


def _drawing(circuit: Circuit, edges: Any, title: Any) -> Drawing:
    most = strict_int(edges, "edges", EdgeError)
    if most < 1:
        raise EdgeError(f"edges must be at least 1, got {most}")
    if title is not None and not isinstance(title, str):
        raise EdgeError(f"title must be a text, got {shown(title)}")
    if not len(circuit):
        raise EdgeError(
            "there are no edges to draw; where the chosen ones lead nowhere, choose more of them, "
            "or keep them by Circuit.from_edges(..., pruned=False)"
        )
    return drawing_of(circuit.nodes, shown_of(circuit, most, title))


def _size(size: Any) -> tuple[float, float] | None:
    if size is None:
        return None
    sides = listed(size)
    if sides is None or isinstance(size, str) or len(sides) != 2 or not all(map(_is_side, sides)):
        raise EdgeError(
            f"size must be (width, height), each from 1 to {_LARGEST:.0f} inches, got {shown(size)}"
        )
    return float(sides[0]), float(sides[1])


def _is_side(side: Any) -> bool:
    is_number = isinstance(side, int | float) and not isinstance(side, bool)
    return is_number and 1 <= side <= _LARGEST
