"""One chart of lines or of bars in matplotlib axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from nnpatch_core.results.pictures.colours import FAINT, GUIDE, distinct, washed
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import in_lines, ticks
from nnpatch_core.results.pictures.lines import legend_of
from nnpatch_core.results.pictures.scales import ends
from nnpatch_core.results.pictures.sheet import Sheet
from nnpatch_core.results.pictures.written import written

_LABEL = 40
#: Letters of the words beside an axis that an inch has room for.
_LETTERS_AN_INCH = 11.5


def draw_lines(axis: Any, sheet: Sheet, number: int) -> None:
    """Draw the columns of a panel as lines over layers, with their bands."""
    panel = sheet.panels[number]
    colours = sheet.scales[panel.scale]
    legend = legend_of(sheet.panels)
    layers = np.array(panel.layers)
    alike = [each for each in sheet.panels if each.scale == panel.scale]
    axis.axhline(0, color=GUIDE, linewidth=0.8, zorder=0)
    for column, label in enumerate(panel.across):
        values, line = panel.values[:, column], legend.find(label)
        if line is None:
            axis.plot(layers, values, color=FAINT, linewidth=0.7, zorder=1)
            continue
        if panel.band is not None:
            low, high = np.clip(panel.band[..., column], *ends(alike, colours))
            axis.fill_between(layers, low, high, color=line.colour, alpha=0.18, linewidth=0)
        axis.plot(
            layers, values, color=line.colour, marker=line.marker, markersize=3.5, linewidth=1.3
        )
    for up, column in sheet.marked[number]:
        axis.plot(
            layers[up], panel.values[up, column], "o", markersize=9, fillstyle="none", color="black"
        )
    axis.set_ylim(ends(alike, colours))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer", fontsize=9)
    words = in_lines(colours.legend, max(14, int(sheet.layout.height * _LETTERS_AN_INCH)))
    axis.set_ylabel("\n".join(words), fontsize=9).set_parse_math(False)
    axis.set_title(panel.name, fontsize=11).set_parse_math(False)
    _plain(axis)


def draw_bars(axis: Any, sheet: Sheet, number: int) -> None:
    """Draw the lines of a panel as bars below each other, with error bars."""
    panel = sheet.panels[number]
    colours = sheet.scales[panel.scale]
    values, places = panel.values[:, 0], np.arange(len(panel.up))
    alike = [each for each in sheet.panels if each.scale == panel.scale]
    low_end, high_end = ends(alike, colours)
    (colour,) = distinct(1)
    shades = [washed(colour) if unsure else colour for unsure in panel.unsure[:, 0]]
    marked = {up for up, _ in sheet.marked[number]}
    edges = ["black" if place in marked else "none" for place in places]
    axis.barh(places, np.nan_to_num(values), color=shades, height=0.7, edgecolor=edges)
    axis.axvline(0, color=GUIDE, linewidth=0.8)
    if panel.band is not None:
        low, high = np.clip(panel.band[..., 0], low_end, high_end)
        known = ~np.isnan(low)
        around = np.stack([values - low, high - values])[:, known].clip(min=0)
        axis.errorbar(
            values[known], places[known], xerr=around, fmt="none", ecolor="black",
            elinewidth=0.9, capsize=2,
        )  # fmt: skip
    shown = ticks(len(panel.up), sheet.layout.height / len(panel.up))
    axis.set_yticks(shown, [short(panel.up[place], _LABEL) for place in shown])
    for label in axis.get_yticklabels():
        label.set_parse_math(False)
    axis.set_xlim(low_end, high_end)
    axis.set_ylim(len(places) - 0.4, -0.6)
    axis.set_xlabel(colours.legend, fontsize=9, wrap=True).set_parse_math(False)
    axis.set_title(panel.name, fontsize=11).set_parse_math(False)
    if sheet.values is not False:
        _write(axis, shown, values, colours.limit)
    _plain(axis)


def _write(axis: Any, places: Any, values: Any, limit: float) -> None:
    """The values in a column of their own, beyond the bars and their error bars."""
    for place in places:
        if np.isfinite(values[place]):
            axis.annotate(
                written(values[place], limit), (1.01, place), xycoords=("axes fraction", "data"),
                va="center", fontsize=8,
            )  # fmt: skip


def _plain(axis: Any) -> None:
    axis.tick_params(labelsize=8, length=2)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
