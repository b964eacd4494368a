"""The protocol of a part of an activation, which has coordinates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.errors import PatchingError, SubspaceError


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

    # By identity: a space of the user's own may be unhashable, or compare by tensors.
    space: Space = attrs.field(eq=id)
    by_head: bool


def check_width(space: Space, width: int, what: str) -> None:
    """Raise `SubspaceError` where a space is of activations of another width than `what`."""
    if space.width is not None and space.width != width:
        raise SubspaceError(
            f"{space} is of activations {space.width} wide, and {what} is {width} wide: take one "
            "that was made there"
        )


def check_activation(space: Space, x: Any, what: str) -> None:
    """Raise `SubspaceError` unless `x` is a tensor of real numbers, as wide as they must be."""
    if not isinstance(x, Tensor) or not x.ndim or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else shown(x)
        raise SubspaceError(f"{what} must be a tensor of real numbers [..., width], got {got}")
    check_width(space, x.shape[-1], what)


def check_expands(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise `SubspaceError` where a value is of another shape, and cannot be expanded to it."""
    if not isinstance(value, Tensor):
        raise SubspaceError(f"{name} must be a tensor, got {shown(value)}")
    own = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
    fits = len(own) == len(shape) and all(
        each in (1, wanted) for each, wanted in zip(own, shape, strict=True)
    )
    if not fits:
        raise SubspaceError(
            f"{name} must have the shape {list(shape)}, or one that expands to it, got "
            f"{list(value.shape)}"
        )


@contextmanager
def naming(space: Any, does: str, x: Tensor) -> Iterator[None]:
    """Whatever goes wrong in code of the user's is an error of the space, and not of the model.

    Args:
        space: the space.
        does: what it does, in a few words.
        x: with which numbers.

    Raises:
        SubspaceError: anything did, but for a lack of memory, and errors of ours.
    """
    try:
        yield
    except (PatchingError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise SubspaceError(
            f"{space} fails as it {does} numbers {list(x.shape)} of {x.dtype} on {x.device}: "
            f"{type(error).__name__}: {error}"
        ) from error


def check_like(space: Any, found: Any, x: Tensor, does: str, shape: tuple[int, ...]) -> None:
    """Raise `SubspaceError` unless `found` is a tensor of a shape, with numbers.

    Args:
        space: the space.
        found: what it gave.
        x: for which numbers.
        does: what it does, in a few words.
        shape: what it must have; -1 is any size.
    """
    if not isinstance(found, Tensor):
        raise SubspaceError(f"{space} {does} {list(x.shape)} as {type(found).__name__}, no tensor")
    sizes = [
        size if wanted == -1 else wanted for size, wanted in zip(found.shape, shape, strict=False)
    ]
    if list(found.shape) != sizes or len(shape) != found.ndim:
        wanted = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise SubspaceError(
            f"{space} {does} {list(x.shape)} as {list(found.shape)}: it must give [{wanted}]"
        )
    if found.is_meta and not x.is_meta:
        raise SubspaceError(
            f"{space} {does} {list(x.shape)} as a tensor without numbers: it is on the meta "
            "device; load its weights"
        )


def interchanged(space: Space, source: Tensor, target: Tensor) -> Tensor:
    """`space.interchange`, of which the result is looked at: anybody may write a space.

    Raises:
        SubspaceError: it fails, or gives something else than `target` is.
    """
    with naming(space, "interchanges", target):
        found = space.interchange(source, target)
    check_like(space, found, target, "interchanges", tuple(target.shape))
    return found


def encoded(space: Space, x: Tensor) -> Tensor:
    """`space.encode`, of which the result is looked at too.

    Raises:
        SubspaceError: it fails, or does not give coordinates of each.
    """
    with naming(space, "encodes", x):
        found = space.encode(x)
    check_like(space, found, x, "encodes", (*x.shape[:-1], -1))
    return found
