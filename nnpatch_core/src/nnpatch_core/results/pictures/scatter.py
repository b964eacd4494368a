"""Points over a diagonal, as a matplotlib or an interactive plotly figure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.colours import GUIDE, distinct

#: The least distance of two labels, as a share of the picture's height.
_GAP = 0.06
#: The height of plotly's plotting area, in pixels.
_HEIGHT = 460
#: As many letters of the title has a phone room for.
_TITLE = 54
#: From so many points on, plotly draws by WebGL: one element of the page a point is too slow.
_MANY = 5000


@attrs.frozen(eq=False)
class Points:
    """Points of one colour: `x` and `y` `[points]`, and what each is called."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    texts: tuple[str, ...]


def scatter(
    groups: Sequence[Points],
    marked: Points,
    *,
    title: str,
    x_title: str,
    y_title: str,
    interactive: bool,
) -> Any:
    """Points over a diagonal, those of `marked` with their texts; see `Agreement.plot`.

    Raises:
        OutcomeError: no points.
    """
    if not any(len(group.texts) for group in groups):
        raise OutcomeError("there are no cells to draw")
    draw = _plotly if interactive else _matplotlib
    return draw(groups, marked, title, x_title, y_title)


def _matplotlib(
    groups: Sequence[Points], marked: Points, title: str, x_title: str, y_title: str
) -> Any:
    extra("matplotlib.figure", "plot")
    from nnpatch_core.results.pictures.figure import Picture

    figure = Picture(figsize=(8.0, 5.6))
    figure.set_layout_engine("constrained")
    axis = figure.subplots()
    x_range, y_range = _ranges(groups)
    axis.set_xlim(x_range)
    axis.set_ylim(y_range)
    axis.axhline(0, color=GUIDE, linewidth=0.5, zorder=0)
    axis.axvline(0, color=GUIDE, linewidth=0.5, zorder=0)
    axis.axline((0, 0), slope=1, color=GUIDE, linewidth=0.8, linestyle="--", zorder=0)
    for group, colour in zip(groups, distinct(len(groups)), strict=True):
        axis.scatter(group.x, group.y, s=16, c=colour, alpha=0.7, linewidths=0, label=group.name)
    # The labels stand in a column of their own, so that they cover neither points nor each other;
    # lines end at their left edge.
    line = {"arrowstyle": "-", "color": GUIDE, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
    for x, y, text, height in zip(
        marked.x, marked.y, marked.texts, _heights(marked.y, y_range), strict=True
    ):
        note = axis.annotate(
            text,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops=line,
        )
        note.set_parse_math(False)  # a token may be a dollar sign
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)
    figure.suptitle(title, fontsize=10)
    legend = figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    for name in legend.get_texts():
        name.set_parse_math(False)
    return figure


def _plotly(
    groups: Sequence[Points], marked: Points, title: str, x_title: str, y_title: str
) -> Any:
    plotly = extra("plotly.graph_objects", "plot")
    x_range, y_range = _ranges(groups)
    many = sum(len(group.texts) for group in groups) > _MANY
    trace = plotly.Scattergl if many else plotly.Scatter
    figure = plotly.Figure()
    for group, colour in zip(groups, distinct(len(groups)), strict=True):
        figure.add_trace(
            trace(
                x=group.x.tolist(),
                y=group.y.tolist(),
                text=[in_plotly(text) for text in group.texts],
                name=in_plotly(group.name),
                mode="markers",
                marker={"color": colour, "size": 7, "opacity": 0.7},
                hovertemplate="%{text}<br>exact %{x:.3g}, estimate %{y:.3g}<extra></extra>",
            )
        )
    low, high = min(x_range[0], y_range[0]), max(x_range[1], y_range[1])
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, layer="below",
        line={"color": GUIDE, "width": 1, "dash": "dash"},
    )  # fmt: skip
    middle = sum(x_range) / 2
    heights = _heights(marked.y, y_range)
    for x, y, text, height in zip(marked.x, marked.y, marked.texts, heights, strict=True):
        inward = 1 if x < middle else -1
        figure.add_annotation(
            x=float(x),
            y=float(y),
            text=in_plotly(text),
            ax=30 * inward,
            ay=-_HEIGHT * float(height - _share(y, y_range)),
            xanchor="left" if inward == 1 else "right",
            font={"size": 11},
            bgcolor="rgba(255, 255, 255, 0.7)",
            arrowcolor=GUIDE,
            arrowwidth=1,
            arrowhead=0,
            standoff=4,
        )
    figure.update_layout(
        title={"text": _wrapped(title), "font": {"size": 13}, "x": 0, "pad": {"l": 10}},
        plot_bgcolor="white",
        height=_HEIGHT + 140,
        margin={"t": 70, "b": 70},
        showlegend=True,
    )
    lines = {"gridcolor": "#eeeeee", "zerolinecolor": GUIDE, "zerolinewidth": 1}
    figure.update_xaxes(title_text=x_title, range=list(x_range), **lines)
    figure.update_yaxes(title_text=y_title, range=list(y_range), **lines)
    return figure


def _ranges(groups: Sequence[Points]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The limits of both axes: they hold all points and 0, with some room."""

    def around(values: list[NDArray[np.float64]]) -> tuple[float, float]:
        every = np.concatenate(values)
        low, high = float(every.min(initial=0.0)), float(every.max(initial=0.0))
        room = 0.05 * (high - low) or 1.0
        return low - room, high + room

    return around([group.x for group in groups]), around([group.y for group in groups])


def _wrapped(title: str) -> str:
    """A title in lines that a phone has room for; one with markup is left as it is."""
    return title if "<" in title else "<br>".join(textwrap.wrap(title, _TITLE))


def _share(value: Any, limits: tuple[float, float]) -> Any:
    """The place of a value between the limits, from 0 to 1."""
    return (value - limits[0]) / (limits[1] - limits[0])


def _heights(y: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    """The heights of the labels of points, from 0 to 1: in the points' order, with gaps."""
    gap = min(_GAP, 1 / max(len(y), 1))
    order = np.argsort(y, kind="stable")
    steps = gap * np.arange(len(y))
    # Each as high as its point; higher where the one below is in the way, lower below the top.
    wanted = np.maximum.accumulate(_share(y[order], limits) - steps)
    heights = np.empty(len(y))
    heights[order] = np.clip(wanted, 0, 1 - gap * max(len(y) - 1, 0)) + steps
    return heights
