"""Heatmaps, as a matplotlib or an interactive plotly figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import Layout, ticks
from nnpatch_core.results.pictures.panels import Panel

_COLOURS = "RdBu"
_NOT_SWEPT = "#dddddd"
_DOTS = 100


@attrs.frozen(eq=False)
class Sheet:
    """Panels with all that stands around them.

    Args:
        panels: the heatmaps.
        layout: their places.
        title: above them.
        own: whether the user wrote the title, who may have meant markup in it.
        note: below them; it names the lines that were left out.
        legend: of the colours.
        limit: the value of the darkest colours.
    """

    panels: Sequence[Panel]
    layout: Layout
    title: str
    own: bool
    note: str
    legend: str
    limit: float


def draw(sheet: Sheet, *, interactive: bool) -> Any:
    """Draw a sheet, by plotly if it is to be interactive and by matplotlib if not.

    Raises:
        OutcomeError: the library is not installed.
    """
    return (_plotly if interactive else _matplotlib)(sheet)


def _matplotlib(sheet: Sheet) -> Any:
    panels, layout = sheet.panels, sheet.layout
    colours = extra("matplotlib", "plot")
    extra("matplotlib.figure", "plot")
    from nnpatch_core.results.pictures.figure import Picture

    figure = Picture(figsize=(layout.width, layout.down * (layout.height + 1.1) + 0.5), dpi=_DOTS)
    figure.set_layout_engine("constrained")
    places = figure.subplots(
        layout.down, layout.across, squeeze=False, width_ratios=layout.weights(panels)
    ).ravel()
    colour_map = colours.colormaps[_COLOURS].with_extremes(bad=_NOT_SWEPT)
    image: Any = None
    for axis, each in zip(places, panels, strict=False):
        image = axis.imshow(
            each.values,
            cmap=colour_map,
            vmin=-sheet.limit,
            vmax=sheet.limit,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(each.name).set_parse_math(False)
        axis.set_xlabel(each.across_title)
        axis.set_ylabel(each.up_title)
        marked = ticks(len(each.across), layout.column)
        axis.set_xticks(
            marked,
            [short(each.across[tick]) for tick in marked],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
        )
        marked = ticks(len(each.up), layout.height / len(each.up))
        axis.set_yticks(marked, [each.up[tick] for tick in marked])
        axis.tick_params(labelsize=8, length=2)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # a token may be a dollar sign
    for axis in places[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(sheet.title, fontsize=10).set_parse_math(sheet.own)
    if sheet.note:
        figure.supxlabel(sheet.note, fontsize=8, wrap=True)
    # As wide as beside a low picture.
    aspect = max(20.0, 3.0 * layout.down * layout.height)
    figure.colorbar(image, ax=list(places), label=sheet.legend, fraction=0.05, aspect=aspect)
    return figure


def _plotly(sheet: Sheet) -> Any:
    panels, layout = sheet.panels, sheet.layout
    plotly, subplots = extra("plotly.graph_objects", "plot"), extra("plotly.subplots", "plot")
    high = min(max(420, 180 + 17 * max(len(each.up) for each in panels)), 3200 // layout.down)
    figure = subplots.make_subplots(
        rows=layout.down,
        cols=layout.across,
        subplot_titles=[in_plotly(each.name) for each in panels],
        column_widths=layout.weights(panels),
        vertical_spacing=min(150 / (layout.down * high), 1 / layout.down),
    )
    for number, each in enumerate(panels):
        place = {"row": number // layout.across + 1, "col": number % layout.across + 1}
        across = [in_plotly(label) for label in each.across]
        up = [in_plotly(label) for label in each.up]
        figure.add_trace(
            plotly.Heatmap(
                z=each.values.tolist(),
                customdata=[[f"{line}, {column}" for column in across] for line in up],
                coloraxis="coloraxis",
                hovertemplate=(
                    f"{in_plotly(each.name)}: {each.up_title}, {each.across_title} %{{customdata}}"
                    "<br>%{z:.3f}<extra></extra>"
                ),
            ),
            **place,
        )
        # Numbered, not named by the labels: a token that occurs twice is two columns.
        marked = ticks(len(across), layout.column)
        figure.update_xaxes(
            title_text=each.across_title,
            tickangle=-45,
            tickvals=marked,
            ticktext=[across[tick] for tick in marked],
            **place,
        )
        marked = ticks(len(up), high / _DOTS / len(up))
        figure.update_yaxes(
            title_text=each.up_title,
            title_standoff=4,
            tickfont_size=10,
            tickvals=marked,
            ticktext=[up[tick] for tick in marked],
            **place,
        )
    figure.update_layout(
        title={
            "text": sheet.title if sheet.own else in_plotly(sheet.title),
            "subtitle": {"text": sheet.note},
        },
        plot_bgcolor=_NOT_SWEPT,
        coloraxis={
            "colorscale": _COLOURS,
            "cmin": -sheet.limit,
            "cmid": 0,
            "cmax": sheet.limit,
            "colorbar": {"title": {"text": sheet.legend, "side": "right"}},
        },
        height=layout.down * high,
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure
