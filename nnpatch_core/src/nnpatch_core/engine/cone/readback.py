"""Keys and values in host memory: a layer's are read back while the layer before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property

import attrs
import torch
from torch import Tensor

from nnpatch_core._upstream import KeysValues


def in_host(value: Tensor, host: torch.device) -> Tensor:
    """A copy of keys or values `[batch, heads, seq, dim]` that a device can read as it computes.

    In memory the tokens of a prompt follow one another, so that the first of them are one piece.

    Args:
        value: the keys or values.
        host: the host's memory.
    """
    by_token = value.transpose(1, 2)
    return _room(by_token, host).copy_(by_token).transpose(1, 2)


def _room(like: Tensor, host: torch.device) -> Tensor:
    """Host memory for a tensor, which its device can reach, if there is any of that left."""
    if like.device.type != host.type:
        # The system grants so much and no more. What is not pinned is read all the same.
        with suppress(RuntimeError):
            return torch.empty(like.shape, dtype=like.dtype, device=host, pin_memory=True)
    return torch.empty(like.shape, dtype=like.dtype, device=host)


@attrs.frozen(eq=False)
class _Copy:
    """Keys and values of a layer on a device.

    Args:
        layer: the layer.
        device: where they are.
        values: `[prompts, start, heads, dim]` each.
        arrived: when they are there, if they are copied beside what runs.
    """

    layer: int
    device: torch.device
    values: tuple[Tensor, ...]
    arrived: torch.Event | None


class Readback:
    """The keys and values of a bucket's prompts, read back from host memory layer by layer.

    Each prompt is read once, however many rows it has.

    Args:
        kept: keys and values of each layer, `[prompts, heads, seq, dim]`.
        start: the first position that is run.
        prompts: for each layer `[rows]`, the prompt of each row; those of a layer are the first of
            those of the layers above.
    """

    def __init__(self, kept: Sequence[KeysValues], start: int, prompts: Sequence[Tensor]) -> None:
        self._kept = kept
        self.start = start
        self._prompts = prompts
        self._ahead: _Copy | None = None
        self._streams: dict[torch.device, torch.Stream | None] = {}
        self._placed: dict[torch.device, Tensor] = {}

    @cached_property
    def _occurring(self) -> list[int]:
        """Each prompt once, in the order in which rows have them: a layer has the first rows."""
        return [*dict.fromkeys(self._prompts[-1].tolist())]

    @cached_property
    def _which(self) -> Tensor:
        """`[rows]`: where the prompt of each row is among those that occur."""
        numbers = {prompt: number for number, prompt in enumerate(self._occurring)}
        which = [numbers[prompt] for prompt in self._prompts[-1].tolist()]
        return torch.tensor(which, dtype=torch.int64, device="cpu")

    def rows(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """Keys and values `[rows, heads, start, dim]` of a layer; the next layer's are begun.

        Args:
            layer: the layer.
            device: where they are wanted.
        """
        copied, self._ahead = self._ahead, None
        if copied is None or (copied.layer, copied.device) != (layer, device):
            copied = self._copied(layer, device, None)
        if copied.arrived is not None:
            current = torch.accelerator.current_stream(device)
            current.wait_event(copied.arrived)
            for each in copied.values:
                # Its memory is not given to others while this stream may read it.
                each.record_stream(current)
        self._begin(layer + 1, device)
        rows = len(self._prompts[layer])
        return tuple(self._of_rows(each.transpose(1, 2), rows) for each in copied.values)

    def _begin(self, layer: int, device: torch.device) -> None:
        """Read a layer's beside what runs, if the device can."""
        pair = self._kept[layer] if layer < len(self._kept) else None
        if pair is None or not all(each.is_pinned() for each in pair):
            return
        if (stream := self._stream(device)) is not None:
            self._ahead = self._copied(layer, device, stream)

    def _copied(self, layer: int, device: torch.device, stream: torch.Stream | None) -> _Copy:
        """The keys and values of a layer's prompts, on the way to a device."""
        pair = self._kept[layer]
        assert pair is not None
        last = self._which[: len(self._prompts[layer])].max()
        prompts = self._occurring[: int(last) + 1]
        if stream is None:
            return _Copy(layer, device, self._read(pair, prompts, device), None)
        with stream:
            values = self._read(pair, prompts, device)
            return _Copy(layer, device, values, stream.record_event())

    def _read(
        self, pair: tuple[Tensor, Tensor], prompts: Sequence[int], device: torch.device
    ) -> tuple[Tensor, ...]:
        found = []
        for kept in pair:
            by_token = kept.transpose(1, 2)[:, : self.start]
            shape = (len(prompts), *by_token.shape[1:])
            into = torch.empty(shape, dtype=kept.dtype, device=device)
            for number, prompt in enumerate(prompts):
                into[number].copy_(by_token[prompt], non_blocking=kept.is_pinned())
            found.append(into)
        return tuple(found)

    def _of_rows(self, values: Tensor, rows: int) -> Tensor:
        if len(values) == 1:
            # A view: the copy for each row is made once, where they join the rows' own.
            return values.expand(rows, -1, -1, -1)
        if values.device not in self._placed:
            self._placed[values.device] = self._which.to(values.device)
        return values[self._placed[values.device][:rows]]

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
