"""The picture of two outcomes and their difference: three columns of heatmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.crop import Lines, cropped
from nnpatch_core.results.pictures.draw import draw
from nnpatch_core.results.pictures.kinds import heatmaps
from nnpatch_core.results.pictures.layout import lay_out
from nnpatch_core.results.pictures.panels import Grid
from nnpatch_core.results.pictures.request import check_limit, read_request
from nnpatch_core.results.pictures.scales import scale_of
from nnpatch_core.results.pictures.seen import Seen, see
from nnpatch_core.results.pictures.sheet import Sheet, strongest
from nnpatch_core.results.selection import find_names
from nnpatch_core.results.words import legend, model_name

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def draw_beside(
    one: Outcome, other: Outcome, *, sites: Any, labels: Any, limit_difference: Any, **asked: Any
) -> Any:
    """Draw two outcomes and their difference; see `Outcome.plot_beside`.

    Raises:
        OutcomeError: see `Outcome.plot_beside`.
    """
    request = read_request(kind="heatmap", ax=None, **asked)
    check_limit(limit_difference, "limit_difference")
    names = _names(one, other, sites)
    titles = _labels(one, other, labels)
    first, second = (see(each, names, request, "heatmap") for each in (one, other))
    layers, positions = (
        _together(first.layers, second.layers),
        _together(first.positions, second.positions),
    )
    first, second = (
        attrs.evolve(each, name=title, layers=layers, positions=positions)
        for each, title in zip((first, second), titles, strict=True)
    )
    difference = _difference(first, second)
    columns = [
        heatmaps(each, request, True, number)
        for number, each in enumerate((first, second, difference))
    ]
    panels = [panel for row in zip(*columns, strict=True) for panel in row]
    panels, notes = cropped(panels, layers, positions, request.crop)
    words = legend(one.scale, one.magnitude, one.metric)
    if limit_difference is None:
        panels = [each.on_scale(0) for each in panels]
        scales = [scale_of([one, other], panels, request.limit, words=words)]
    else:
        panels = [each.on_scale(int(each.scale == 2)) for each in panels]
        shared, own = ([each for each in panels if each.scale == which] for which in (0, 1))
        scales = [
            scale_of([one, other], shared, request.limit, words=words),
            scale_of([one, other], own, limit_difference, words=difference.name),
        ]
    notes += _certainty(first, second, difference, panels)
    own_title = request.title is not None
    title = request.title or f"{model_name(one.info['model'])}: {one.metric}"
    sheet = Sheet(
        "heatmap",
        panels,
        lay_out(panels, 3, request.size),
        title,
        own_title,
        "; ".join(notes),
        scales,
        strongest(panels, request.mark),
        request.values,
        request.size,
    )
    return draw(sheet, interactive=request.interactive)


def _names(one: Outcome, other: Outcome, sites: Any) -> tuple[str, ...]:
    """The site names of both outcomes that are drawn, checked to be of one kind."""
    if not hasattr(other, "cells"):
        raise OutcomeError(f"an outcome stands beside another, got {shown(other)}")
    for what in ("scale", "metric", "magnitude"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if mine != theirs:
            raise OutcomeError(
                f"outcomes side by side have one scale, and their {what} is {mine!r} and {theirs!r}"
            )
    both = [name for name in one.cells if name in other.cells]
    names = find_names(one.cells, sites) if sites is not None else tuple(both)
    if not names:
        raise OutcomeError(f"no site is in both: {shown(list(one))} and {shown(list(other))}")
    find_names(other.cells, names)
    for name in names:
        if one.axes(name) != other.axes(name):
            raise OutcomeError(
                f"the axes of {name!r} are not those of the other outcome: "
                f"{list(one.cells[name].shape)} and {list(other.cells[name].shape)}"
            )
    return names


def _labels(one: Outcome, other: Outcome, labels: Any) -> tuple[str, str]:
    """The words that tell the outcomes apart: the user's, or their kinds if these differ."""
    if labels is None:
        return ("one", "other") if one.kind == other.kind else (one.kind, other.kind)
    given = listed(labels)
    if given is None or len(given) != 2 or not all(isinstance(label, str) for label in given):
        raise OutcomeError(f"labels must be two texts, got {shown(labels)}")
    return (given[0], given[1])


def _together(one: Lines, other: Lines) -> Lines:
    """The lines of both, idle where they are in both; the words are those of the first."""
    idle = zip(one.idle, other.idle, strict=True)
    return attrs.evolve(
        one, idle=tuple(first if first and second else "" for first, second in idle)
    )


def _difference(one: Seen, other: Seen) -> Seen:
    grids = tuple(
        Grid(first.name, first.axes, first.values - second.values)
        for first, second in zip(one.grids, other.grids, strict=True)
    )
    return attrs.evolve(one, name=f"{one.name} − {other.name}", grids=grids)


def _certainty(one: Seen, other: Seen, difference: Seen, panels: Sequence[Any]) -> list[str]:
    del other, difference, panels
    return one.words(
        "washed out: the {percent} band over all {cells} cells holds 0", "nothing is washed out"
    )
