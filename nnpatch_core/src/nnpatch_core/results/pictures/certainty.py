"""How sure values are: the bands of a picture, computed once for all that it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


@attrs.frozen(eq=False)
class Certainty:
    """What is known of the values of a picture.

    Args:
        bands: site name to `[2, *shape]`, nan where nothing is known; empty if that is everywhere.
        lacks: why there are none, in words; empty if there are.
    """

    bands: Mapping[str, NDArray[np.float64]]
    lacks: str = ""


def certainty(
    outcome: Outcome, names: Sequence[str], level: float, *, together: bool = True
) -> Certainty:
    """The bands of an outcome's values.

    Args:
        outcome: the outcome.
        names: the site names that are drawn.
        level: of the bands.
        together: whether a band holds for all cells together; if not, for each alone.
    """
    count, percent = outcome.count, share(level)
    if outcome.moments is not None:
        return Certainty({}, f"the means of {count} prompts alone do not tell")
    if outcome.magnitude:
        return Certainty({}, "sizes are above 0 by themselves")
    # So few signs can be flipped in so few ways that none of them is rare.
    needed = math.ceil(1 - math.log2(1 - level) - 1e-9)
    if count < needed:
        prompts = "1 prompt is" if count == 1 else f"{count} prompts are"
        return Certainty({}, f"{prompts} too few at {percent} (it takes {needed})")
    return Certainty(_bands(outcome, names, level, together))


def share(level: float) -> str:
    """A level in percent.

    Examples:
        >>> share(0.95), share(0.999)
        ('95 %', '99.9 %')
    """
    return f"{100 * level:.6g} %"


def _bands(
    outcome: Outcome, names: Sequence[str], level: float, together: bool
) -> dict[str, NDArray[np.float64]]:
    """STUB until Outcome.band is there."""
    made = {}
    for name in names:
        values = torch.where(outcome.swept(name), outcome[name].double(), torch.nan)
        values = torch.where(outcome.elided(name), torch.nan, values)
        error = (3.5 if together else 2.0) * outcome.standard_error(name)
        made[name] = torch.stack([values - error, values + error]).numpy()
    return made
