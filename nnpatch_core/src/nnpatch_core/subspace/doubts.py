"""Ways in which a subspace does more than it could if it carried what is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnpatch_core.subspace.evaluation import Measured

#: The name of the space that is evaluated, among its controls.
OWN = "subspace"
_CONTROLS = ("random subspace", "random labels", "random model")


def does_more_than_whole(rows: Mapping[str, Measured]) -> bool:
    """Whether it clearly does more than the whole component, of which it is a part."""
    return rows[OWN].accuracy.low > rows["whole component"].accuracy.high


def rivals_of(rows: Mapping[str, Measured]) -> tuple[str, ...]:
    """The controls that may do as well."""
    own = rows[OWN].accuracy
    return tuple(
        name
        for name in _CONTROLS
        if name in rows and rows[name].accuracy.high >= own.low and own.value > 0
    )
