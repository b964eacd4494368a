"""What a patch puts in place of an activation, and in which prompts' tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
from torch import Tensor

from nnpatch_core.site import Location, Site


class Replacement(Protocol):
    """Where the values come from that a sweep puts at its sites."""

    @property
    def mask(self) -> Tensor:
        """`[batch, seq]`: 1 where a token is patched, 0 where it stays, as padding does."""
        ...

    def value(self, site: Site) -> Tensor | None:
        """What to put at `site`: `[batch or 1, positions, ...]`; None is zeros."""
        ...


@attrs.frozen(eq=False)
class Recorded:
    """Activations recorded elsewhere: another run's, or means over a data set.

    Args:
        nnmodel: the model that was run.
        activations: `Site.location` to `[batch or 1, seq, width]`.
        mask: `[batch, seq]`: 1 where the patched run has a token and a value was recorded.
    """

    nnmodel: Any
    activations: Mapping[Location, Tensor]
    mask: Tensor

    def value(self, site: Site) -> Tensor:
        """What was recorded at the site."""
        return site.select(self.activations[site.location(self.nnmodel)], self.nnmodel)


@attrs.frozen(eq=False)
class Zeros:
    """Zeros.

    Args:
        mask: `[batch, seq]`: 1 where the patched run has a token.
    """

    mask: Tensor

    def value(self, site: Site) -> None:
        """None, which stands for zeros."""
