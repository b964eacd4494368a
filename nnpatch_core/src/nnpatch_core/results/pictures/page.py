"""A sheet as a plotly figure, which fits a desktop and a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly
from nnpatch_core.results.pictures.colours import DIVERGING, washed
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import Layout, in_lines, ticks
from nnpatch_core.results.pictures.lines import legend_of
from nnpatch_core.results.pictures.page_charts import add_bars, add_lines
from nnpatch_core.results.pictures.page_heatmap import PHONE_PANEL, add_heatmap, axis_name
from nnpatch_core.results.pictures.sheet import Sheet

#: Pixels of an inch, and the widest page that fits the window of a small laptop.
_INCH, _WIDEST = 82, 1160
#: Pixels: the least height of a panel, and the most of all together.
_LOWEST, _HIGHEST = 240, 4000
#: Pixels: a row of a heatmap, a bar, a chart of lines.
_ROW, _BAR, _CHART = 17, 26, 300
#: Pixels: lines of the title and of the note, the title of a panel, and that of an axis.
_TITLE, _NOTE, _NAME, _AXIS = 20, 16, 30, 34
#: Pixels: a letter of the title, of the note, of a slanted label downwards, of a scale's words.
_TITLE_LETTER, _NOTE_LETTER, _SLANTED, _WORD = 7.0, 6.2, 5.2, 6.6
#: Pixels: a row of a legend, and the values beside bars.
_ENTRY, _VALUES = 22, 60
#: Pixels: the colour bar with its words, and the narrowest page, a phone's.
_SCALE, _PHONE = 84, 390
#: Pixels: from one slanted label to the next.
_SLANTED_WIDE = 15
_ADD: dict[str, Callable[..., None]] = {
    "heatmap": add_heatmap,
    "lines": add_lines,
    "bars": add_bars,
}


def draw_page(sheet: Sheet) -> Any:
    """Draw a sheet.

    A page of one column of panels is as wide as its window, if a phone has room for their labels.
    Others have a width of their own, so that on a phone the page is moved sideways.
    """
    subplots = extra("plotly.subplots", "plot")
    layout, panels, size = sheet.layout, sheet.panels, sheet.size
    fits_phone = layout.across == 1 and not size and _labels_fit(sheet)
    wide = max(_PHONE, round(layout.width * _INCH))
    fixed = None if fits_phone else wide if size else min(wide, _WIDEST)
    title, note = _texts(sheet)
    named = _NAME if any(each.name for each in panels) else 22
    above = 14 + _TITLE * len(title) + _NOTE * len(note) + named
    below = _below(sheet)
    high = _height(sheet) if size is None else 0.0
    gap = below + named
    area = layout.down * high + (layout.down - 1) * gap
    if size is not None:
        area = max(size[1] * _INCH - above - below, 120.0 * layout.down)
    figure = subplots.make_subplots(
        rows=layout.down,
        cols=layout.across,
        subplot_titles=[in_plotly(each.name) for each in panels],
        column_widths=layout.weights(panels) if sheet.kind == "heatmap" else None,
        vertical_spacing=min(gap / area, 0.95 / max(layout.down - 1, 1)) if layout.down > 1 else 0,
        horizontal_spacing=_beside(layout, fixed),
    )
    for number in range(len(panels)):
        _ADD[sheet.kind](figure, sheet, number, area / layout.down / 100)
    figure.update_annotations(font_size=13)
    written = sheet.kind == "bars" and sheet.values
    figure.update_layout(
        title={
            "text": "<br>".join(title),
            "font": {"size": 14},
            "subtitle": {"text": "<br>".join(note), "font": {"size": 12}},
            "x": 0, "xanchor": "left", "xref": "container",
            "pad": {"l": 10, "t": 8 + _TITLE * (len(title) - 1)},
            "y": 1, "yanchor": "top", "yref": "container",
        },
        margin={"t": above, "b": below, "l": 50, "r": _VALUES if written else 20},
        height=round(area + above + below),
        width=fixed,
        autosize=fixed is None,
    )  # fmt: skip
    if sheet.kind == "heatmap":
        figure.update_layout(_colour_axes(figure, sheet, area / layout.down))
    if sheet.kind == "lines" and legend_of(panels).entries:
        figure.update_layout(
            legend={
                "orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom",
                "x": 0, "font": {"size": 11},
            }
        )  # fmt: skip
    return figure


def _texts(sheet: Sheet) -> tuple[list[str], list[str]]:
    """The lines of the title and of the note, none wider than a phone."""
    title = [sheet.title]
    if not sheet.own:
        title = [in_plotly(line) for line in _wrap(sheet.title, _TITLE_LETTER)]
    return title, [in_plotly(line) for line in _wrap(sheet.note, _NOTE_LETTER)]


def _wrap(text: str, letter: float) -> list[str]:
    return textwrap.wrap(text, int((_PHONE - 20) / letter), break_on_hyphens=False)


def _height(sheet: Sheet) -> float:
    """The height of a panel in pixels."""
    most = max(len(each.up) for each in sheet.panels)
    high = {"heatmap": _ROW * most, "lines": _CHART, "bars": _BAR * most}[sheet.kind]
    lowest = 60 if sheet.kind == "bars" else _LOWEST
    return max(lowest, min(high, _HIGHEST / sheet.layout.down))


def _below(sheet: Sheet) -> float:
    """Pixels below a panel: the labels of its columns and their title."""
    if sheet.kind == "lines":
        return 2 * _AXIS + _ENTRY * _entry_rows(sheet)
    if sheet.kind == "bars":
        return 2 * _AXIS
    longest = max(len(short(label)) for each in sheet.panels for label in each.across)
    return _AXIS + 12 + _SLANTED * longest


def _labels_fit(sheet: Sheet) -> bool:
    """Tell whether a phone has room for the labels of a heatmap's columns."""
    most = max(len(ticks(len(each.across), sheet.layout.column)) for each in sheet.panels)
    return sheet.kind != "heatmap" or most * _SLANTED_WIDE <= PHONE_PANEL


