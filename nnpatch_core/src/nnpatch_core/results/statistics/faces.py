"""The statistics of outcomes, and of combinations of them: which cells, and where figures stand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.interval import Interval
from nnpatch_core.results.statistics import flips as flipping
from nnpatch_core.results.statistics import intervals as resampling
from nnpatch_core.results.statistics.ranking import shares_among_largest
from nnpatch_core.results.statistics.samples import Floats, Samples, joined, samples_of, shared
from nnpatch_core.results.statistics.values import Figured

#: How p-values may be adjusted for the number of cells.
ADJUSTMENTS = ("holm", "bh", "max_t", None)
_Ends: TypeAlias = tuple[Floats, Floats]
_FEWEST, _MOST = 100, 10**7


@attrs.frozen
class Draws:
    """How numbers are drawn.

    Args:
        count: how many times.
        seed: of the draws.
    """

    count: int
    seed: int

    @classmethod
    def read(cls, count: Any, seed: Any, name: str) -> Draws:
        """The draws that a user asks for; `name` is the argument of their number.

        Raises:
            OutcomeError: too few, too many, or no seed.
        """
        count, seed = strict_int(count, name, OutcomeError), strict_int(seed, "seed", OutcomeError)
        if not _FEWEST <= count <= _MOST:
            raise OutcomeError(f"{name} must be from {_FEWEST} to {_MOST}, got {count}")
        if seed < 0:
            raise OutcomeError(f"seed must be at least 0, got {seed}")
        return cls(count, seed)


def read_level(level: Any) -> float:
    """The level that a user asks for.

    Raises:
        OutcomeError: not between 0 and 1.
    """
    number = isinstance(level, int | float | np.floating) and not isinstance(level, bool)
    if not number or not 0 < level < 1:
        raise OutcomeError(f"level must be between 0 and 1, such as 0.95, got {shown(level)}")
    return float(level)


def interval_of(
    figured: Figured, name: str, level: float, draws: Draws, *, wider: bool = False
) -> Interval:
    """The interval of each cell; see `Outcome.interval`."""
    samples = samples_of(figured, name)
    ends = resampling.intervals(samples, level, draws.seed, draws.count, wider=wider)
    return _placed(figured, name, ends)


def figures_of(
    figured: Figured, name: str, figures: resampling.Figures, level: float, draws: Draws
) -> Interval:
    """The interval of each figure of all cells of a site name together, `[figures]` each end."""
    samples = samples_of(figured, name)
    ends = resampling.figure_intervals(samples, figures, level, draws.seed, draws.count)
    return Interval(*map(torch.from_numpy, ends))


def ends_of(
    figured: Figured, name: str, rows: Sequence[int], level: float, draws: Draws
) -> tuple[Floats, Floats]:
    """The ends of the intervals of some cells of a site name alone, by their numbers."""
    samples = samples_of(figured, name).cells(np.array(rows, dtype=np.int64))
    return resampling.intervals(samples, level, draws.seed, draws.count)


def bands_of(
    figured: Figured, names: Sequence[str], level: float, draws: Draws, *, wider: bool = False
) -> dict[str, Interval]:
    """The bands of all cells of some site names at once; see `Outcome.band`."""
    samples, lengths = _joined(figured, names)
    values = samples.values()
    finite = np.isfinite(values)
    known = np.concatenate([_known(figured, name) for name in names])
    low, high = np.full((2, len(values)), np.nan)
    if not _told(samples, level, draws):
        low[finite], high[finite] = -np.inf, np.inf
    else:
        low[finite], high[finite] = values[finite], values[finite]
        family = finite & ~known
        if family.any():
            own = samples.cells(family)
            half = flipping.half_widths(own, own.varies(), level, draws.seed, draws.count)
            if wider:
                reach = resampling.student(min(own.counts), level, int(own.varies().sum()) or 1)
                half = np.maximum(half, reach * own.standard_errors())
            low[family], high[family] = values[family] - half, values[family] + half
    ends = zip(_split(low, lengths), _split(high, lengths), strict=True)
    return {name: _placed(figured, name, each) for name, each in zip(names, ends, strict=True)}


def pvalues_of(
    figured: Figured, names: Sequence[str], adjust: str | None, draws: Draws
) -> dict[str, Tensor]:
    """The p-values of the measured cells of some site names; see `Outcome.pvalues`.

    Raises:
        OutcomeError: what has none: sizes, estimates alone, samples of different prompts.
    """
    if not (adjust is None or (isinstance(adjust, str) and adjust in ADJUSTMENTS)):
        raise OutcomeError(f"adjust must be one of {shown(list(ADJUSTMENTS))}, got {shown(adjust)}")
    terms = figured.terms
    if any(term.outcome.magnitude for term in terms):
        raise OutcomeError(
            "sizes have no p-values: a mean size is above 0 without any effect. Take those of the "
            "outcome with signs, or look at out.interval(...)"
        )
    samples, lengths = _joined(figured, names)
    if not samples.paired:
        raise OutcomeError(
            "these outcomes have different prompts, whose signs cannot be flipped together: look "
            "at .interval(...) and .band(...), for which each side is drawn by itself"
        )
    measured = np.concatenate([_measured(figured, name) for name in names])
    if len(terms) == 1 and not measured.any() and terms[0].outcome.estimated:
        raise OutcomeError(
            f"no cell of {shown(list(names))} was measured: p-values are of measured cells. How "
            "far an estimate varies with the prompts says out.interval(...)"
        )
    effects = samples.effects()
    family = np.isfinite(effects).all(1) & measured
    found = np.full(len(effects), np.nan)
    if family.any():
        # Without the rounding of cells that nothing moves.
        moves = np.where(samples.moves()[family, None], effects[family], 0.0)
        alone, together = flipping.raw_pvalues(moves, draws.seed, draws.count)
        found[family] = _adjusted(alone, together, adjust)
    return {
        name: figured.cells[name].place(torch.from_numpy(each.copy()), float("nan"))
        for name, each in zip(names, _split(found, lengths), strict=True)
    }


def top_shares(
    figured: Figured, names: Sequence[str], kept: Sequence[NDArray[np.bool_]], k: int, draws: Draws
) -> list[Floats]:
    """For each site name `[cells]`: in which share of draws a cell is one of the `k` largest.

    Args:
        figured: an outcome, or a combination.
        names: the site names.
        kept: for each the cells that take part; the share of the others is nan.
        k: the number of largest cells.
        draws: of prompts.
    """
    samples, lengths = _joined(figured, names)
    takes_part = np.concatenate(kept) & np.isfinite(samples.values())
    shares = np.full(len(takes_part), np.nan)
    if takes_part.any():
        rows = samples.cells(takes_part)
        shares[takes_part] = shares_among_largest(rows, k, draws.seed, draws.count)
    return list(_split(shares, lengths))


def doubts(figured: Figured, level: float, draws: Draws) -> str:
    """The reason why intervals are infinite, or narrower than they should be; empty if none."""
    samples = samples_of(figured, next(iter(figured.cells)))
    few = min(samples.counts)
    if few < 2:
        return "there is one prompt, which says nothing about others: every interval is (-inf, inf)"
    if resampling.denominator_may_be_zero(samples, level, draws.seed, draws.count):
        return any_value(level)
    common = shared([term.outcome for term in figured.terms])
    if common:
        prompts = "1 prompt is" if common == 1 else f"{common} prompts are"
        return (
            f"{prompts} in outcomes that do not have all prompts in common: each outcome's are "
            "drawn by themselves, so that intervals of a sum are too narrow and those of a "
            "difference too wide. Take outcomes of all the same prompts, or of none"
        )
    if resampling.too_few(level, few):
        return (
            f"{few} prompts are too few to draw {level:.0%} intervals from: these reach from the "
            "least to the largest that a prompt has, and hold the truth less often than they say"
        )
    return ""


def any_value(level: float) -> str:
    """The words on a denominator whose interval holds 0."""
    return (
        "the source and the target run may not differ at all in the metric with prompts like "
        f"these (the {level:.0%} interval of their mean difference holds 0), so that a value "
        "may be anything: every interval is (-inf, inf)"
    )


def least_pvalue(cells: int, prompts: int, adjust: str | None, draws: Draws) -> float:
    """The least p-value that so many cells, prompts and draws can have."""
    least = max(2.0 ** (1 - prompts), 1 / (1 + draws.count))
    return min(1.0, least * cells) if adjust == "holm" else least


def _told(samples: Samples, level: float, draws: Draws) -> bool:
    """Tell whether anything can be said of a value with other prompts."""
    if min(samples.counts) < 2:
        return False
    return not resampling.denominator_may_be_zero(samples, level, draws.seed, draws.count)


def _adjusted(alone: Floats, together: Floats, adjust: str | None) -> Floats:
    if adjust == "max_t":
        return together
    if adjust == "holm":
        return flipping.holm(alone)
    if adjust == "bh":
        # Of Benjamini and Hochberg; it takes a third of a second to import.
        from scipy.stats import false_discovery_control

        adjusted: Floats = false_discovery_control(alone)
        return adjusted
    return alone


def _joined(figured: Figured, names: Sequence[str]) -> tuple[Samples, list[int]]:
    """The cells of several site names as one sample, and how many each has."""
    each = [samples_of(figured, name) for name in names]
    return joined(each), [len(one.parts[0].changes) for one in each]


def _split(values: Floats, lengths: Iterable[int]) -> Iterable[Floats]:
    return np.split(values, np.cumsum(list(lengths))[:-1])


def _known(figured: Figured, name: str) -> NDArray[np.bool_]:
    known: NDArray[np.bool_] = figured.cells[name].known.all(-1).numpy()
    return known


def _measured(figured: Figured, name: str) -> NDArray[np.bool_]:
    # A difference from an estimate is one that the user asked for.
    alone = len(figured.terms) == 1
    exact = figured.cells[name].exact.numpy()
    measured: NDArray[np.bool_] = (exact | (not alone)) & ~_known(figured, name)
    return measured


def _placed(figured: Figured, name: str, ends: _Ends) -> Interval:
    place: Callable[[Tensor, float], Tensor] = figured.cells[name].place
    low, high = (place(torch.from_numpy(np.ascontiguousarray(end)), float("nan")) for end in ends)
    return Interval(low, high)
