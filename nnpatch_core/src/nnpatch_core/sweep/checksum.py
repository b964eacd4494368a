"""Short words for numbers: another one if a bit of them is another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from nnpatch_core._bytes import bytes_of
from nnpatch_core._wrappers import offloaded

#: Numbers that are summed up together.
_PIECE = 2**22


def checksum(model: nn.Module) -> str:
    """A short word for a model's weights: another one if a bit of them is another.

    Sums of integers, so that it is the same on every device. An offloaded weight is fetched; one
    that nobody has, and one of a type that does not show its parts, counts by its shape only.
    """
    words = []
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        total = sum(_sum(part) for part in _parts(offloaded(model, name, weight).detach()))
        words.append(f"{name} {weight.dtype} {list(weight.shape)} {total}")
    return word("\n".join(words).encode())


def _parts(weight: Any) -> list[Tensor]:
    """The plain tensors that a weight is made of, as a quantised one is of numbers and scales."""
    if weight.is_meta:
        return []
    if type(weight) in (Tensor, nn.Parameter):
        return [weight]
    if not hasattr(weight, "__tensor_flatten__"):
        # Of a kind that only says more of its numbers, or one that does not say where they are.
        try:
            plain = weight.as_subclass(Tensor)
            return [plain] if plain.data_ptr() else []
        except RuntimeError:
            return []
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(weight, name))]


def _sum(weight: Tensor) -> int:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = weight.contiguous().flatten()
    if flat.is_complex():
        flat = torch.view_as_real(flat).flatten()
    bits = flat.view(kinds[flat.element_size()])
    total = 0
    for first in range(0, len(bits), _PIECE):
        piece = bits[first : first + _PIECE].to(torch.int64)
        # Odd factors, so that numbers that change places change the sum.
        place = torch.arange(first, first + len(piece), device=piece.device) * 2 + 1
        total += int((piece * place * 0x9E3779B1).sum())
    return total % 2**64


def digest(*tensors: Tensor) -> str:
    """A short word for types, shapes and bits of tensors."""
    shapes = str([(str(each.dtype), list(each.shape)) for each in tensors])
    return word(shapes.encode() + b"".join(bytes_of(each).numpy().tobytes() for each in tensors))


def word(content: bytes) -> str:
    """A short word for bytes."""
    return hashlib.blake2b(content, digest_size=6).hexdigest()
