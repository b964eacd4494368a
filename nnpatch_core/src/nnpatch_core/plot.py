"""Pictures of an outcome: heatmaps, as a matplotlib or an interactive plotly figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import OutcomeError
from nnpatch_core.sites import Axis

_COLOURS = "RdBu"
_NOT_SWEPT = "#dddddd"
_TITLES = {"layer": "layer", "position": "token", "head": "head", "kv_head": "key/value head"}

#: Inches: the widest picture, a column where there is room, and the least where there is not.
_WIDEST, _COLUMN, _LEAST_COLUMN = 16.0, 0.42, 0.15
#: Inches: a label of a column or row, and what is beside a panel and beside them all.
_LABEL, _BESIDE, _BAR = 0.15, 1.1, 1.0
#: Inches: a row, the lowest panel and the highest picture.
_ROW, _LOWEST, _HIGHEST = 0.2, 3.0, 32.0
_DOTS = 100
#: The longest text at a column.
_LETTERS = 24


@attrs.frozen(eq=False)
class Panel:
    """One heatmap: `values[row, column]`, nan where nothing was swept.

    `positions` says that columns are the positions of the prompts.
    """

    name: str
    values: NDArray[np.float64]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_title: str
    column_title: str
    positions: bool = False

    def keep(self, columns: Sequence[int], labels: Sequence[str]) -> Panel:
        """Some of the positions, with other labels."""
        if not self.positions:
            return self
        kept = self.values[:, list(columns)]
        return attrs.evolve(self, values=kept, columns=tuple(labels[n] for n in columns))


@attrs.frozen(eq=False)
class Columns:
    """The positions of the prompts, as columns.

    Args:
        tokens: a label for each.
        idle: for each why nothing was run there, in any panel; empty where something was.
    """

    tokens: tuple[str, ...]
    idle: tuple[str, ...]


@attrs.frozen
class Layout:
    """Panels in rows and columns; sizes in inches."""

    rows: int
    across: int
    width: float
    height: float
    column: float


@attrs.frozen(eq=False)
class Sheet:
    """What is drawn.

    Args:
        panels: the heatmaps.
        layout: where they stand.
        title: above them.
        own: whether the user wrote the title, who may have meant markup in it.
        note: what was left out.
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
    rows, columns = names[:2]
    if len(names) == 2:
        titles = _title(rows), _title(columns)
        positions = columns == "position"
        return Panel(name, found, labels[rows], labels[columns], *titles, positions)
    layer, position, head = names
    n_layers, n_positions, n_heads = found.shape
    by_head = found.transpose(0, 2, 1).reshape(n_layers * n_heads, n_positions)
    numbered = tuple(f"{a}.{b}" for a in labels[layer] for b in labels[head])
    titles = f"layer.{_title(head)}", _title(position)
    return Panel(name, by_head, numbered, labels[position], *titles, positions=True)


def heatmap(
    panels: Sequence[Panel],
    columns: Columns,
    *,
    title: str | None,
    default_title: str,
    legend: str,
    limit: float | str | None,
    floor: float,
    crop: bool | None,
    interactive: bool,
) -> Any:
    """Panels with one scale of colours centred on 0; see `Outcome.plot`.

    Args:
        panels: what to draw.
        columns: the positions, for the panels that have them.
        title: the user's; None is the default one.
        default_title: shown as it is, whatever it looks like.
        legend: of the colours.
        limit: the value of the darkest colours, `"largest"`, or None.
        floor: the least value of the darkest colours, if the limit is None.
        crop: whether to leave positions out where nothing was run; None is where there is no room.
        interactive: by plotly.

    Raises:
        OutcomeError: no panels, or a limit that is not a positive number.
    """
    if not panels:
        raise OutcomeError("sites is empty: there is nothing to draw")
    found = np.concatenate([each.values.ravel() for each in panels])
    largest = float(np.abs(found[np.isfinite(found)]).max(initial=0.0))
    limit = _limit(limit, largest, floor)
    if largest < limit:
        legend += f"; the largest is {largest:.3g}"
    panels, note = _cropped(panels, columns, crop)
    own = title is not None
    sheet = Sheet(panels, _laid(panels), title or default_title, own, note, legend, limit)
    return (_plotly if interactive else _matplotlib)(sheet)


def _title(axis: str) -> str:
    return _TITLES.get(axis, "")


def _limit(limit: float | str | None, largest: float, floor: float) -> float:
    if limit is None:
        return max(largest, floor)
    if limit == "largest":
        return largest or 1.0
    if isinstance(limit, str) or not 0 < limit < float("inf"):
        raise OutcomeError(f"limit must be a positive number or 'largest', got {limit!r}")
    return float(limit)


def _cropped(
    panels: Sequence[Panel], columns: Columns, crop: bool | None
) -> tuple[Sequence[Panel], str]:
    """The panels without the positions where nothing was run, and what was left out."""
    if not isinstance(crop, bool | None):
        raise OutcomeError(f"crop must be True, False or None, got {crop!r}")
    count = len(columns.tokens)
    used = [number for number, why in enumerate(columns.idle) if not why]
    wide = _width(panels, len(panels), _COLUMN) > _WIDEST
    shown: Sequence[int] = range(count)
    # Where nothing at all was run there is nothing to show but that.
    if crop is not False and used and (crop or wide):
        shown = used
    if not wide and len(shown) == count:
        return panels, ""
    # Not all columns are there or have room for a label, so that each label says its position.
    labels = [f"{number} {_short(token)}" for number, token in enumerate(columns.tokens)]
    out = [number for number in range(count) if number not in set(shown)]
    words = []
    for why in dict.fromkeys(columns.idle[number] for number in out):
        numbers = [number for number in out if columns.idle[number] == why]
        what = "position {} is" if len(numbers) == 1 else "positions {} are"
        words.append(f"{what.format(ranges(numbers))} left out: {why}")
    return [each.keep(shown, labels) for each in panels], "; ".join(words)


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _width(panels: Sequence[Panel], across: int, column: float) -> float:
    """Inches that panels take, so many of them beside each other."""
    widths = [max(1.6, column * len(each.columns)) + _BESIDE for each in panels]
    if across == len(panels):
        return sum(widths) + _BAR
    return across * max(widths) + _BAR


