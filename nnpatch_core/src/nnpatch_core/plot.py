"""Pictures of an outcome: heatmaps, as a matplotlib or an interactive plotly figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._extras import extra
from nnpatch_core.errors import OutcomeError

if TYPE_CHECKING:
    from nnpatch_core.results import Outcome

_COLOURS = "RdBu"
_NOT_SWEPT = "#dddddd"
_TITLES = {"layer": "layer", "position": "token", "head": "head", "kv_head": "key/value head"}


@attrs.frozen(eq=False)
class Panel:
    """One heatmap: `values[row, column]`, nan where nothing was swept."""

    name: str
    values: NDArray[np.float64]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_title: str
    column_title: str


def heatmap(
    outcome: Outcome,
    *,
    sites: Sequence[str] | None = None,
    interactive: bool = False,
    title: str | None = None,
    limit: float | None = None,
) -> Any:
    """A heatmap of an outcome: layers up, tokens (or heads) across, one panel a site name.

    Colours are centred on 0 (white), with one scale for all panels; what was not swept is grey.
    A component with heads that was swept position by position has a row for each head.

    Args:
        outcome: what to draw.
        sites: site names to draw; None is all.
        interactive: a plotly figure, whose `write_html` gives a page, instead of a matplotlib one,
            whose `savefig` gives a PNG, SVG or PDF.
        title: by default model, kind and metric.
        limit: the value of the darkest colours; by default the largest absolute value.

    Returns:
        A `matplotlib.figure.Figure` or a `plotly.graph_objects.Figure`.

    Raises:
        OutcomeError: matplotlib or plotly is not installed, or a limit that is not positive.
        KeyError: a site name that was not swept.
    """
    drawn = [panel(outcome, name) for name in (outcome if sites is None else sites)]
    if not drawn:
        raise OutcomeError("sites is empty: there is nothing to draw")
    if limit is None:
        limit = max((float(np.nanmax(np.abs(each.values))) for each in drawn), default=0.0) or 1.0
    if not 0 < limit < float("inf"):
        raise OutcomeError(f"limit must be a positive number, got {limit}")
    if title is None:
        # A model that was loaded from a folder is named by its path.
        model = outcome.info["model"].rstrip("/").rpartition("/")[2]
        title = f"{model}: {outcome.kind}, {outcome.metric}"
    legend = "restored (0 target, 1 source)" if outcome.scale == "restored" else "change"
    draw = _plotly if interactive else _matplotlib
    return draw(drawn, title, legend, limit)


def panel(outcome: Outcome, name: str) -> Panel:
    """The heatmap of one site name, as numbers and labels."""
    axes = outcome.axes(name)
    swept = outcome.swept(name)
    values = np.where(swept.numpy(), outcome[name].double().numpy(), np.nan)
    labels = {axis.name: tuple(str(label) for label in axis.labels) for axis in axes}
    if "position" in labels:
        places = range(len(labels["position"]))
        labels["position"] = tuple(outcome.prompts.label(place, strip=True) for place in places)
    names = [axis.name for axis in axes]
    if len(names) == 1:
        return Panel(name, values[:, None], labels[names[0]], ("",), _title(names[0]), "")
    if len(names) == 2:
        rows, columns = names
        return Panel(name, values, labels[rows], labels[columns], _title(rows), _title(columns))
    layer, position, head = names
    n_layers, n_positions, n_heads = values.shape
    by_head = values.transpose(0, 2, 1).reshape(n_layers * n_heads, n_positions)
    rows_of_heads = tuple(f"{a}.{b}" for a in labels[layer] for b in labels[head])
    return Panel(
        name, by_head, rows_of_heads, labels[position], f"layer.{_title(head)}", _title(position)
    )


def _title(axis: str) -> str:
    return _TITLES.get(axis, "")


def _matplotlib(panels: Sequence[Panel], title: str, legend: str, limit: float) -> Any:
    figures, colours = extra("matplotlib.figure", "plot"), extra("matplotlib", "plot")
    widths = [max(1.6, 0.42 * len(each.columns)) for each in panels]
    height = min(max(3.0, 0.2 * max(len(each.rows) for each in panels)), 40.0)
    figure = figures.Figure(figsize=(sum(widths) + 1.1 * len(panels) + 1, height + 1.6))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    colour_map = colours.colormaps[_COLOURS].with_extremes(bad=_NOT_SWEPT)
    image = None
    for axis, each in zip(axes, panels, strict=True):
        image = axis.imshow(
            each.values,
            cmap=colour_map,
            vmin=-limit,
            vmax=limit,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(each.name)
        axis.set_xlabel(each.column_title)
        axis.set_ylabel(each.row_title)
        axis.set_xticks(range(len(each.columns)), each.columns, rotation=60, ha="right")
        step = -(-len(each.rows) // 60)
        axis.set_yticks(range(0, len(each.rows), step), each.rows[::step])
        axis.tick_params(labelsize=8, length=2)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=list(axes), label=legend, fraction=0.05)
    return figure


def _plotly(panels: Sequence[Panel], title: str, legend: str, limit: float) -> Any:
    plotly, subplots = extra("plotly.graph_objects", "plot"), extra("plotly.subplots", "plot")
    figure = subplots.make_subplots(
        rows=1,
        cols=len(panels),
        subplot_titles=[each.name for each in panels],
        column_widths=[max(2, len(each.columns)) for each in panels],
    )
    for number, each in enumerate(panels, start=1):
        text = [[f"{row}, {column}" for column in each.columns] for row in each.rows]
        figure.add_trace(
            plotly.Heatmap(
                z=each.values.tolist(),
                customdata=text,
                coloraxis="coloraxis",
                hovertemplate=(
                    f"{each.name}: {each.row_title}, {each.column_title} %{{customdata}}"
                    "<br>%{z:.3f}<extra></extra>"
                ),
            ),
            row=1,
            col=number,
        )
        # Numbered, not named by the labels: a token that occurs twice is two columns.
        figure.update_xaxes(
            title_text=each.column_title,
            tickangle=-45,
            tickvals=list(range(len(each.columns))),
            ticktext=each.columns,
            row=1,
            col=number,
        )
        step = -(-len(each.rows) // 60)
        figure.update_yaxes(
            title_text=each.row_title,
            title_standoff=4,
            tickfont_size=10,
            tickvals=list(range(0, len(each.rows), step)),
            ticktext=each.rows[::step],
            row=1,
            col=number,
        )
    figure.update_layout(
        title=title,
        plot_bgcolor=_NOT_SWEPT,
        coloraxis={
            "colorscale": _COLOURS,
            "cmin": -limit,
            "cmid": 0,
            "cmax": limit,
            "colorbar": {"title": {"text": legend, "side": "right"}},
        },
        height=min(max(420, 180 + 17 * max(len(each.rows) for each in panels)), 3200),
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure
