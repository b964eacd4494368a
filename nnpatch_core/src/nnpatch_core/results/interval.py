"""Intervals and bands: two ends for each value of a grid."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
from torch import Tensor


@attrs.frozen(eq=False)
class Interval:
    """The ends of intervals, each shaped as the values that they are around.

    Args:
        low, high: float64, nan where nothing was swept.

    Examples:
        >>> import torch
        >>> low, high = interval = Interval(torch.tensor([-0.1, 0.4]), torch.tensor([0.2, 0.9]))
        >>> interval.holds(0.0)
        tensor([ True, False])
        >>> interval.width
        tensor([0.3000, 0.5000])
    """

    low: Tensor
    high: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.low, self.high))

    @property
    def width(self) -> Tensor:
        """How far the ends are apart."""
        return self.high - self.low

    def holds(self, value: float | Tensor) -> Tensor:
        """Where a value is inside, bool; nowhere where nothing was swept."""
        return (self.low <= value) & (value <= self.high)
