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
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{span[0]}{to}{span[-1]}" if span[1:] else str(span[0]) for span in spans)
