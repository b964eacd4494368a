"""One chart of lines or of bars of a plotly figure."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly, in_template
from nnpatch_core.results.pictures.colours import FAINT, GUIDE, INK, distinct, washed
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import in_lines, ticks
from nnpatch_core.results.pictures.lines import legend_of
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.scales import ends
from nnpatch_core.results.pictures.sheet import Sheet
from nnpatch_core.results.pictures.written import told, written

_GRID = "#eeeeee"
#: The place in a legend of what comes after the others.
_LAST = 2000
#: Letters of a bar's label that a phone has room for.
_LABEL = 24
#: Letters of the words beside an axis that an inch has room for.
_LETTERS_AN_INCH = 15
_SIGNS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond",
    "v": "triangle-down", "P": "cross", "X": "x", "*": "star",
}  # fmt: skip


def add_lines(figure: Any, sheet: Sheet, number: int, high: float) -> None:
    """Add the columns of a panel as lines over layers, with their bands."""
    plotly = extra("plotly.graph_objects", "plot")
    panel, place = sheet.panels[number], _place(sheet, number)
    legend = legend_of(sheet.panels)
    layers = list(panel.layers or ())
    alike = [each for each in sheet.panels if each.scale == panel.scale]
    limits = ends(alike, sheet.scales[panel.scale])
    before = {label for each in sheet.panels[:number] for label in each.across}
    grey_before = any(
        legend.find(label) is None for each in sheet.panels[:number] for label in each.across
    )
    for column, label in enumerate(panel.across):
        values, line = panel.values[:, column], legend.find(label)
        if not np.isfinite(values).any():
            continue
        shown = in_plotly(short(label))
        named = bool(legend.entries)
        if line is None:
            options: dict[str, Any] = {
                "line": {"color": FAINT, "width": 1},
                "mode": "lines",
                "legendrank": _LAST,
            }
            group, in_legend = "weaker", not grey_before
            grey_before = True
            text = legend.entries[-1].label
        else:
            options = {
                "line": {"color": line.colour, "width": 2},
                "mode": "lines+markers",
                "marker": {"symbol": _SIGNS[line.marker], "size": 6},
            }
            group, in_legend, text = label, label not in before, shown
            _add_band(figure, plotly, panel, column, line.colour, limits, place)
        figure.add_trace(
            plotly.Scatter(
                x=layers,
                y=values.tolist(),
                name=text,
                legendgroup=group,
                showlegend=named and in_legend,
                customdata=[told(panel, row, column) for row in range(len(layers))],
                hovertemplate=(
                    f"{in_template(short(label))}, layer %{{x}}<br>%{{customdata}}<extra></extra>"
                ),
                **options,
            ),
            **place,
        )
    for up, column in sheet.marked[number]:
        figure.add_trace(
            plotly.Scatter(
                x=[layers[up]], y=[float(panel.values[up, column])], mode="markers",
                marker={"symbol": "circle-open", "size": 13, "color": INK}, showlegend=False,
                hoverinfo="skip",
            ),
            **place,
        )  # fmt: skip
    _plain(figure)
    figure.update_xaxes(title_text="layer", title_standoff=6, matches=_first("x", number), **place)
    words = in_lines(sheet.scales[panel.scale].legend, max(14, int(high * _LETTERS_AN_INCH)))
    same = next(at for at, each in enumerate(sheet.panels) if each.scale == panel.scale)
    figure.update_yaxes(
        title_text="<br>".join(map(in_plotly, words)),
        title_font_size=12,
        range=list(limits),
        matches=None if same == number else f"y{same + 1 if same else ''}",
        **place,
    )


def add_bars(figure: Any, sheet: Sheet, number: int, high: float) -> None:
    """Add the lines of a panel as bars below each other, with error bars."""
    plotly = extra("plotly.graph_objects", "plot")
    panel, place = sheet.panels[number], _place(sheet, number)
    alike = [each for each in sheet.panels if each.scale == panel.scale]
    colours = sheet.scales[panel.scale]
    limits = ends(alike, colours)
    (colour,) = distinct(1)
    values = np.nan_to_num(panel.values[:, 0])
    places = list(range(len(values)))
    marked = {up for up, _ in sheet.marked[number]}
    error = None
    if panel.band is not None:
        low, high_end = np.clip(panel.band[..., 0], *limits)
        error = {
            "type": "data", "symmetric": False, "thickness": 1.2, "width": 3, "color": INK,
            "array": (high_end - values).clip(min=0).tolist(),
            "arrayminus": (values - low).clip(min=0).tolist(),
        }  # fmt: skip
    names = [in_plotly(label) for label in panel.up]
    shown = ticks(len(places), high / len(places))
    figure.add_trace(
        plotly.Bar(
            x=values.tolist(),
            y=places,
            orientation="h",
            marker={
                "color": [washed(colour) if each else colour for each in panel.unsure[:, 0]],
                "line": {
                    "color": INK, "width": [1.8 if place in marked else 0 for place in places],
                },
            },
            error_x=error,
            customdata=[f"{names[row]}<br>{told(panel, row, 0)}" for row in places],
            hovertemplate="%{customdata}<extra></extra>",
            showlegend=False,
        ),
        **place,
    )  # fmt: skip
    if sheet.values:
        for row, value in enumerate(panel.values[:, 0]):
            figure.add_annotation(
                x=1, xref="x domain", xanchor="left", y=row, showarrow=False,
                text=written(value, colours.limit), font_size=11, **place,
            )  # fmt: skip
    _plain(figure)
    figure.update_xaxes(
        title_text=in_plotly(colours.legend).replace("; ", ";<br>"),
        title_font_size=12,
        title_standoff=6,
        range=list(limits),
        zeroline=True,
        zerolinecolor=GUIDE,
        matches=_first("x", number) if len(sheet.scales) == 1 else None,
        **place,
    )
    figure.update_yaxes(
        tickvals=shown,
        ticktext=[in_plotly(short(panel.up[place], _LABEL)) for place in shown],
        tickfont_size=11,
        range=[len(values) - 0.4, -0.6],
        zeroline=False,
        showgrid=False,
        **place,
    )


def _add_band(
    figure: Any, plotly: Any, panel: Panel, column: int, colour: str, limits: Any, place: Any
) -> None:
    """The area between the ends of a line's band."""
    if panel.band is None or panel.layers is None:
        return
    low, high = np.clip(panel.band[..., column], *limits)
    known = np.flatnonzero(~np.isnan(low))
    # Areas of neighbours alone: between others nothing is known.
    for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1):
        if not len(run):
            continue
        layers = [panel.layers[row] for row in run]
        figure.add_trace(
            plotly.Scatter(
                x=layers + layers[::-1],
                y=[*high[run].tolist(), *low[run][::-1].tolist()],
                fill="toself",
                fillcolor=_clear(colour),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=panel.across[column],
            ),
            **place,
        )


def _clear(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.18)"


def _place(sheet: Sheet, number: int) -> dict[str, int]:
    row, column = sheet.layout.place(number)
    return {"row": row + 1, "col": column + 1}


def _first(letter: str, number: int) -> str | None:
    return letter if number else None


def _plain(figure: Any) -> None:
    figure.update_layout(plot_bgcolor="white")
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=GUIDE, zerolinewidth=1)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor=GUIDE, zerolinewidth=1)
