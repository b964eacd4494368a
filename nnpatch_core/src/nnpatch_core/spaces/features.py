"""Features of an autoencoder, as a part of an activation."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._integers import strict_int, strict_ints
from nnpatch_core._printable import shown
from nnpatch_core._rounding import as_typed
from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces.space import check_activation, check_expands, check_like, naming
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
        # On some of them torch computes with whatever is in memory, and says nothing.
        if isinstance(autoencoder, nn.Module) and any(
            each.is_meta for each in (*autoencoder.parameters(), *autoencoder.buffers())
        ):
            raise SubspaceError(
                f"{type(autoencoder).__name__} has no weights, it is on the meta device: load them"
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
            return self._decoded(c, self.width)
        if self.width is None:
            raise SubspaceError(f"to decode some features of {self}, give it the argument width=")
        every = self._encoded(torch.zeros(self.width, dtype=c.dtype, device=c.device))
        whole = torch.zeros(*c.shape[:-1], len(every), dtype=c.dtype, device=c.device)
        whole[..., list(self.features)] = c
        return self._decoded(whole, self.width)

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        """`target` with the chosen features of `source`, both `[..., width]`."""
        check_activation(self, target, "the activation")
        check_activation(self, source, "the source's activation")
        check_expands("source", source, tuple(target.shape))
        # The target last: some autoencoders remember the scale of what they have encoded.
        return self._with(target, self.encode(source.to(target)))

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` `[..., width]` with chosen features `[..., rank]`."""
        return self._with(target, values)

    def _with(self, target: Tensor, values: Tensor) -> Tensor:
        """`target` with other chosen features."""
        before = self._encoded(target)
        own = self._chosen(before)
        check_expands("values", values, tuple(own.shape))
        new = values.to(own).expand_as(own)
        after = before.clone()
        after[..., self._index] = new
        decoded = self._decoded(torch.stack([before, after]), target.shape[-1])
        moved = decoded[1] - decoded[0]
        if moved.requires_grad:
            return added(target, moved)
        still = (own == new).all(-1, keepdim=True)
        return added(target, torch.where(still, 0.0, moved))

    def _encoded(self, x: Tensor) -> Tensor:
        check_activation(self, x, "the activation")
        given = x.to(self._kind(x))
        with as_typed(x), naming(self, "encodes", given):
            found: Tensor = self.autoencoder.encode(given)
        check_like(self, found, x, "encodes", (*x.shape[:-1], -1))
        if self.features and max(self.features) >= found.shape[-1]:
            raise SubspaceError(
                f"{self} has {found.shape[-1]} features, and {max(self.features)} was asked for"
            )
        return found

    def _decoded(self, c: Tensor, width: int | None = None) -> Tensor:
        with as_typed(c), naming(self, "decodes", c):
            found: Tensor = self.autoencoder.decode(c)
        check_like(self, found, c, "decodes", (*c.shape[:-1], -1 if width is None else width))
        return found

    def _kind(self, x: Tensor) -> torch.dtype:
        """The type in which the autoencoder computes: that of its weights, if it has any."""
        told = getattr(self.autoencoder, "dtype", None)
        if isinstance(told, torch.dtype):
            return told
        if isinstance(self.autoencoder, nn.Module):
            kinds = [each.dtype for each in self.autoencoder.parameters()]
            if own := [kind for kind in kinds if kind.is_floating_point]:
                return own[0]
        return torch.promote_types(x.dtype, torch.float32)

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
