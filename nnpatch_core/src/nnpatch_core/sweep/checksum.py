"""Short words for numbers: another one if a bit of them is another."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnpatch_core._bytes import bytes_of
from nnpatch_core._wrappers import offloaded

#: Numbers of four bytes that are summed up together: few enough to stay near the processor.
_PIECE = 2**18
#: How many pieces are summed up together on a device, which is slow to begin.
_TOGETHER = 16
#: Odd, as what is multiplied by an odd number modulo a power of 2 can be told from it.
_FACTOR = 0x9E3779B1


def checksum(model: nn.Module) -> str:
    """A short word for a model's weights: another one if a bit of them is another.

    Sums of integers, so that it is the same on every device. An offloaded weight is fetched; one
    that nobody has, and one of a type that does not show its parts, counts by its shape only.
    """
    words = []
    factors = _Factors()
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        parts = _parts(offloaded(model, name, weight).detach())
        total = sum(_sum(part, factors) for part in parts)
        words.append(f"{name} {weight.dtype} {list(weight.shape)} {total}")
    return word("\n".join(words).encode())


class _Factors:
    """For each place in a piece an odd number, so that numbers that change places are told.

    They are random, and of eight bytes: so what is done to a weight on purpose, as to change the
    sign of a column, does not add up to nothing.
    """

    def __init__(self) -> None:
        self._made: dict[torch.device, Tensor] = {}

    def of(self, numbers: Tensor) -> Tensor:
        """As many as there are numbers, on their device."""
        made = self._made.get(numbers.device)
        if made is None or len(made) < len(numbers):
            # The raw numbers of a generator are the same in every version of numpy.
            drawn = np.random.PCG64(0).random_raw(len(numbers)).astype(np.uint64)
            odd = torch.from_numpy((drawn | np.uint64(1)).view(np.int64))
            made = self._made[numbers.device] = odd.to(numbers.device)
        return made[: len(numbers)]


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


def _sum(weight: Tensor, factors: _Factors) -> int:
    whole = weight.contiguous()
    octets = (torch.view_as_real(whole) if whole.is_complex() else whole).flatten()
    octets = octets.view(torch.uint8)
    if len(octets) % 4 or octets.storage_offset() % 4:
        # A copy, which begins where a number of four bytes may.
        octets = torch.nn.functional.pad(octets, (0, -len(octets) % 4)).clone()
    together, total = 1 if octets.device.type == "cpu" else _TOGETHER, 0
    for own in _sums(octets.view(torch.int32), factors, together):
        total = (total * _FACTOR + own) % 2**64
    return total


def _sums(bits: Tensor, factors: _Factors, together: int) -> list[int]:
    """The sum of each piece, all fetched at once: to fetch one waits for the whole device."""
    found = [torch.zeros(0, dtype=torch.int64, device=bits.device)]
    for first in range(0, len(bits), together * _PIECE):
        some = bits[first : first + together * _PIECE]
        whole = len(some) // _PIECE * _PIECE
        for pieces in (some[:whole].view(-1, _PIECE), some[whole:][None]):
            if pieces.numel():
                found.append((pieces * factors.of(pieces[0])).sum(1))
    sums: list[int] = torch.cat(found).tolist()
    return sums


def digest(*tensors: Tensor) -> str:
    """A short word for types, shapes and bits of tensors."""
    shapes = str([(str(each.dtype), list(each.shape)) for each in tensors])
    return word(shapes.encode() + b"".join(bytes_of(each).numpy().tobytes() for each in tensors))


def word(content: bytes) -> str:
    """A short word for bytes."""
    return hashlib.blake2b(content, digest_size=6).hexdigest()
