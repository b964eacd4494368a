"""Keys and values in host memory: a layer's are read back while the layer before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from nnpatch_core._host_memory import joined
from nnpatch_core._upstream import KeysValues
from nnpatch_core.engine.cone.ahead import Ahead, copied


def joined_pairs(pairs: Sequence[tuple[Tensor, Tensor]], most: int) -> tuple[Tensor, Tensor]:
    """Keys and values of several chunks of prompts as one, kept as theirs are.

    Args:
        pairs: the keys and values of each, `[prompts, heads, seq, dim]`.
        most: how many of the first tokens are kept.
    """
    keys, values = (
        joined([each.transpose(1, 2)[:, :most] for each in some]).transpose(1, 2)
        for some in zip(*pairs, strict=True)
    )
    return keys, values


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
        self._ahead = Ahead()
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
        found = self._ahead.take(layer, device, lambda: self._read(layer, device))
        above = layer + 1
        pair = self._kept[above] if above < len(self._kept) else None
        if pair is not None and all(each.is_pinned() for each in pair):
            self._ahead.begin(above, device, lambda: self._read(above, device))
        rows = len(self._prompts[layer])
        return tuple(self._of_rows(each.transpose(1, 2), rows) for each in found)

    def _read(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The keys and values of a layer's prompts, `[prompts, start, heads, dim]`."""
        pair = self._kept[layer]
        assert pair is not None
        last = self._which[: len(self._prompts[layer])].max()
        prompts = self._occurring[: int(last) + 1]
        left = slice(self.start)
        return tuple(copied(each.transpose(1, 2), prompts, left, device) for each in pair)

    def _of_rows(self, values: Tensor, rows: int) -> Tensor:
        if len(values) == 1:
            # A view: the copy for each row is made once, where they join the rows' own.
            return values.expand(rows, -1, -1, -1)
        if values.device not in self._placed:
            self._placed[values.device] = self._which.to(values.device)
        return values[self._placed[values.device][:rows]]