def _laid(panels: Sequence[Panel]) -> Layout:
    """Panels beside each other; in several rows where there is no room."""
    highest = max(len(each.rows) for each in panels)
    for rows in range(1, len(panels) + 1):
        across = math.ceil(len(panels) / rows)
        column = _COLUMN
        if _width(panels, across, _COLUMN) > _WIDEST:
            column = _LEAST_COLUMN
        if _width(panels, across, column) <= _WIDEST:
            break
    rows = math.ceil(len(panels) / across)
    width = min(_width(panels, across, _COLUMN), _WIDEST)
    height = min(max(_LOWEST, _ROW * highest), max(_LOWEST, _HIGHEST / rows))
    columns = max(len(each.columns) for each in panels)
    if rows == 1:
        columns = sum(len(each.columns) for each in panels)
    room = width - _BAR - across * _BESIDE
    return Layout(rows, across, width, height, min(_COLUMN, room / columns))


def _ticks(count: int, inches: float) -> list[int]:
    """Which of the columns or rows have room for a label; the last has one."""
    step = max(1, math.ceil(_LABEL / inches))
    return list(range((count - 1) % step, count, step))


def _weights(panels: Sequence[Panel], layout: Layout) -> list[float]:
    """How wide the columns of the layout are, beside each other."""
    if layout.rows > 1:
        return [1.0] * layout.across
    return [max(1.6, layout.column * len(each.columns)) for each in panels]


def _matplotlib(sheet: Sheet) -> Any:
    panels, layout = sheet.panels, sheet.layout
    colours = extra("matplotlib", "plot")
    extra("matplotlib.figure", "plot")
    from nnpatch_core._figure import Picture

    figure = Picture(figsize=(layout.width, layout.rows * (layout.height + 1.1) + 0.5), dpi=_DOTS)
    figure.set_layout_engine("constrained")
    places = figure.subplots(
        layout.rows, layout.across, squeeze=False, width_ratios=_weights(panels, layout)
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
        axis.set_xlabel(each.column_title)
        axis.set_ylabel(each.row_title)
        ticks = _ticks(len(each.columns), layout.column)
        axis.set_xticks(
            ticks,
            [_short(each.columns[tick]) for tick in ticks],
            rotation=60,
            ha="right",
            rotation_mode="anchor",
        )
        ticks = _ticks(len(each.rows), layout.height / len(each.rows))
        axis.set_yticks(ticks, [each.rows[tick] for tick in ticks])
        axis.tick_params(labelsize=8, length=2)
        for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
            label.set_parse_math(False)  # a token may be a dollar sign
    for axis in places[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(sheet.title, fontsize=10).set_parse_math(sheet.own)
    if sheet.note:
        figure.supxlabel(sheet.note, fontsize=8)
    # As wide as beside a low picture.
    aspect = max(20.0, 3.0 * layout.rows * layout.height)
    figure.colorbar(image, ax=list(places), label=sheet.legend, fraction=0.05, aspect=aspect)
    return figure


def _plotly(sheet: Sheet) -> Any:
    panels, layout = sheet.panels, sheet.layout
    plotly, subplots = extra("plotly.graph_objects", "plot"), extra("plotly.subplots", "plot")
    high = min(max(420, 180 + 17 * max(len(each.rows) for each in panels)), 3200 // layout.rows)
    figure = subplots.make_subplots(
        rows=layout.rows,
        cols=layout.across,
        subplot_titles=[in_plotly(each.name) for each in panels],
        column_widths=_weights(panels, layout),
        vertical_spacing=min(150 / (layout.rows * high), 1 / layout.rows),
    )
    for number, each in enumerate(panels):
        place = {"row": number // layout.across + 1, "col": number % layout.across + 1}
        columns = [in_plotly(column) for column in each.columns]
        rows = [in_plotly(row) for row in each.rows]
        figure.add_trace(
            plotly.Heatmap(
                z=each.values.tolist(),
                customdata=[[f"{row}, {column}" for column in columns] for row in rows],
                coloraxis="coloraxis",
                hovertemplate=(
                    f"{in_plotly(each.name)}: {each.row_title}, {each.column_title} %{{customdata}}"
                    "<br>%{z:.3f}<extra></extra>"
                ),
            ),
            **place,
        )
        # Numbered, not named by the labels: a token that occurs twice is two columns.
        ticks = _ticks(len(columns), layout.column)
        figure.update_xaxes(
            title_text=each.column_title,
            tickangle=-45,
            tickvals=ticks,
            ticktext=[columns[tick] for tick in ticks],
            **place,
        )
        ticks = _ticks(len(rows), high / _DOTS / len(rows))
        figure.update_yaxes(
            title_text=each.row_title,
            title_standoff=4,
            tickfont_size=10,
            tickvals=ticks,
            ticktext=[rows[tick] for tick in ticks],
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
        height=layout.rows * high,
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    return figure
