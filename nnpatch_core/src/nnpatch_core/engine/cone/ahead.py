"""Recorded tensors in host memory, read by a device beside what it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

#: Gives tensors on a device, copied from host memory.
Read: TypeAlias = Callable[[], tuple[Tensor, ...]]


def copied(value: Tensor, prompts: Sequence[int], tokens: slice, device: torch.device) -> Tensor:
    """Some tokens of some prompts on a device, of `[batch, seq, ...]`.

    Args:
        value: the recorded tensor. In memory the tokens of a prompt follow one another.
        prompts: which prompts.
        tokens: which of their tokens.
        device: where they are wanted.
    """
    some = value[:, tokens]
    into = torch.empty((len(prompts), *some.shape[1:]), dtype=value.dtype, device=device)
    for number, prompt in enumerate(prompts):
        into[number].copy_(some[prompt], non_blocking=value.is_pinned())
    return into


@attrs.frozen(eq=False)
class _Copy:
    """Tensors on the way to a device.

    Args:
        number: which they are.
        device: where they are wanted.
        values: the tensors.
        arrived: when they are there.
    """

    number: int
    device: torch.device
    values: tuple[Tensor, ...]
    arrived: torch.Event


class Ahead:
    """Reads tensors beside what runs, one step before they are wanted."""

    def __init__(self) -> None:
        self._begun: _Copy | None = None
        self._streams: dict[torch.device, torch.Stream | None] = {}

    def begin(self, number: int, device: torch.device, read: Read) -> None:
        """Begin to read, if the device can do so beside what runs.

        Args:
            number: which tensors.
            device: where they are wanted.
            read: reads them, from memory that is pinned.
        """
        stream = self._stream(device)
        if stream is not None:
            with stream:
                self._begun = _Copy(number, device, read(), stream.record_event())

    def take(self, number: int, device: torch.device, read: Read) -> tuple[Tensor, ...]:
        """The tensors, as they were begun, or read now.

        Args:
            number: which tensors.
            device: where they are wanted.
            read: reads them.
        """
        begun, self._begun = self._begun, None
        if begun is None or (begun.number, begun.device) != (number, device):
            return read()
        current = torch.accelerator.current_stream(device)
        current.wait_event(begun.arrived)
        for each in begun.values:
            # Its memory is not given to others while this stream may read it.
            each.record_stream(current)
        return begun.values

    def _stream(self, device: torch.device) -> torch.Stream | None:
        """A stream beside the one in which a device computes; None where torch has none."""
        if device not in self._streams:
            made = None
            # Of older releases a stream is entered in another way, for each kind of device.
            if hasattr(torch.Stream, "__enter__"):
                with suppress(RuntimeError):
                    made = torch.Stream(device=device)
            self._streams[device] = made
        return self._streams[device]
