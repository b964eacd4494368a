"""One heatmap of a plotly figure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnpatch_core._extras import extra
from nnpatch_core._html import in_plotly, in_template
from nnpatch_core.results.pictures.colours import INK, NOT_SWEPT, PAPER, ink
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import is_slanted, ticks
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.sheet import Sheet
from nnpatch_core.results.pictures.written import told, written

#: Pixels: the width of a panel on a phone, and of a value in a cell.
PHONE_PANEL, _WRITTEN = 250, 30


def axis_name(number: int, *, washed: bool = False) -> str:
    """The name of a scale's colour axis: of its colours, or of the same ones washed out."""
    place = 2 * number + washed
    return f"coloraxis{place + 1}" if place else "coloraxis"


def add_heatmap(figure: Any, sheet: Sheet, number: int, high: float) -> None:
    """Add a panel of a sheet to a figure that has its place.

    Args:
        figure: the figure.
        sheet: the panels.
        number: which of them.
        high: the height of a panel, in inches.
    """
    plotly = extra("plotly.graph_objects", "plot")
    panel, layout = sheet.panels[number], sheet.layout
    row, column = (place + 1 for place in layout.place(number))
    place = {"row": row, "col": column}
    across, up = _labels(panel.across), _labels(panel.up)
    limit = sheet.scales[panel.scale].limit
    writes = sheet.writes_values(layout.column, high / len(up))
    if layout.across == 1 and sheet.size is None and sheet.values is None:
        # Such a page is as wide as its window, which may be a phone's.
        writes = writes and len(across) * _WRITTEN <= PHONE_PANEL
    unsure = panel.unsure
    shares = panel.values / limit
    written_in = _texts(sheet, panel, limit) if writes else np.full(panel.values.shape, "")
    dark = np.array(
        [
            [ink(share, bool(pale)) == PAPER for share, pale in zip(*lines, strict=True)]
            for lines in zip(shares, unsure, strict=True)
        ]
    )

    def add(where: Any, texts: Any, colour: str, *, pale: bool = False, **options: Any) -> None:
        text = {"text": texts.tolist(), "texttemplate": "%{text}", "textfont": {"color": colour}}
        figure.add_trace(
            plotly.Heatmap(
                z=np.where(where, panel.values, np.nan).tolist(),
                coloraxis=axis_name(panel.scale, washed=pale),
                **(text if (texts != "").any() else {}),
                **options,
            ),
            **place,
        )

    add(
        True,
        np.where(dark | unsure, "", written_in),
        INK,
        customdata=_told(panel, up, across),
        hovertemplate=(
            f"{in_template(panel.name)}: {in_template(panel.up_title)}, "
            f"{in_template(panel.across_title)} %{{customdata}}<extra></extra>"
        ),
    )
    if unsure.any():
        add(unsure, np.where(unsure, written_in, ""), INK, pale=True, hoverinfo="skip")
    if (dark & (written_in != "")).any():
        add(dark, np.where(dark, written_in, ""), PAPER, hoverinfo="skip")
    same = _linked(sheet, number)
    # Numbered, not named by the labels: a token that occurs twice is two columns.
    marked = ticks(len(across), layout.column)
    figure.update_xaxes(
        title_text=in_plotly(panel.across_title),
        title_standoff=6,
        tickangle=-45 if is_slanted(panel.across, layout.column) else 0,
        tickvals=marked,
        ticktext=[across[tick] for tick in marked],
        tickfont_size=11,
        matches=None if same[0] is None else f"x{same[0] + 1 if same[0] else ''}",
        **place,
    )
    marked = ticks(len(up), high / len(up))
    figure.update_yaxes(
        title_text=in_plotly(panel.up_title),
        title_standoff=4,
        tickfont_size=10,
        tickvals=marked,
        ticktext=[up[tick] for tick in marked],
        matches=None if same[1] is None else f"y{same[1] + 1 if same[1] else ''}",
        **place,
    )
    for at in sheet.marked[number]:
        _outline(figure, at, place)
    figure.update_layout(plot_bgcolor=NOT_SWEPT)
    figure.update_xaxes(showgrid=False, zeroline=False, **place)
    figure.update_yaxes(showgrid=False, zeroline=False, **place)


def _labels(labels: tuple[str, ...]) -> list[str]:
    return [in_plotly(short(label)) for label in labels]


def _texts(sheet: Sheet, panel: Panel, limit: float) -> NDArray[np.str_]:
    """The texts of the cells: none of those that are 0, nor, unless asked for, unsure."""
    shown = np.isfinite(panel.values) & (panel.values != 0)
    if not sheet.values:
        shown &= ~panel.unsure
    lines = zip(panel.values, shown, strict=True)
    return np.array(
        [
            [written(value, limit) if there else "" for value, there in zip(*line, strict=True)]
            for line in lines
        ]
    )


def _told(panel: Panel, up: list[str], across: list[str]) -> list[list[str]]:
    """The words on each cell under the mouse: its labels, and its value with its band."""
    rows = enumerate(up)
    return [
        [f"{line}, {label}<br>{told(panel, row, column)}" for column, label in enumerate(across)]
        for row, line in rows
    ]


def _linked(sheet: Sheet, number: int) -> tuple[int | None, int | None]:
    """The first panels with the same columns and with the same lines: zoomed in all at once."""
    own = sheet.panels[number]
    before = list(enumerate(sheet.panels[:number]))
    return (
        next((place for place, each in before if each.across == own.across), None),
        next((place for place, each in before if each.up == own.up), None),
    )


def _outline(figure: Any, at: tuple[int, int], place: dict[str, int]) -> None:
    """A dark frame with a light edge, to be seen on any colour."""
    up, across = at
    for colour, width in ((PAPER, 4), (INK, 1.8)):
        figure.add_shape(
            type="rect", x0=across - 0.5, x1=across + 0.5, y0=up - 0.5, y1=up + 0.5,
            line={"color": colour, "width": width}, **place,
        )  # fmt: skip
