"""Pointwise intervals: bias-corrected and accelerated bootstrap of a ratio of means.

Efron, "Better bootstrap confidence intervals" (1987), at the wider level that makes up for few
prompts, of Hesterberg, "What teachers should know about the bootstrap" (2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from nnpatch_core.results.statistics.drawing import chunks, counts, side_by_side
from nnpatch_core.results.statistics.samples import Floats, Samples

#: Figures of all cells together: of values `[cells, n]` they are `[figures, n]`.
Figures: TypeAlias = Callable[[Floats], Floats]
#: Sums in another order differ by so much, as a share of their terms' sizes.
_ROUNDING = 1e-12


def intervals(
    samples: Samples, level: float, seed: int, resamples: int, *, wider: bool = False
) -> tuple[Floats, Floats]:
    """The ends of each cell's interval, `[cells]` each; nan where its numbers are not finite.

    Prompts are drawn again, a pair as one unit, and the ratio of means is computed anew. Of fewer
    than two prompts nothing is known, nor where the denominator may be 0.
    """
    values = samples.values()
    finite = np.isfinite(values)
    low, high = np.full((2, len(values)), np.nan)
    if min(samples.counts) < 2 or denominator_may_be_zero(samples, level, seed, resamples):
        low[finite], high[finite] = -np.inf, np.inf
        return low, high
    (found,) = np.nonzero(finite)
    tail = tail_of(level, min(samples.counts))
    for part in chunks(len(found), resamples):
        rows = found[part]
        ends = _bca(samples.cells(rows), tail, seed, resamples)
        low[rows], high[rows] = ends
    if wider:
        half = student(min(samples.counts), level) * samples.standard_errors()
        low, high = np.minimum(low, values - half), np.maximum(high, values + half)
    return low, high


def figure_intervals(
    samples: Samples, figures: Figures, level: float, seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """The ends of the interval of each figure, `[figures]` each, as `intervals` has those of cells.

    All cells are drawn together, and the figures are computed anew of each draw.

    Args:
        samples: of the same prompts.
        figures: none moves further than the cell that moves most.
        level: as in `intervals`, and so are the draws.
        seed: of the draws.
        resamples: how many there are.
    """
    values = figures(samples.values()[:, None])[:, 0]
    finite = np.isfinite(values)
    low, high = np.full((2, len(values)), np.nan)
    if min(samples.counts) < 2 or denominator_may_be_zero(samples, level, seed, resamples):
        low[finite], high[finite] = -np.inf, np.inf
        return low, high
    (without,) = samples.without_each()
    ends = _ends(
        values,
        np.concatenate([figures(block) for block in resampled(samples, seed, resamples)], axis=1),
        np.broadcast_to(_grain(samples).max(), values.shape),
        _acceleration(samples.counts, [figures(without)]),
        tail_of(level, min(samples.counts)),
    )
    low[finite], high[finite] = (end[finite] for end in ends)
    return low, high


def denominator_may_be_zero(samples: Samples, level: float, seed: int, resamples: int) -> bool:
    """Tell whether the interval of a mean of `whole` holds 0."""
    for whole in samples.wholes():
        mean, part = whole.values(), whole.parts[0].changes
        if not np.isfinite(mean).all() or mean[0] == 0:
            return True
        if (part == part[0, 0]).all():
            continue
        tail = tail_of(level, min(whole.counts))
        low, high = _bca(whole, tail, seed, resamples)
        if low[0] <= 0 <= high[0]:
            return True
    return False


def tail_of(level: float, count: int) -> float:
    """The share of draws beyond each end: as Student's t would have it for so many prompts."""
    wide = math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + level) / 2)
    return float(ndtr(-wide))


def student(count: int, level: float, cells: int = 1) -> float:
    """How many standard errors an interval of so many prompts reaches to each side, by Student's t.

    That of several cells holds in all of them at once, by Bonferroni.
    """
    return float(stdtrit(count - 1, 1 - (1 - level) / (2 * cells)))


def too_few(level: float, count: int) -> bool:
    """Tell whether an end is a draw of one prompt alone, beyond which resampling cannot see."""
    return tail_of(level, count) < float(count) ** -count


