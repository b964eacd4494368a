"""Numbers in order, as people write them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def ranges(numbers: Iterable[int], to: str = "-") -> str:
    """Numbers in order, those that follow one another drawn together.

    Examples:
        >>> ranges([0, 1, 2, 5]), ranges([0, 1, 2, 5], " to ")
        ('0-2, 5', '0 to 2, 5')
    """
    runs = groupby(enumerate(numbers), lambda each: each[1] - each[0])
    found = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}{to}{run[-1]}" for run in found)
