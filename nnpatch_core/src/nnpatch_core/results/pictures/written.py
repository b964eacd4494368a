"""Numbers as pictures show them."""

from __future__ import annotations

import math

import numpy as np

from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.words import in_digits


def written(value: float, limit: float) -> str:
    """A value in a cell: two digits after the point, or what the scale needs.

    Examples:
        >>> written(0.123, 1.0), written(-0.004, 1.0), written(12.3, 20.0), written(1e-5, 1e-4)
        ('0.12', '0', '12.3', '1e-05')
    """
    digits = 2 - math.floor(math.log10(limit) + 1e-9)
    if digits > 4 or digits < -3:
        return f"{value:.0e}"
    text = f"{value:.{max(digits, 0)}f}"
    return "0" if not float(text) else text


def told(panel: Panel, up: int, across: int) -> str:
    """The words on a cell under the mouse: its value, with the ends of its band."""
    words = in_digits(panel.values[up, across])
    if panel.band is not None and not np.isnan(panel.band[0, up, across]):
        low, high = panel.band[:, up, across]
        words += f" ({in_digits(low)} to {in_digits(high)})"
    return words
