"""The picture of an outcome: its grids become panels of the right kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.draw import draw
from nnpatch_core.results.pictures.kinds import as_bars, as_heatmaps, as_lines, kind_of
from nnpatch_core.results.pictures.request import read_request
from nnpatch_core.results.pictures.scales import scale_of
from nnpatch_core.results.pictures.seen import see
from nnpatch_core.results.pictures.sheet import Sheet, strongest
from nnpatch_core.results.selection import find_names
from nnpatch_core.results.words import model_name

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def draw_outcome(outcome: Outcome, *, sites: Any, metrics: Any, **asked: Any) -> Any:
    """Draw an outcome; see `Outcome.plot`.

    Raises:
        OutcomeError: see `Outcome.plot`.
    """
    request = read_request(**asked)
    names = find_names(outcome.cells, sites)
    if not names:
        raise OutcomeError("sites is empty: there is nothing to draw")
    views = [outcome.for_metric(metric) for metric in _metrics(outcome, metrics)]
    kind = kind_of(outcome, names, request.kind)
    seen = [see(view, names, request, kind) for view in views]
    make = {"heatmap": as_heatmaps, "lines": as_lines, "bars": as_bars}[kind]
    made = make(seen, request)
    panels, note = made.panels, made.note
    if len(views) > 1 and outcome.scale != "restored":
        scales = [
            scale_of([view], [each for each in panels if each.scale == number], request.limit)
            for number, view in enumerate(views)
        ]
    else:
        panels = [each.on_scale(0) for each in panels]
        scales = [scale_of(views, panels, request.limit)]
    sheet = Sheet(
        kind,
        panels,
        made.layout,
        request.title or title_of(outcome, views),
        request.title is not None,
        note,
        scales,
        strongest(panels, request.mark),
        request.values,
        request.size,
    )
    return draw(sheet, interactive=request.interactive, ax=request.ax)


def title_of(outcome: Outcome, views: Sequence[Outcome]) -> str:
    """The model, the kind of sweep and the metrics."""
    metrics = ", ".join(view.metric for view in views)
    return f"{model_name(outcome.info['model'])}: {outcome.kind}, {metrics}"


def _metrics(outcome: Outcome, asked: Any) -> tuple[str, ...]:
    if asked is None:
        return (outcome.metric,)
    if isinstance(asked, str):
        return outcome.metrics if asked == "all" else (asked,)
    given = listed(asked)
    if not given:
        raise OutcomeError(f"metrics must be names of metrics or 'all', got {shown(asked)}")
    return given