def _entry_rows(sheet: Sheet) -> int:
    """The rows of a legend on a phone, each of as many entries as there is room for."""
    rows, room = 0, 0.0
    for entry in legend_of(sheet.panels).entries:
        width = 50 + _NOTE_LETTER * len(short(entry.label))
        if width > room:
            rows, room = rows + 1, _PHONE - 80.0
        room -= width
    return rows


def _beside(layout: Layout, fixed: int | None) -> float | None:
    """The share of the width between panels that stand beside one another."""
    if layout.across == 1 or fixed is None:
        return None
    return min(70 / (fixed - 160), 0.9 / (layout.across - 1))


def _colour_axes(figure: Any, sheet: Sheet, high: float) -> dict[str, Any]:
    """The scales, each with its bar at the right of the panels that have it."""
    made: dict[str, Any] = {}
    rows: list[tuple[float, float]] = []
    for number, colours in enumerate(sheet.scales):
        own = [place for place, each in enumerate(sheet.panels) if each.scale == number]
        domains = [figure.layout[f"yaxis{'' if not place else place + 1}"].domain for place in own]
        low, top = min(each[0] for each in domains), max(each[1] for each in domains)
        # Bars of the same rows stand beside one another.
        taken = sum(low < end and top > begin for begin, end in rows)
        rows.append((low, top))
        pixels = high * (top - low) * sheet.layout.down
        words = in_lines(colours.legend, max(14, int(pixels / _WORD)))
        bar = {
            "title": {"text": "<br>".join(map(in_plotly, words)), "side": "right"},
            "thickness": 14,
            "tickfont": {"size": 11},
            "x": 1.0 + taken * _SCALE / _across(sheet),
            "xpad": 8,
            "y": (low + top) / 2,
            "len": top - low,
            "ypad": 0,
        }
        bar["title"]["font"] = {"size": 12}
        scale = {"cmin": -colours.limit, "cmid": 0, "cmax": colours.limit}
        made[axis_name(number)] = {**scale, "colorscale": _stops(DIVERGING), "colorbar": bar}
        pale = _stops([washed(colour) for colour in DIVERGING])
        if any(each.unsure.any() for each in sheet.panels if each.scale == number):
            made[axis_name(number, washed=True)] = {
                **scale, "colorscale": pale, "showscale": False,
            }  # fmt: skip
    return made


def _across(sheet: Sheet) -> float:
    """Pixels of all panels beside one another, about."""
    wide = sheet.layout.width * _INCH
    return max((wide if sheet.size else min(wide, _WIDEST)) - 160, 200)


def _stops(colours: Sequence[str]) -> list[list[Any]]:
    return [[number / (len(colours) - 1), colour] for number, colour in enumerate(colours)]
