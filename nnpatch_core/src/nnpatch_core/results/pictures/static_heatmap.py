"""One heatmap in matplotlib axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nnpatch_core.results.pictures.colours import DIVERGING, INK, NOT_SWEPT, PAPER, ink, washed
from nnpatch_core.results.pictures.crop import short
from nnpatch_core.results.pictures.layout import is_slanted, ticks
from nnpatch_core.results.pictures.sheet import Sheet
from nnpatch_core.results.pictures.written import written

_SHADES = 511
_SLANTED: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
#: Letters of the label of a row.
_ROW_LABEL = 40


def draw_heatmap(axis: Any, sheet: Sheet, number: int) -> Any:
    """Draw a panel of a sheet, and give the image that its scale belongs to."""
    panel, layout = sheet.panels[number], sheet.layout
    limit = sheet.scales[panel.scale].limit
    full = LinearSegmentedColormap.from_list("nnpatch", DIVERGING, _SHADES)
    pale = LinearSegmentedColormap.from_list("washed", [*map(washed, DIVERGING)], _SHADES)
    options: dict[str, Any] = {
        "vmin": -limit,
        "vmax": limit,
        "origin": "lower",
        "aspect": "auto",
        "interpolation": "nearest",
    }
    image = axis.imshow(panel.values, cmap=full.with_extremes(bad=NOT_SWEPT), **options)
    unsure = panel.unsure
    if unsure.any():
        shown = np.ma.masked_where(~unsure, panel.values)
        axis.imshow(shown, cmap=pale.with_extremes(bad=(0, 0, 0, 0)), **options)
    axis.set_title(panel.name, fontsize=11).set_parse_math(False)
    axis.set_xlabel(panel.across_title, fontsize=9)
    axis.set_ylabel(panel.up_title, fontsize=9)
    marked = ticks(len(panel.across), layout.column)
    axis.set_xticks(
        marked,
        [short(panel.across[tick]) for tick in marked],
        **(_SLANTED if is_slanted(panel.across, layout.column) else {}),
    )
    row = layout.height / len(panel.up)
    marked = ticks(len(panel.up), row)
    axis.set_yticks(marked, [short(panel.up[tick], _ROW_LABEL) for tick in marked])
    axis.tick_params(labelsize=8, length=2)
    for label in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        label.set_parse_math(False)  # a token may be a dollar sign
    if sheet.writes_values(layout.column, row):
        size = min(7.0, 60 * row, 20 * layout.column)
        _write(axis, panel.values, unsure, limit, size, all_of_them=bool(sheet.values))
    for up, across in sheet.marked[number]:
        _outline(axis, up, across)
    return image


def _write(
    axis: Any, values: Any, unsure: Any, limit: float, size: float, *, all_of_them: bool
) -> None:
    for (up, across), value in np.ndenumerate(values):
        # What is exactly 0 is white, and what was not swept grey: neither needs a number.
        if np.isfinite(value) and value and (all_of_them or not unsure[up, across]):
            colour = ink(value / limit, bool(unsure[up, across]))
            axis.text(
                across, up, written(value, limit), ha="center", va="center_baseline",
                fontsize=size, color=colour,
            )  # fmt: skip


def _outline(axis: Any, up: int, across: int) -> None:
    """A dark frame with a light edge, to be seen on any colour."""
    frame = Rectangle((across - 0.5, up - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.4)
    frame.set_path_effects([withStroke(linewidth=3.4, foreground=PAPER)])
    frame.set_zorder(3)
    axis.add_patch(frame)
