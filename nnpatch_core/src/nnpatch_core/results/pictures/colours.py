"""Colours that do not depend on telling red from green."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

#: From -limit to limit, through white at 0: ColorBrewer's RdBu.
DIVERGING = (
    "#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
    "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061",
)  # fmt: skip
#: Where nothing was swept.
NOT_SWEPT = "#c4c4c4"
#: Of lines that matter less, and of what stands behind the data.
FAINT, GUIDE = "#b8b8b8", "#999999"
#: Of what is written and drawn around the data.
INK, PAPER = "#222222", "#ffffff"
# Those of Okabe and Ito.
_NAMED = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555", "#b5a800",
)  # fmt: skip
#: What is washed out keeps so much of its colour; the rest is a light grey.
_KEPT, _WASH = 0.28, "#e6e6e6"
#: From this share of the limit on, a colour is so dark that letters on it are white.
_DARK = 0.55


def washed(colour: str) -> str:
    """A colour, washed out towards a light grey.

    Examples:
        >>> washed("#000000"), washed("#e6e6e6")
        ('#a6a6a6', '#e6e6e6')
    """
    pairs = zip(_parts(colour), _parts(_WASH), strict=True)
    return _hexadecimal([_KEPT * one + (1 - _KEPT) * other for one, other in pairs])


def ink(share: float, is_washed: bool) -> str:
    """The colour of letters on a cell whose value is this share of the limit."""
    return PAPER if abs(share) > _DARK and not is_washed else INK


def distinct(count: int) -> list[str]:
    """As many colours, no two alike."""
    if count <= len(_NAMED):
        return list(_NAMED[:count])
    hues = (colorsys.hsv_to_rgb(number / count, 0.75, 0.8) for number in range(count))
    return [_hexadecimal([255 * part for part in hue]) for hue in hues]


def _parts(colour: str) -> list[int]:
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def _hexadecimal(parts: Sequence[float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in parts)
