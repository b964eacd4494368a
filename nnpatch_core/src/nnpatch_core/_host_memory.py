"""Host memory that a device can read as it computes, for what is recorded there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Tensor


def in_host(value: Tensor, host: torch.device) -> Tensor:
    """A copy of an activation `[batch, seq, width]`.

    Args:
        value: the activation.
        host: the host's memory.
    """
    return _room(value.shape, value, host, pinned=_reached(value, host)).copy_(value)


def tokens_in_host(parts: Sequence[Tensor], host: torch.device) -> Tensor:
    """A copy of keys or values `[batch, heads, seq, dim]` of tokens that follow one another.

    In memory the tokens of a prompt follow one another too, so that the first of them are one
    piece.

    Args:
        parts: those of some tokens each, on a device or in host memory.
        host: the host's memory.
    """
    batch, heads, _, dim = parts[0].shape
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[2])
    pinned = any(_reached(part, host) for part in parts)
    room = _room((batch, ends[-1], heads, dim), parts[0], host, pinned=pinned)
    for part, (start, end) in zip(parts, pairwise(ends), strict=True):
        room[:, start:end].copy_(part.transpose(1, 2))
    return room.transpose(1, 2)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after the other, in memory such as theirs.

    Args:
        parts: `[rows, ...]` each.
    """
    first = parts[0]
    shape = (sum(map(len, parts)), *first.shape[1:])
    room = _room(shape, first, first.device, pinned=first.is_pinned())
    return torch.cat(list(parts), out=room)


def _reached(value: Tensor, host: torch.device) -> bool:
    """Whether a device is to reach the copy of a tensor."""
    return value.device.type != host.type or value.is_pinned()


def _room(shape: Sequence[int], like: Tensor, where: torch.device, *, pinned: bool) -> Tensor:
    """Memory for a tensor; pinned, a device can reach it, if there is any of that left."""
    if pinned:
        # The system grants so much and no more. What is not pinned is read all the same.
        with suppress(RuntimeError):
            return torch.empty(shape, dtype=like.dtype, device=where, pin_memory=True)
    return torch.empty(shape, dtype=like.dtype, device=where)
