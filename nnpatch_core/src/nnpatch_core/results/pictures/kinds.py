"""The kinds of pictures: which suits the axes, and what grids of numbers become in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._printable import printable
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.axes import AXES
from nnpatch_core.results.pictures.crop import at_position, cropped
from nnpatch_core.results.pictures.layout import Layout, lay_out, lay_out_bars, lay_out_charts
from nnpatch_core.results.pictures.lines import legend_of, unsure
from nnpatch_core.results.pictures.panels import Grid, Panel, is_split, labels_of, panel
from nnpatch_core.results.pictures.request import PictureKind, Request
from nnpatch_core.results.pictures.seen import Seen, are_lists
from nnpatch_core.results.words import cell_name
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    from nnpatch_core.results.combination import Combination
    from nnpatch_core.results.outcome import Outcome

#: As many bars are drawn of grids, which have more cells than can be read as bars.
_BARS = 30
#: Inches: the least height of one.
_BAR = 0.17


@attrs.frozen(eq=False)
class Made:
    """Panels with their places, and what is said below them."""

    panels: Sequence[Panel]
    layout: Layout
    note: str


def kind_of(
    outcome: Outcome | Combination, names: Sequence[str], asked: PictureKind | None
) -> PictureKind:
    """The kind of picture that suits the axes of some site names, unless one is asked for.

    Raises:
        OutcomeError: lines are asked for of sites that have no layers.
    """
    if asked == "lines":
        for name in names:
            if outcome.axes(name)[0].name != "layer":
                raise OutcomeError(
                    f"kind='lines' goes over layers, and {name!r} is a list of sites: "
                    "leave kind out, or ask for kind='bars'"
                )
    if asked is not None:
        return asked
    if are_lists(outcome, names):
        return "bars"
    over_layers = all([axis.name for axis in outcome.axes(name)] == ["layer"] for name in names)
    return "lines" if over_layers else "heatmap"


def as_heatmaps(seen: Sequence[Seen], request: Request) -> Made:
    """A heatmap for each site name and metric; for each place too, where heads are many."""
    rows = [heatmaps(each, request, len(seen) > 1, number) for number, each in enumerate(seen)]
    made = [one for row in rows for one in row]
    first = seen[0]
    panels, notes = cropped(made, first.layers, first.positions, request.crop)
    notes = _with_places(notes, first, panels)
    if any(each.unsure.any() for each in panels):
        words = "washed out: the {percent} band over all {cells} cells holds 0"
    else:
        words = "the {percent} band over all {cells} cells holds 0 in none of them"
    notes += first.words(words, "nothing is washed out")
    columns = len(rows[0]) if len(rows) > 1 else None
    return Made(panels, lay_out(panels, columns, request.size), "; ".join(notes))


def as_lines(seen: Sequence[Seen], request: Request) -> Made:
    """A chart for each site name and metric; one for all sites that have nothing but layers."""
    made = [
        attrs.evolve(one, name=_title(one.name, each, len(seen) > 1), scale=number)
        for number, each in enumerate(seen)
        for one in _charts(each)
    ]
    first = seen[0]
    crop = request.crop is not False
    panels, notes = cropped(made, first.layers, first.positions, crop)
    notes = _with_places(notes, first, panels)
    words = "shaded: the {percent} band over all {cells} cells"
    if unsure(panels):
        words += "; lines whose band holds 0 at every layer are grey"
    notes += first.words(words, "no bands")
    if legend_of(panels).others > len(unsure(panels)):
        notes.append("the lines that reach furthest have colours")
    return Made(panels, lay_out_charts(panels, request.size), "; ".join(notes))


def as_bars(seen: Sequence[Seen], request: Request) -> Made:
    """A bar for each site of a list, or for the strongest cells of grids."""
    made, notes = [], []
    most = min(_BARS, request.room(_BAR) // len(seen))
    for number, each in enumerate(seen):
        labels, values, band = _bars(each)
        if not labels and (request.layers is not None or request.positions is not None):
            raise OutcomeError("nothing was swept in these layers and positions: no bar is left")
        listed = all(grid.axes[0].name == "site" for grid in each.grids)
        order = list(range(len(values)))
        if not listed:
            sizes = np.abs(values)
            order = np.argsort(-np.where(np.isnan(sizes), np.inf, sizes), kind="stable").tolist()
            if len(order) > most:
                notes.append(f"the {most} strongest of {len(order):,} cells")
                order = order[:most]
        title = each.name if len(seen) > 1 else ""
        made.append(
            Panel(
                title,
                values[order, None],
                tuple(labels[place] for place in order),
                ("",),
                "",
                "",
                band=band[:, order, None],
                scale=number,
            )
        )
        alone = "the {percent} interval of each alone" if listed else ""
        alone = alone or "the {percent} band over all {cells} cells"
        washed = "; washed out: it holds 0" if made[-1].unsure.any() else ""
        notes += each.words(f"error bars: {alone}{washed}", "no error bars")
    note = "; ".join(dict.fromkeys(notes))
    return Made(made, lay_out_bars(made, request.size), note)


def heatmaps(seen: Seen, request: Request, several: bool, number: int) -> list[Panel]:
    """The heatmaps of one outcome and metric, on the scale of this number."""
    tokens = seen.positions.labels
    made = []
    for grid in seen.grids:
        places = _places(grid, seen, request.crop)
        split = grid.has_heads and is_split(grid, places)
        parts = [grid]
        if split:
            axis = grid.axes[1]
            parts = [grid.at(place, _at(axis, place, tokens)) for place in places]
        made += [panel(part, tokens) for part in parts]
    return [
        attrs.evolve(each, name=_title(each.name, seen, several), scale=number) for each in made
    ]


def _places(grid: Grid, seen: Seen, crop: bool | None) -> list[int]:
    if not grid.has_heads:
        return []
    every = range(len(seen.positions.labels))
    run = list(every) if crop is False and seen.positions.chosen is None else seen.positions.used
    return grid.places(run, seen.positions.chosen is not None)


def _title(name: str, seen: Seen, several: bool) -> str:
    if not several:
        return name
    return f"{name}: {seen.name}" if name else seen.name


def _with_places(notes: list[str], seen: Seen, panels: Sequence[Panel]) -> list[str]:
    """The notes, and the positions that have no panel, where panels stand for positions."""
    heads = any(
        grid.has_heads and grid.axes[1].name == "position" for grid in seen.grids
    ) and not any(each.positions for each in panels)
    if not heads:
        return notes
    return [*(words for words in seen.positions.left_out("position", seen.positions.used)), *notes]


def _charts(seen: Seen) -> Iterator[Panel]:
    """Panels whose columns are lines over layers."""
    tokens = seen.positions.labels
    plain = [grid for grid in seen.grids if len(grid.axes) == 1]
    if plain:
        first = panel(plain[0], tokens)
        bands = [
            np.full((2, *grid.values.shape), np.nan) if grid.band is None else grid.band
            for grid in plain
        ]
        alone = len(plain) == len(seen.grids)
        yield attrs.evolve(
            first,
            name="" if alone and len(plain) > 1 else ", ".join(grid.name for grid in plain),
            values=np.stack([grid.values for grid in plain], -1),
            band=np.stack(bands, -1),
            across=tuple(grid.name for grid in plain),
        )
    for grid in seen.grids:
        if len(grid.axes) == 2:
            made = panel(grid, tokens)
            names = _line_names(grid, tokens)
            yield made.with_columns(range(len(names)), names)
        elif grid.has_heads:
            yield _lines_by_head(grid, seen)


def _lines_by_head(grid: Grid, seen: Seen) -> Panel:
    """A line for each head at each place."""
    places = grid.places(seen.positions.used, seen.positions.chosen is not None)
    axis, last = grid.axes[1:]
    tokens = seen.positions.labels
    heads = AXES[last.name].title
    names = tuple(
        f"{_place_name(axis, place, tokens)}, {heads} {head}"
        for place in places
        for head in last.labels
    )
    layers = len(grid.values)
    flat = panel(Grid(grid.name, grid.axes[:1], grid.values[:, 0, 0]), tokens)
    band = None if grid.band is None else grid.band[:, :, places].reshape(2, layers, -1)
    values = grid.values[:, places].reshape(layers, -1)
    return attrs.evolve(flat, values=values, band=band, across=names)


def _line_names(grid: Grid, tokens: Sequence[str]) -> tuple[str, ...]:
    axis = grid.axes[1]
    return tuple(_place_name(axis, place, tokens) for place in range(len(axis.labels)))


def _place_name(axis: Axis, place: int, tokens: Sequence[str]) -> str:
    """One place of an axis, in a legend."""
    if axis.name == "position":
        return at_position(place, tokens[place])
    label = labels_of(axis, tokens)[place]
    return label if axis.name == "span" else f"{AXES[axis.name].title} {label}"


def _at(axis: Axis, place: int, tokens: Sequence[str]) -> str:
    """One place of an axis, in a title, as cells are named."""
    name = cell_name(
        {
            "site": "",
            AXES[axis.name].column: axis.labels[place],
            "token": tokens[place] if axis.name == "position" else "",
        }
    )
    return printable(name.strip())


def _bars(seen: Seen) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
    """Each swept cell's name and value `[cells]`, and its band `[2, cells]`."""
    labels, values, bands = [], [], []
    several = len(seen.grids) > 1
    for grid in seen.grids:
        swept = np.argwhere(~np.isnan(grid.values))
        for axis, lines in (("layer", seen.layers), ("position", seen.positions)):
            names = [each.name for each in grid.axes]
            if lines.chosen is not None and axis in names:
                swept = swept[np.isin(swept[:, names.index(axis)], list(lines.chosen))]
        for place in map(tuple, swept.tolist()):
            labels.append(_cell_name(grid, place, seen.positions.labels, several))
        at = tuple(swept.T)
        values.append(grid.values[at])
        empty = np.full((2, len(swept)), np.nan)
        bands.append(empty if grid.band is None else np.stack([end[at] for end in grid.band]))
    return labels, np.concatenate(values), np.concatenate(bands, -1)


def _cell_name(grid: Grid, place: Sequence[int], tokens: Sequence[str], several: bool) -> str:
    row: dict[str, Any] = {"site": grid.name}
    for axis, number in zip(grid.axes, place, strict=True):
        row[AXES[axis.name].column] = axis.labels[number]
        if axis.name == "position":
            row["token"] = tokens[number]
    name = cell_name(row)
    if "label" in row and several and not name.startswith(grid.name):
        return f"{grid.name}: {name}"
    return name
