"""Keys and values of the target run, handed out to the rows of a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._upstream import Cache, DynamicLayer, KeysValues


class _Prefix(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values of the positions left of a bucket; nothing is ever added."""

    def __init__(self, kept: KeysValues, start: int, prompts: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept
        self._start = start
        self._prompts = prompts
        self._one = bool((prompts == prompts[:1]).all())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._kept is None:
            raise ValueError("a layer asks for keys and values that the target run did not keep")
        if self._start == 0:
            return key_states, value_states
        keys, values = (self._of_rows(kept, key_states.device) for kept in self._kept)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_seq_length(self) -> int:
        return self._start

    def _of_rows(self, kept: Tensor, device: torch.device) -> Tensor:
        left = kept[:, :, : self._start]
        if self._one:
            # A view: the copy for each row is made once, where they join the rows' own.
            return left[self._prompts[0]].to(device).expand(len(self._prompts), -1, -1, -1)
        return left[self._prompts.to(left.device)].to(device)


def prefix(kept: Sequence[KeysValues], start: int, prompts: list[Tensor]) -> Cache:
    """A read-only cache of the positions left of `start`.

    Args:
        kept: keys and values of each layer.
        start: the first position that is run.
        prompts: for each layer `[rows]`, whose keys and values its rows attend to.
    """
    return Cache(layers=[_Prefix(each, start, of) for each, of in zip(kept, prompts, strict=True)])
