"""What a patch puts in place of an activation, and in which prompts' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs
from torch import Tensor

from nnpatch_core.site import Location


class Replacement(Protocol):
    """Where the values come from that a sweep puts at its sites."""

    @property
    def mask(self) -> Tensor:
        """`[batch, seq]`: 1 where a token is patched, 0 where it stays, as padding does."""
        ...

    def at(self, location: Location) -> Tensor | None:
        """What there is for a whole activation, `[batch or 1, seq, width]`; None is zeros."""
        ...


@attrs.frozen(eq=False)
class Recorded:
    """Activations recorded elsewhere: another run's, or means over a data set.

    Args:
        activations: `Site.location` to `[batch or 1, seq, width]`.
        mask: `[batch, seq]`: 1 where the patched run has a token and a value was recorded.
    """

    activations: Mapping[Location, Tensor]
    mask: Tensor

    def at(self, location: Location) -> Tensor:
        """What was recorded there."""
        return self.activations[location]


@attrs.frozen(eq=False)
class Zeros:
    """Zeros.

    Args:
        mask: `[batch, seq]`: 1 where the patched run has a token.
    """

    mask: Tensor

    def at(self, location: Location) -> None:
        """None, which stands for zeros."""
