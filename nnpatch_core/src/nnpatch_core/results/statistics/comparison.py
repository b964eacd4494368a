"""Figures of an estimate beside what is exact: two arrays `[cells]` of finite values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Spearman's rank correlation; nan for fewer than 2 cells, or a constant."""
    # Ranks have the mean (n + 1) / 2, ties or not.
    first, second = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    spread = float(np.sqrt((first @ first) * (second @ second)))
    return float(first @ second) / spread if spread else float("nan")


def recall(estimate: NDArray[np.float64], exact: NDArray[np.float64], k: int) -> float:
    """The share of the `k` largest exact sizes that are the estimate's too; nan without cells.

    Cells that tie for the last places have an equal part of a place each.
    """
    if not len(exact):
        return float("nan")
    shared = np.minimum(_places(estimate, k), _places(exact, k)).sum()
    return min(float(shared) / k, 1.0)


def sign_agreement(estimate: NDArray[np.float64], exact: NDArray[np.float64], k: int) -> float:
    """The share of the `k` largest exact sizes that the estimate gives their sign.

    A cell that is exactly 0 has none and does not count; where all are, the share is nan.
    """
    if not exact.any():
        return float("nan")
    weights = np.where(exact == 0, 0.0, _places(exact, k))
    same = np.sign(estimate) == np.sign(exact)
    return float(weights[same].sum() / weights.sum())


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; tied values have the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    means: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return means[group]


def _places(values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Each cell's part of the `k` places for the largest sizes; those tied at the edge share."""
    sizes = np.abs(values)
    edge = np.sort(sizes)[-k]
    above, tied = sizes > edge, sizes == edge
    places: NDArray[np.float64] = above + tied * ((k - above.sum()) / tied.sum())
    return places
