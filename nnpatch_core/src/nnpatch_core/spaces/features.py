"""Features of an autoencoder, as a part of an activation."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int, strict_ints
from nnpatch_core._printable import shown
from nnpatch_core._rounding import as_typed
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.space import check_width
from nnpatch_core.spaces.subspace import added


def _numbers(features: Any) -> tuple[int, ...] | None:
    if features is None:
        return None
    numbers = strict_ints(features, "features", SubspaceError)
    if min(numbers) < 0:
        raise SubspaceError(f"features are numbered from 0, got {list(numbers)}")
    return numbers


@attrs.frozen(eq=False, repr=False)
class Features:
    """Features of an autoencoder: any object with `encode` and `decode`, such as a sparse one.

    Patching changes the chosen features alone. Whatever the autoencoder does not reconstruct (its
    error term), and all other features, stay as they are, so that an identity patch changes
    nothing, bitwise.

    Args:
        autoencoder: `encode` takes `[..., width]` to `[..., all features]`, and `decode` back.
        features: the numbers of those that are patched; None is all of them.
        width: of the activations, if it is known: then it is checked before anything runs.

    Raises:
        SubspaceError: it has no such methods, or the numbers are malformed.

    Examples:
        >>> class Pair:
        ...     def encode(self, x):
        ...         return torch.cat([x.relu(), (-x).relu()], -1)
        ...     def decode(self, c):
        ...         return c[..., :2] - c[..., 2:]
        >>> Features(Pair(), [0]).interchange(torch.tensor([5.0, 6.0]), torch.tensor([1.0, 2.0]))
        tensor([5., 2.])
    """

    autoencoder: Any = attrs.field()
    features: tuple[int, ...] | None = attrs.field(default=None, converter=_numbers)
    width: int | None = attrs.field(default=None)

    @autoencoder.validator
    def _codes(self, _: Any, autoencoder: Any) -> None:
        for name in ("encode", "decode"):
            if isinstance(autoencoder, type) or not callable(getattr(autoencoder, name, None)):
                raise SubspaceError(
                    f"an autoencoder has the methods encode and decode, and {shown(autoencoder)} "
                    f"has no {name}"
                )

    @width.validator
    def _counts(self, _: Any, width: Any) -> None:
        if width is not None and strict_int(width, "width", SubspaceError) < 1:
            raise SubspaceError(f"width must be at least 1, got {width}")

    @property
    def rank(self) -> int | None:
        """How many features are patched; None is all of them."""
        return None if self.features is None else len(self.features)

    def encode(self, x: Tensor) -> Tensor:
        """The chosen features `[..., rank]` of activations `[..., width]`."""
        return self._chosen(self._encoded(x))

    def decode(self, c: Tensor) -> Tensor:
        """The activations `[..., width]` of which the chosen features are `[..., rank]`.

        All other features are 0.

        Raises:
            SubspaceError: only some features are chosen, and `width` was not given: nobody knows
                how many there are.
        """
        if self.features is None:
            return self._decoded(c)
        if self.width is None:
            raise SubspaceError(f"to decode some features of {self}, give it the argument width=")
        every = self._encoded(torch.zeros(self.width, dtype=c.dtype, device=c.device))
        whole = torch.zeros(*c.shape[:-1], len(every), dtype=c.dtype, device=c.device)
        whole[..., list(self.features)] = c
        return self._decoded(whole)

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        """`target` with the chosen features of `source`, both `[..., width]`."""
        # The target last: some autoencoders remember the scale of what they have encoded.
        return self._with(target, self.encode(source.to(target)))

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` `[..., width]` with chosen features `[..., rank]`."""
        return self._with(target, values)

    def _with(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` with other chosen features."""
        before = self._encoded(target)
        own = self._chosen(before)
        new = values.to(own).expand_as(own)
        after = before.clone()
        after[..., self._index] = new
        decoded = self._decoded(torch.stack([before, after]))
        still = (own == new).all(-1, keepdim=True)
        return added(target, torch.where(still, 0.0, decoded[1] - decoded[0]))

    def _encoded(self, x: Tensor) -> Tensor:
        check_width(self, x.shape[-1], "the activation")
        with as_typed(x):
            found = self.autoencoder.encode(x.to(torch.promote_types(x.dtype, torch.float32)))
        if not isinstance(found, Tensor) or found.shape[:-1] != x.shape[:-1]:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise SubspaceError(
                f"{self} encodes activations {list(x.shape)} as {got}: it must give "
                f"{[*x.shape[:-1]]} and then its features"
            )
        if self.features and max(self.features) >= found.shape[-1]:
            raise SubspaceError(
                f"{self} has {found.shape[-1]} features, and {max(self.features)} was asked for"
            )
        return found

    def _decoded(self, c: Tensor) -> Tensor:
        with as_typed(c):
            found: Tensor = self.autoencoder.decode(c)
        return found

    @property
    def _index(self) -> Any:
        return slice(None) if self.features is None else list(self.features)

    def _chosen(self, encoded: Tensor) -> Tensor:
        return encoded[..., self._index]

    def __repr__(self) -> str:
        name = type(self.autoencoder).__name__
        if self.features is None:
            return f"Features(all of {name})"
        few = ", ".join(map(str, self.features[:5])) + (", …" if len(self.features) > 5 else "")
        return f"Features({few} of {name})"
