"""Figures of several cells together, in prompts that are drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.results.interval import Interval
from nnpatch_core.results.selection import find_name
from nnpatch_core.results.statistics import (
    Draws,
    Figures,
    Samples,
    figures_of,
    joined,
    orders,
    read_level,
    redrawn,
    samples_of,
    shared,
    tail_of,
)
from nnpatch_core.results.sureness import check_prompts

if TYPE_CHECKING:
    from nnpatch_core.results.agreement import Agreement
    from nnpatch_core.results.outcome import Outcome

_FIGURES = ("rank_correlation", "rank_correlation_of_sizes", "recall", "sign_agreement")


def interval_of_figures(
    outcome: Outcome,
    name: str,
    figures: Figures,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """The intervals of figures that the cells of a site name have together.

    They are made as `Outcome.interval` makes those of the cells, of the same draws; the doubts that
    it tells are about them as well, and are not told again.

    Args:
        outcome: of swept cells.
        name: the site name.
        figures: of values `[cells, n]`, in the order of the swept cells, `[figures, n]`; none moves
            further than the cell that moves most.
        level: as for `Outcome.interval`.
        seed: as for `Outcome.interval`.
        resamples: as for `Outcome.interval`.

    Returns:
        `[figures]` each end.

    Raises:
        OutcomeError: no level, a wrong number of draws, or only means were kept.
    """
    check_prompts(outcome, "an interval")
    draws = Draws.read(resamples, seed, "resamples")
    return figures_of(outcome, find_name(outcome.cells, name), figures, read_level(level), draws)


def figure_interval(
    agreement: Agreement, figure: Any, level: Any, seed: Any, resamples: Any
) -> tuple[float, float]:
    """See `Agreement.interval`."""
    if not isinstance(figure, str) or figure not in _FIGURES:
        raise OutcomeError(f"figure must be one of {shown(list(_FIGURES))}, got {shown(figure)}")
    level, draws = read_level(level), Draws.read(resamples, seed, "resamples")
    for outcome in agreement.outcomes:
        check_prompts(outcome, "interval()")
    if min(outcome.count for outcome in agreement.outcomes) < 2:
        return float("nan"), float("nan")
    found = np.array([getattr(drawn, figure) for drawn in _drawn(agreement, draws)])
    found = found[np.isfinite(found)]
    if not len(found):
        return float("nan"), float("nan")
    common = shared(agreement.outcomes)
    if common:
        warn(
            f"{common} of the prompts are in both outcomes and others in one alone: each outcome's "
            "are drawn by themselves, so that the interval is too wide. Compare outcomes of the "
            "same prompts",
            StatisticsWarning,
        )
    tail = tail_of(level, min(outcome.count for outcome in agreement.outcomes))
    low, high = np.quantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _drawn(agreement: Agreement, draws: Draws) -> Iterator[Agreement]:
    """The agreement in prompts that are drawn again."""
    paired = orders(agreement.outcomes)
    # Other draws for prompts that are others.
    seeds = (draws.seed, draws.seed + 1 if paired is None else draws.seed)
    sides = [
        redrawn(_samples(agreement, outcome, order), seed, draws.count)
        for outcome, order, seed in zip(
            agreement.outcomes, paired or (None, None), seeds, strict=True
        )
    ]
    ends = np.cumsum([len(one.index) for one in agreement.sites.values()])[:-1]
    for estimate, exact in zip(*sides, strict=True):
        values = zip(np.split(estimate, ends), np.split(exact, ends), strict=True)
        sites = {
            name: attrs.evolve(one, estimate=own, exact=its)
            for (name, one), (own, its) in zip(agreement.sites.items(), values, strict=True)
        }
        yield attrs.evolve(agreement, sites=sites)


def _samples(agreement: Agreement, outcome: Outcome, order: NDArray[np.int64] | None) -> Samples:
    """The prompts of an outcome, in the cells that are compared."""
    chosen = []
    for name, one in agreement.sites.items():
        key = find_name(outcome.cells, name)
        rows = {tuple(place): row for row, place in enumerate(outcome.cells[key].index.tolist())}
        of_compared = np.array([rows[tuple(place)] for place in one.index.tolist()], dtype=int)
        chosen.append(samples_of(outcome, key, order).cells(of_compared))
    return joined(chosen)
