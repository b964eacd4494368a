"""How sure values are: the bands of a picture, computed once for all that it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core.results.statistics import Draws, Figured, bands_of, doubts, interval_of

#: As by default of `Outcome.band` and `Outcome.interval`.
_DRAWS = Draws(10_000, 0)


@attrs.frozen(eq=False)
class Certainty:
    """How far the values of a picture are known.

    Args:
        bands: site name to `[2, *shape]`, nan where nothing was swept, or a cell is known; empty if
            nothing is known of any.
        lacks: why there are none, in words; empty if there are.
        doubt: what is to be said of them.
    """

    bands: Mapping[str, NDArray[np.float64]]
    lacks: str = ""
    doubt: str = ""


def certainty(figured: Figured, names: Sequence[str], level: float, *, together: bool) -> Certainty:
    """The bands of an outcome's values.

    Args:
        figured: the outcome, or a combination of outcomes.
        names: the site names that are drawn.
        level: of the bands.
        together: whether a band holds for all cells together; if not, for each alone.
    """
    count = figured.count
    if any(term.outcome.moments is not None for term in figured.terms):
        return Certainty({}, f"only means of the {count} prompts were kept")
    if figured.magnitude:
        return Certainty({}, "sizes are above 0 without any effect")
    # So few signs can be flipped in so few ways that none of them is rare.
    needed = math.ceil(1 - math.log2(1 - level) - 1e-9)
    if count < needed:
        prompts = "1 prompt is" if count == 1 else f"{count} prompts are"
        return Certainty({}, f"{prompts} too few at {share(level)}, it takes {needed}")
    doubt = doubts(figured, level, _DRAWS)
    found = (
        bands_of(figured, names, level, _DRAWS)
        if together
        else {name: interval_of(figured, name, level, _DRAWS) for name in names}
    )
    bands = {}
    for name in names:
        cells = figured.cells[name]
        known = cells.place(cells.known.all(-1), False).numpy()
        ends = np.stack([end.numpy() for end in found[name]])
        bands[name] = np.where(known, np.nan, ends)
    if any(np.isinf(ends).any() for ends in bands.values()):
        return Certainty({}, doubt)
    return Certainty(bands, doubt=doubt)


def share(level: float) -> str:
    """A level in percent.

    Examples:
        >>> share(0.95), share(0.999)
        ('95 %', '99.9 %')
    """
    return f"{100 * level:.6g} %"
