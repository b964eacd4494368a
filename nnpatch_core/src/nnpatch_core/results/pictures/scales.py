"""Scales that mean something: next to nothing looks like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.sheet import Colours
from nnpatch_core.results.words import unit_of

if TYPE_CHECKING:
    from nnpatch_core.results.combination import Combination
    from nnpatch_core.results.outcome import Outcome


def scale_of(
    outcomes: Sequence[Outcome | Combination],
    panels: Sequence[Panel],
    limit: float | Literal["largest"] | None,
    *,
    words: str | None = None,
) -> Colours:
    """The scale that panels share.

    Args:
        outcomes: those that the panels show.
        panels: the panels.
        limit: of the user; see `Outcome.plot`.
        words: the legend, if it is not that of the outcome.
    """
    values = np.concatenate([each.values.ravel() for each in panels])
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    if isinstance(limit, int | float):
        most = float(limit)
    elif limit:
        most = largest or 1.0
    else:
        most = max(largest, *(_floor(outcome) for outcome in outcomes))
    words = words or unit_of(outcomes[0])
    if f"{largest:.3g}" != f"{most:.3g}":
        words += f"; the largest is {largest:.3g}"
    return Colours(words, most)


def ends(panels: Sequence[Panel], colours: Colours) -> tuple[float, float]:
    """The ends of an axis of values: 0, the values, the limit on their side, and their bands."""
    shown = [each.values.ravel() for each in panels]
    shown += [each.band.ravel() for each in panels if each.band is not None]
    every = np.concatenate(shown)
    every = np.clip(every[np.isfinite(every)], -2 * colours.limit, 2 * colours.limit)
    low, high = float(every.min(initial=0.0)), float(every.max(initial=0.0))
    if high >= -low:
        high = max(high, colours.limit)
    else:
        low = min(low, -colours.limit)
    room = 0.04 * (high - low)
    return low - room, high + room


def _floor(outcome: Outcome | Combination) -> float:
    """The least value of the darkest colours, unless the user has set it."""
    if outcome.scale == "restored":
        return 1.0
    sizes = [term.outcome.baseline.target.double().abs().mean().item() for term in outcome.terms]
    return max((size for size in sizes if 0 < size < float("inf")), default=1.0)
