"""A sheet as a matplotlib figure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import matplotlib as mpl

from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.figure import Picture
from nnpatch_core.results.pictures.fonts import Letters
from nnpatch_core.results.pictures.layout import in_lines
from nnpatch_core.results.pictures.lines import legend_of
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.sheet import Sheet
from nnpatch_core.results.pictures.static_charts import draw_bars, draw_lines
from nnpatch_core.results.pictures.static_heatmap import draw_heatmap

_DOTS = 100
#: Letters of the words beside a scale that an inch has room for.
_LETTERS_AN_INCH = 11.5
#: Inches: a letter of a slanted label upwards, and the room for titles above and below a panel.
_LETTER, _TITLES = 0.058, 0.75
#: Inches: the width of a colour bar.
_BAR = 0.2
_DRAW: dict[str, Callable[..., Any]] = {
    "heatmap": draw_heatmap,
    "lines": draw_lines,
    "bars": draw_bars,
}


def draw_static(sheet: Sheet) -> Any:
    """Draw a sheet as a figure of its own."""
    sheet, letters = _lettered(sheet)
    layout, panels = sheet.layout, sheet.panels
    with mpl.rc_context({"font.family": list(letters.families)}):
        figure = Picture(figsize=(layout.width, _height(sheet)), dpi=_DOTS)
        figure.set_layout_engine("constrained")
        places = figure.subplots(
            layout.down,
            layout.across,
            squeeze=False,
            width_ratios=layout.weights(panels) if sheet.kind == "heatmap" else None,
        ).ravel()
        drawn = [
            _DRAW[sheet.kind](axis, sheet, number)
            for number, axis in enumerate(places[: len(panels)])
        ]
        for axis in places[len(panels) :]:
            axis.set_axis_off()
        if sheet.own:
            figure.suptitle(sheet.title, fontsize=10, wrap=True)
        else:
            figure.say("suptitle", sheet.title, 10)
        if sheet.note:
            figure.say("supxlabel", sheet.note, 8)
        if sheet.kind == "heatmap":
            for number in range(len(sheet.scales)):
                own = [place for place, each in enumerate(panels) if each.scale == number]
                bars = list(places) if len(sheet.scales) == 1 else [places[place] for place in own]
                _colour_bar(figure, sheet, drawn[own[0]], bars, number)
        elif sheet.kind == "lines" and legend_of(panels).entries:
            _legend(figure.legend, sheet, loc="outside right center")
    return figure


def draw_into(sheet: Sheet, axis: Any) -> Any:
    """Draw a sheet of one panel into axes of the user's own, and give their figure."""
    sheet, letters = _lettered(sheet)
    figure = axis.figure
    extent, dots = axis.get_window_extent(), _dots(figure)
    width, height = extent.width / dots, extent.height / dots
    (panel,) = sheet.panels
    column = max(width / len(panel.across), 1e-3)
    layout = attrs.evolve(sheet.layout, width=width, height=max(height, 0.1), column=column)
    sheet = attrs.evolve(sheet, layout=layout)
    with mpl.rc_context({"font.family": list(letters.families)}):
        drawn = _DRAW[sheet.kind](axis, sheet, 0)
        if sheet.own or not panel.name:
            axis.set_title(sheet.title, fontsize=10).set_parse_math(sheet.own)
        if sheet.kind == "heatmap":
            _colour_bar(figure, sheet, drawn, [axis], 0)
        elif sheet.kind == "lines" and legend_of(sheet.panels).entries:
            _legend(axis.legend, sheet, loc="best")
        if sheet.note:
            # Below the panel, in the place of its title, so that it moves with the labels.
            lines = textwrap.wrap(sheet.note, max(20, int(width * 16)))
            text = "\n".join([axis.get_xlabel(), *lines])
            axis.set_xlabel(text, fontsize=8).set_parse_math(False)
    return figure.figure


def _dots(figure: Any) -> float:
    """The dots of an inch, of a figure or of a part of one."""
    return float(figure.figure.dpi)


def _lettered(sheet: Sheet) -> tuple[Sheet, Letters]:
    """The sheet with texts that can be drawn, and the fonts that draw them."""
    texts = [sheet.title, sheet.note, *(each.legend for each in sheet.scales)]
    for each in sheet.panels:
        texts += [each.name, *each.up, *each.across]
    letters = Letters.of(texts)
    if not letters.lacking:
        return sheet, letters

    def lettered(panel: Panel) -> Panel:
        return attrs.evolve(
            panel,
            name=letters.shown(panel.name),
            up=tuple(map(letters.shown, panel.up)),
            across=tuple(map(letters.shown, panel.across)),
        )

    title, note = letters.shown(sheet.title), letters.shown(sheet.note)
    panels = [lettered(each) for each in sheet.panels]
    return attrs.evolve(sheet, title=title, note=note, panels=panels), letters


def _height(sheet: Sheet) -> float:
    """The height of the picture in inches: panels, their labels, title and note."""
    if sheet.size is not None:
        return sheet.size[1]
    layout, note = sheet.layout, 0.15 * _lines(sheet.note, layout_width=sheet.layout.width)
    beside = _TITLES
    if sheet.kind == "heatmap":
        longest = max(len(short(label)) for each in sheet.panels for label in each.across)
        beside += _LETTER * longest
    return layout.down * (layout.height + beside) + note + 0.4


def _lines(text: str, *, layout_width: float) -> int:
    return len(textwrap.wrap(text, max(20, int(layout_width * 15))))


def _colour_bar(figure: Any, sheet: Sheet, image: Any, axes: Sequence[Any], number: int) -> None:
    layout = sheet.layout
    alone = len(sheet.scales) == 1
    rows = layout.down if alone else max(1, round(len(axes) / layout.across))
    high = rows * layout.height
    words = in_lines(sheet.scales[number].legend, max(14, int(high * _LETTERS_AN_INCH)))
    # The bar has a share of the width of its panels, which labels make less yet.
    places = [axis.get_position() for axis in axes]
    share = max(place.x1 for place in places) - min(place.x0 for place in places)
    wide = share * figure.bbox.width / _dots(figure)
    bar = figure.colorbar(
        image, ax=list(axes), fraction=min(0.3, 1.6 * _BAR / wide), aspect=1.05 * high / _BAR
    )
    bar.set_label("\n".join(words), fontsize=9)
    bar.ax.yaxis.label.set_parse_math(False)
    bar.ax.tick_params(labelsize=8)


def _legend(make: Callable[..., Any], sheet: Sheet, loc: str) -> None:
    legend = legend_of(sheet.panels)
    made = make(
        handles=[
            mpl.lines.Line2D([], [], color=each.colour, marker=each.marker, markersize=4)
            for each in legend.entries
        ],
        labels=[short(each.label, 32) for each in legend.entries],
        loc=loc,
        fontsize=8,
        frameon=False,
    )
    for name in made.get_texts():
        name.set_parse_math(False)
