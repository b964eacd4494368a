"""Pictures of an outcome: heatmaps, as a matplotlib or an interactive plotly figure."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core._extras import extra
from nnpatch_core.errors import OutcomeError
from nnpatch_core.sites import Axis

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


def panel(name: str, axes: Sequence[Axis], values: Tensor, tokens: Sequence[str]) -> Panel:
    """The heatmap of one site name.

    Args:
        name: the site name.
        axes: one to three axes: layer, position, head; or the sites of a list.
        values: of their shape, nan where nothing was swept.
        tokens: a label for each position.
    """
    found = values.double().numpy()
    labels = {axis.name: tuple(str(label) for label in axis.labels) for axis in axes}
    if "position" in labels:
        labels["position"] = tuple(tokens)
    names = [axis.name for axis in axes]
    if len(names) == 1:
        return Panel(name, found[:, None], labels[names[0]], ("",), _title(names[0]), "")
    if len(names) == 2:
        rows, columns = names
        return Panel(name, found, labels[rows], labels[columns], _title(rows), _title(columns))
    layer, position, head = names
    n_layers, n_positions, n_heads = found.shape
    by_head = found.transpose(0, 2, 1).reshape(n_layers * n_heads, n_positions)
    numbered = tuple(f"{a}.{b}" for a in labels[layer] for b in labels[head])
    return Panel(
        name, by_head, numbered, labels[position], f"layer.{_title(head)}", _title(position)
    )


def heatmap(
    panels: Sequence[Panel], *, title: str, legend: str, limit: float | None, interactive: bool
) -> Any:
    """Panels side by side, with one scale of colours centred on 0; see `Outcome.plot`.

    Raises:
        OutcomeError: no panels, or a limit that is not a positive number.
    """
    if not panels:
        raise OutcomeError("sites is empty: there is nothing to draw")
    if limit is None:
        found = np.concatenate([each.values.ravel() for each in panels])
        limit = float(np.abs(found[np.isfinite(found)]).max(initial=0.0)) or 1.0
    if not 0 < limit < float("inf"):
        raise OutcomeError(f"limit must be a positive number, got {limit}")
    draw = _plotly if interactive else _matplotlib
    return draw(panels, title, legend, limit)


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
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # a token may be a dollar sign
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
        # Escaped, for plotly reads tokens such as <s> as markup.
        columns = [html.escape(column) for column in each.columns]
        text = [[f"{row}, {column}" for column in columns] for row in each.rows]
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
            ticktext=columns,
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
