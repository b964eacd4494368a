"""The protocol of a part of an activation, which has coordinates."""

from __future__ import annotations

from typing import Protocol

import attrs
from torch import Tensor

from nnpatch_core.errors import SubspaceError


class Space(Protocol):
    """A part of activations of one width, told by coordinates."""

    @property
    def width(self) -> int | None:
        """The width of the activations; None where it is not known before they are seen."""
        ...

    @property
    def rank(self) -> int | None:
        """How many coordinates there are; None where it is not known."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """The coordinates `[..., rank]` of activations `[..., width]`."""
        ...

    def decode(self, c: Tensor) -> Tensor:
        """The activations `[..., width]` that coordinates `[..., rank]` stand for."""
        ...

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        """`target` `[..., width]`, with the coordinates of `source`; the rest is its own."""
        ...

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` `[..., width]`, with coordinates `[..., rank]`; the rest is its own."""
        ...


@attrs.frozen
class Limit:
    """To which part of an activation patching is limited.

    Args:
        space: the part.
        by_head: whether it is of each head, or of the component as a whole.
    """

    space: Space
    by_head: bool


def check_width(space: Space, width: int, what: str) -> None:
    """Raise `SubspaceError` where a space is of activations of another width than `what`."""
    if space.width is not None and space.width != width:
        raise SubspaceError(
            f"{space} is of activations {space.width} wide, and {what} is {width} wide: take one "
            "that was made there"
        )
