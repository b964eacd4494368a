"""The key of a picture: what widths, colours and dashes mean."""

from __future__ import annotations

import math

import attrs

from nnpatch_core.circuits.pictures.shown import Shown
from nnpatch_core.results import in_digits


@attrs.frozen
class Entry:
    """A sample edge.

    Args:
        score: of it.
        words: beside it.
        dashed: whether it is drawn so.
    """

    score: float
    words: str
    dashed: bool = False


def key_of(shown: Shown) -> tuple[Entry, ...]:
    """The samples; none if no edge has a score."""
    if not shown.scored:
        return ()
    signs = [link.score < 0 for link in shown.links if not math.isnan(link.score)]
    most = -shown.largest if signs[0] else shown.largest
    sizes = [most, most / 4, *([-most / 4] if len(set(signs)) > 1 else [])]
    entries = [Entry(size, in_digits(size)) for size in sizes]
    if shown.mixed:
        entries.append(Entry(most / 4, "estimate", dashed=True))
    return tuple(entries)
