"""Keys and values of the target run, handed out to the rows of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._upstream import Cache, DynamicLayer, KeysValues
from nnpatch_core.engine.cone.readback import Readback


class _Prefix(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values of the positions left of a bucket; nothing is ever added."""

    def __init__(self, layer: int, kept: KeysValues, prompts: Tensor, readback: Readback) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layer = layer
        self._kept = kept
        self._prompts = prompts
        self._readback = readback

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            raise ValueError("a layer asks for keys and values that the target run did not keep")
        if self.get_seq_length() == 0:
            return key_states, value_states
        device = key_states.device
        if self._kept[0].device == device:
            keys, values = map(self._of_rows, self._kept)
        else:
            keys, values = self._readback.rows(self._layer, device)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._readback.start

    def _of_rows(self, kept: Tensor) -> Tensor:
        left, prompts = kept[:, :, : self._readback.start], self._prompts
        if bool((prompts == prompts[:1]).all()):
            # A view: the copy for each row is made once, where they join the rows' own.
            return left[prompts[0]].expand(len(prompts), -1, -1, -1)
        return left[prompts.to(left.device)]


def prefix(kept: Sequence[KeysValues], start: int, prompts: list[Tensor]) -> Cache:
    """A read-only cache of the positions left of `start`.

    Args:
        kept: keys and values of each layer, where it runs or in host memory.
        start: the first position that is run.
        prompts: for each layer `[rows]`, whose keys and values its rows attend to; the rows of a
            layer are the first of those of the layers above.
    """
    readback = Readback(kept, start, prompts)
    return Cache(
        layers=[
            _Prefix(layer, each, of, readback)
            for layer, (each, of) in enumerate(zip(kept, prompts, strict=True))
        ]
    )
