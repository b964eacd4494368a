"""A share of prompts, and how sure it is."""

from __future__ import annotations

import attrs
from scipy.stats import norm
from torch import Tensor

_LEVEL = 0.95


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
        squared = float(norm.ppf((1 + _LEVEL) / 2)) ** 2
        middle = (share + squared / (2 * count)) / (1 + squared / count)
        spread = share * (1 - share) / count + squared / (4 * count**2)
        half = (squared * spread) ** 0.5 / (1 + squared / count)
        return cls(share, max(middle - half, 0.0), min(middle + half, 1.0), count)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"
