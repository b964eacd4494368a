"""A share of prompts, and how sure it is."""

from __future__ import annotations

import attrs
from scipy.stats import norm
from torch import Tensor

from nnpatch_core.errors import OutcomeError

_LEVEL = 0.95


def check_level(level: float) -> None:
    """Raise `OutcomeError` for a level that the intervals of subspaces do not have."""
    if level != _LEVEL:
        raise OutcomeError(f"the intervals of a subspace are of level {_LEVEL}, got {level}")


@attrs.frozen
class Proportion:
    """A share, with the interval of Wilson (1927), which holds for few prompts too.

    Args:
        value: the share.
        low: the lower end of the 95 percent interval.
        high: the upper end.
        count: of how many prompts.
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, hits: Tensor) -> Proportion:
        """The share of `[prompts]` that are hits; several draws of each, `[draws, prompts]`.

        Draws are averaged, and the prompts count once.
        """
        count = hits.shape[-1]
        share = float(hits.double().mean())
        squared = _squared()
        middle = (share + squared / (2 * count)) / (1 + squared / count)
        half = _half(share, count)
        return cls(share, max(middle - half, 0.0), min(middle + half, 1.0), count)

    def needed(self, width: float) -> int:
        """The fewest prompts whose interval of this share is no wider, end to end.

        Examples:
            >>> Proportion(0.5, 0.3, 0.7, 20).needed(0.2)
            93
        """
        low, high = 1, 2**40
        while low < high:
            middle = (low + high) // 2
            if 2 * _half(self.value, middle) <= width:
                high = middle
            else:
                low = middle + 1
        return low

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _squared() -> float:
    """The square of the normal quantile of the level."""
    return float(norm.ppf((1 + _LEVEL) / 2)) ** 2


def _half(share: float, count: int) -> float:
    """Half the width of the interval of a share of so many prompts."""
    squared = _squared()
    spread = share * (1 - share) / count + squared / (4 * count**2)
    return float((squared * spread) ** 0.5 / (1 + squared / count))
