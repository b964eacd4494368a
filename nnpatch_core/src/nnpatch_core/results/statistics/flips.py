"""The work of chance: the signs of prompts are flipped, for all cells together.

Where a patch does nothing on average, and effects lie around 0 evenly, a prompt's effects could as
well have the other sign. The largest statistic of a draw over all cells (max-T) takes into account
that cells go together: Westfall and Young, "Resampling-Based Multiple Testing" (1993).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nnpatch_core.results.statistics.drawing import chunks, side_by_side, signs
from nnpatch_core.results.statistics.samples import Floats, Samples

#: Sums in another order differ by so much, as a share of the largest that there may be.
_ROUNDING = 1e-9
#: A variance that is less of the squared mean is rounding.
_STILL = 1e-13


def half_widths(
    samples: Samples, counted: NDArray[np.bool_], level: float, seed: int, flips: int
) -> Floats:
    """`[cells]`: how far a band that holds all cells at once reaches to each side.

    Flipped are the residuals, each cell's studentised; the cells' numbers are finite.

    Args:
        samples: the cells in their prompts.
        counted: `[cells]`: the cells that say how many standard errors the band reaches.
        level: of the band.
        seed: of the draws.
        flips: the number of draws.
    """
    residuals = samples.residuals()
    errors = _variance([(each**2).mean(1) for each in residuals], samples.counts)
    residuals = [each[counted] for each in residuals]
    spreads = [(each**2).mean(1) for each in residuals]
    variance = _variance(spreads, samples.counts)
    highest = np.empty(0)
    streams = [signs(count, flips, seed, stream) for stream, count in enumerate(samples.counts)]
    for drawn in side_by_side(streams, flips):
        top = np.zeros(len(drawn[0]))
        for rows in chunks(len(variance), 4 * len(top)):
            means = [
                (each[rows] @ flipped.T) / count
                for each, flipped, count in zip(residuals, drawn, samples.counts, strict=True)
            ]
            left = [
                np.maximum(spread[rows, None] - mean**2, 0)
                for spread, mean in zip(spreads, means, strict=True)
            ]
            moved = np.add.reduce(means)
            top = np.maximum(top, _studentised(moved, _variance(left, samples.counts)))
        highest = np.concatenate([highest, top])
    # One more than drawn, the one that was seen.
    rank = math.ceil(level * (1 + flips))
    most = np.inf if rank > flips else np.partition(highest, rank - 1)[rank - 1]
    with np.errstate(invalid="ignore"):
        return np.where(errors > 0, most * np.sqrt(errors), 0.0)


def raw_pvalues(effects: Floats, seed: int, flips: int) -> tuple[Floats, Floats]:
    """`[cells]` each: p-values of each cell alone, and adjusted for all by the largest.

    Args:
        effects: `[cells, prompts]`, finite.
        seed: of the draws.
        flips: the number of draws.
    """
    # Studentised means grow with these shares, and are in the same order.
    sizes = np.sqrt((effects**2).sum(1, keepdims=True))
    shares = np.divide(effects, sizes, out=np.zeros_like(effects), where=sizes > 0)
    seen = np.abs(shares.sum(1)) - _ROUNDING * math.sqrt(effects.shape[1])
    alone, together = np.zeros((2, len(effects)))
    for drawn in signs(effects.shape[1], flips, seed, 0):
        top = np.zeros(len(drawn))
        for rows in chunks(len(effects), len(drawn)):
            flipped = np.abs(shares[rows] @ drawn.T)
            alone[rows] += (flipped >= seen[rows, None]).sum(1)
            top = np.maximum(top, flipped.max(0))
        top.sort()
        together += len(top) - np.searchsorted(top, seen, side="left")
    return (1 + alone) / (1 + flips), (1 + together) / (1 + flips)


def holm(pvalues: Floats) -> Floats:
    """P-values adjusted for all of them: Holm, "A simple sequentially rejective ..." (1979)."""
    order = np.argsort(pvalues, kind="stable")
    factors = np.arange(len(pvalues), 0, -1)
    adjusted = np.empty_like(pvalues)
    adjusted[order] = np.minimum(np.maximum.accumulate(pvalues[order] * factors), 1)
    return adjusted


def _variance(spreads: list[Floats], counts: tuple[int, ...]) -> Floats:
    """Of the sum of means, given the mean square of each draw's residuals."""
    total = spreads[0] / (counts[0] - 1)
    for spread, count in zip(spreads[1:], counts[1:], strict=True):
        total = total + spread / (count - 1)
    return total


def _studentised(means: Floats, variance: Floats) -> Floats:
    """`[draws]`: the largest size over the cells."""
    sizes = np.abs(means)
    # All of one sign leave no variance but that of rounding.
    still = variance <= _STILL * means**2
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(still, np.where(sizes > 0, np.inf, 0.0), sizes / np.sqrt(variance))
    largest: Floats = ratios.max(0)
    return largest
