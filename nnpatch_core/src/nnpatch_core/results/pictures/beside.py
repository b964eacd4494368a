"""The picture of two outcomes and their difference: three columns of heatmaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.crop import Lines, cropped
from nnpatch_core.results.pictures.draw import draw
from nnpatch_core.results.pictures.kinds import heatmaps
from nnpatch_core.results.pictures.layout import lay_out
from nnpatch_core.results.pictures.outcome import about
from nnpatch_core.results.pictures.request import check_limit, read_request
from nnpatch_core.results.pictures.scales import scale_of
from nnpatch_core.results.pictures.seen import Seen, see
from nnpatch_core.results.pictures.sheet import Sheet, strongest
from nnpatch_core.results.selection import find_names, matching

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
    sides = [each.sel(site=list(find_names(each.cells, names))) for each in (one, other)]
    minus = sides[0] - sides[1]
    first, second = (see(each, find_names(each.cells, names), request, "heatmap") for each in sides)
    layers, positions = (
        _together(first.layers, second.layers),
        _together(first.positions, second.positions),
    )
    first, second = (
        attrs.evolve(each, name=title, layers=layers, positions=positions)
        for each, title in zip((first, second), titles, strict=True)
    )
    difference = attrs.evolve(
        see(minus, names, request, "heatmap"),
        name=f"{titles[0]} − {titles[1]}",
        layers=layers,
        positions=positions,
    )
    columns = [
        heatmaps(each, request, True, number)
        for number, each in enumerate((first, second, difference))
    ]
    rows = [panel for row in zip(*columns, strict=True) for panel in row]
    panels, notes = cropped(rows, layers, positions, request.crop)
    if limit_difference is None:
        panels = [each.on_scale(0) for each in panels]
        scales = [scale_of([one, other], panels, request.limit)]
    else:
        panels = [each.on_scale(int(each.scale == 2)) for each in panels]
        shared, own = ([each for each in panels if each.scale == which] for which in (0, 1))
        scales = [
            scale_of([one, other], shared, request.limit),
            scale_of([minus], own, limit_difference, words=difference.name),
        ]
    notes += _words(first, second, difference)
    own_title = request.title is not None
    metrics = " and ".join(dict.fromkeys((one.metric, other.metric)))
    title = about(minus.info, metrics) if request.title is None else request.title
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
    """The site names of both outcomes that are drawn."""
    if not isinstance(other, type(one)):
        raise OutcomeError(f"an outcome stands beside another, got {shown(other)}")
    if sites is not None:
        return find_names(one.cells, sites)
    names = tuple(name for name in one.cells if matching(other.cells, name) is not None)
    if not names:
        raise OutcomeError(f"no site is in both: {shown(list(one))} and {shown(list(other))}")
    return names


def _labels(one: Outcome, other: Outcome, labels: Any) -> tuple[str, str]:
    """The words that tell the outcomes apart: the user's, or their kinds if these differ."""
    if labels is None:
        pairs = ((one.kind, other.kind), (one.metric, other.metric))
        return next((pair for pair in pairs if pair[0] != pair[1]), ("one", "other"))
    given = None if isinstance(labels, str) else listed(labels)
    if given is None or len(given) != 2 or not all(isinstance(label, str) for label in given):
        raise OutcomeError(f"labels must be two texts, got {shown(labels)}")
    return (given[0], given[1])


def _together(one: Lines, other: Lines) -> Lines:
    """The lines of both, idle where they are in both; the words are those of the first."""
    if len(one.labels) != len(other.labels):
        return one
    idle = zip(one.idle, other.idle, strict=True)
    labels = zip(one.labels, other.labels, strict=True)
    return attrs.evolve(
        one,
        labels=tuple(first if first == second else f"{first}|{second}" for first, second in labels),
        idle=tuple(first if first and second else "" for first, second in idle),
    )


def _words(one: Seen, other: Seen, difference: Seen) -> list[str]:
    """How sure the columns are; the difference by a band of its own."""
    columns = (one, other, difference)
    told = [each for each in columns if not each.certainty.lacks]
    notes = []
    if told:
        counts = " or ".join(dict.fromkeys(f"{each.cells:,}" for each in told))
        words = f"washed out: the {{percent}} band over all {counts} cells of a column holds 0"
        notes += told[0].words(words, "")
    for why in dict.fromkeys(each.certainty.lacks for each in columns if each not in told):
        lacking = [each for each in columns if each.certainty.lacks == why]
        where = f" in {', '.join(each.name for each in lacking)}" if len(lacking) < 3 else ""
        notes += lacking[0].words("", f"nothing is washed out{where}")
    return list(dict.fromkeys(notes))
