"""The largest cells, in prompts that are drawn again."""

from __future__ import annotations

import numpy as np

from nnpatch_core.results.statistics.intervals import resampled
from nnpatch_core.results.statistics.samples import Floats, Samples


def shares_among_largest(samples: Samples, k: int, seed: int, resamples: int) -> Floats:
    """`[cells]`: in which share of draws a cell is one of the `k` of largest size."""
    cells = len(samples.parts[0].changes)
    if k >= cells:
        return np.ones(cells)
    seen = np.zeros(cells)
    for drawn in resampled(samples, seed, resamples):
        # A draw whose value is nan says nothing for the cell.
        sizes = np.nan_to_num(np.abs(drawn.T), nan=-1.0, posinf=np.inf)
        largest = np.argpartition(sizes, cells - k, axis=1)[:, cells - k :]
        seen += np.bincount(largest.ravel(), minlength=cells)
    return seen / resamples
