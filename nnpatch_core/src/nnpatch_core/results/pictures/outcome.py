"""The picture of an outcome: its grids become panels of the right kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from nnpatch_core.results.combination import Combination
    from nnpatch_core.results.outcome import Outcome


def draw_outcome(outcome: Outcome, *, sites: Any, metrics: Any, **asked: Any) -> Any:
    """Draw an outcome; see `Outcome.plot`.

    Raises:
        OutcomeError: see `Outcome.plot`.
    """
    views = [outcome]
    if metrics is not None:
        views = [outcome.for_metric(metric) for metric in _metrics(outcome, metrics)]
    return _drawn(views, sites, **asked)


def draw_combination(combination: Combination, *, sites: Any, **asked: Any) -> Any:
    """Draw a combination of outcomes; see `Combination.plot`.

    Raises:
        OutcomeError: see `Outcome.plot`.
    """
    return _drawn([combination], sites, **asked)


def title_of(views: Sequence[Outcome | Combination]) -> str:
    """The model, the kind of sweep and the metrics."""
    metrics = ", ".join(view.metric for view in views)
    return about(views[0].info, f"{views[0].kind}, {metrics}")


def about(info: Mapping[str, str], words: str) -> str:
    """Words, after the name of the model where it is known; of a combination there may be two."""
    names = map(model_name, info.get("model", "").split(" | "))
    model = " and ".join(dict.fromkeys(names))
    return f"{model}: {words}" if model else words


def _drawn(views: Sequence[Outcome | Combination], sites: Any, **asked: Any) -> Any:
    request = read_request(**asked)
    first = views[0]
    names = find_names(first.cells, sites)
    if not names:
        raise OutcomeError("sites is empty: there is nothing to draw")
    kind = kind_of(first, names, request.kind)
    seen = [see(view, names, request, kind) for view in views]
    made = {"heatmap": as_heatmaps, "lines": as_lines, "bars": as_bars}[kind](seen, request)
    panels = made.panels
    if len(views) > 1 and first.scale != "restored":
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
        title_of(views) if request.title is None else request.title,
        request.title is not None,
        made.note,
        scales,
        strongest(panels, request.mark),
        request.values,
        request.size,
    )
    return draw(sheet, interactive=request.interactive, ax=request.ax)


def _metrics(outcome: Outcome, asked: Any) -> tuple[str, ...]:
    if isinstance(asked, str):
        return outcome.metrics if asked == "all" else (asked,)
    given = listed(asked)
    if not given:
        raise OutcomeError(f"metrics must be names of metrics or 'all', got {shown(asked)}")
    return given
