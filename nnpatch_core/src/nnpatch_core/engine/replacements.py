"""What a patch puts in place of an activation, and at which prompts' positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
from torch import Tensor

from nnpatch_core.seq_pos import Group
from nnpatch_core.site import Location, Site


class Replacement(Protocol):
    """Where the values come from that a sweep puts at its sites."""

    def value(self, site: Site) -> Tensor | None:
        """What to put at `site`: broadcasts to `[batch, positions, ...]`; None is zeros."""
        ...

    def where(self, group: Group) -> Tensor:
        """`[batch, positions]`, bool: which prompts have a value at which position."""
        ...


@attrs.frozen(eq=False)
class Recorded:
    """Activations recorded elsewhere: another run's, or means over a data set.

    Args:
        nnmodel: the model that was run.
        activations: `Site.location` to `[batch or 1, seq, width]`.
        mask: `[batch, seq]`: 1 where the patched run has a token and a value was recorded;
            padding is never patched.
    """

    nnmodel: Any
    activations: Mapping[Location, Tensor]
    mask: Tensor

    def value(self, site: Site) -> Tensor:
        """What was recorded at the site."""
        return site.select(self.activations[site.location], self.nnmodel)

    def where(self, group: Group) -> Tensor:
        """Where there is a token and a value for it."""
        return self.mask[:, list(group)].bool()


@attrs.frozen(eq=False)
class Zeros:
    """Zeros.

    Args:
        mask: `[batch, seq]` of the run that is patched.
    """

    mask: Tensor

    def value(self, site: Site) -> None:
        """None, which stands for zeros."""

    def where(self, group: Group) -> Tensor:
        """Where the run has a token."""
        return self.mask[:, list(group)].bool()