def resampled(samples: Samples, seed: int, resamples: int) -> Iterator[Floats]:
    """Blocks `[cells, some resamples]`: the values of prompts that are drawn again."""
    streams = [
        counts(count, resamples, seed, stream) for stream, count in enumerate(samples.counts)
    ]
    for drawn in side_by_side(streams, resamples):
        for rows in chunks(len(drawn[0]), len(samples.parts[0].changes)):
            total = np.zeros((len(samples.parts[0].changes), rows.stop - rows.start))
            for each, parts in zip(drawn, samples.drawn, strict=True):
                for part in parts:
                    with np.errstate(divide="ignore", invalid="ignore"):
                        ratios = (part.changes @ each[rows].T) / (each[rows] @ part.whole)
                    total += part.weight * ratios
            yield total


def redrawn(samples: Samples, seed: int, resamples: int) -> Iterator[Floats]:
    """For each draw of prompts the values, `[cells]`."""
    for block in resampled(samples, seed, resamples):
        yield from block.T


def _bca(samples: Samples, tail: float, seed: int, resamples: int) -> tuple[Floats, Floats]:
    drawn = np.concatenate(list(resampled(samples, seed, resamples)), axis=1)
    skew = _acceleration(samples.counts, samples.without_each())
    return _ends(samples.values(), drawn, _grain(samples), skew, tail)


def _ends(
    values: Floats, drawn: Floats, grain: Floats, skew: Floats, tail: float
) -> tuple[Floats, Floats]:
    """The ends of bias-corrected and accelerated intervals.

    Args:
        values: `[cells]`, of all prompts.
        drawn: `[cells, resamples]`, of prompts drawn again; it is sorted.
        grain: `[cells]`: what differs by no more is one value.
        skew: `[cells]`, the acceleration.
        tail: the share of draws beyond each end.
    """
    resamples = drawn.shape[1]
    # A draw that equals the value, as one of each prompt once, is half below it.
    low, high = (values - grain)[:, None], (values + grain)[:, None]
    below = ((drawn < low).mean(1) + (drawn <= high).mean(1)) / 2
    bias = ndtri(np.clip(below, 0.5 / resamples, 1 - 0.5 / resamples))
    drawn.sort(axis=1)
    ends = []
    for normal in (ndtri(tail), -ndtri(tail)):
        moved = bias + normal
        shrunk = 1 - skew * moved
        # Beyond the pole the end is the last draw on its side.
        with np.errstate(divide="ignore", invalid="ignore"):
            at = np.where(shrunk > 0, ndtr(bias + moved / shrunk), (moved > 0).astype(float))
        ends.append(_quantiles(drawn, at))
    return ends[0], ends[1]


def _grain(samples: Samples) -> Floats:
    """`[cells]`: how far two values may be apart that are one but for rounding."""
    sizes = [
        np.abs(part.weight * part.changes).mean(1) / np.abs(part.whole.mean())
        for part in samples.parts
    ]
    grain: Floats = _ROUNDING * np.add.reduce(sizes)
    return grain


def _acceleration(counts: Sequence[int], left: Sequence[Floats]) -> Floats:
    """`[cells]`, by the jackknife; 0 for a cell that no prompt moves.

    Args:
        counts: of each draw the number of prompts.
        left: for each draw `[cells, prompts]`, the value without each prompt.
    """
    cubes: Floats = np.zeros(1)
    squares: Floats = np.zeros(1)
    for count, without in zip(counts, left, strict=True):
        pulls = (without.mean(1, keepdims=True) - without) * (count - 1) / count
        cubes, squares = cubes + (pulls**3).sum(1), squares + (pulls**2).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        skew = cubes / (6 * squares**1.5)
    return np.where(np.isfinite(skew), skew, 0.0)


def _quantiles(ordered: Floats, shares: Floats) -> Floats:
    """A quantile of each row, between two draws where it falls between them."""
    at = shares * (ordered.shape[1] - 1)
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, ordered.shape[1] - 1)
    rows = np.arange(len(ordered))
    low, high = ordered[rows, below], ordered[rows, above]
    with np.errstate(invalid="ignore"):
        between: Floats = np.where(low == high, low, low + (at - below) * (high - low))
    return between
