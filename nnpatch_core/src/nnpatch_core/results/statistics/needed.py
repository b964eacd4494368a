"""The number of prompts that an interval of some width needs."""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

from nnpatch_core.results.statistics.samples import Floats

_MOST = 2**40


def prompts_needed(deviations: Floats, width: float, level: float) -> Floats:
    """The fewest prompts whose interval, by Student's t, is no wider; inf where none is told.

    Args:
        deviations: of a value by one prompt: the standard error times the root of their number.
        width: from end to end.
        level: of the interval.
    """
    finite = np.isfinite(deviations)
    spread = np.where(finite, deviations, 0.0)
    low, high = np.full(spread.shape, 2.0), np.full(spread.shape, float(_MOST))
    while (low < high).any():
        middle = np.floor((low + high) / 2)
        reach = 2 * stdtrit(middle - 1, (1 + level) / 2) * spread / np.sqrt(middle)
        fits = reach <= width
        high, low = np.where(fits, middle, high), np.where(fits, low, middle + 1)
        low = np.minimum(low, high)
    needed: Floats = np.where(finite & (high < _MOST), high, np.inf)
    return np.where(np.isnan(deviations), np.nan, needed)
