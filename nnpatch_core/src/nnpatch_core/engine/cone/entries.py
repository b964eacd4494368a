"""The rows that enter a trace on its way up, as the target run has recorded them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nnpatch_core.adapters import INPUT, OUTPUT, STAGES
from nnpatch_core.engine.cone.ahead import Ahead, copied
from nnpatch_core.engine.cone.target import TargetRun


class Entries:
    """The residual stream of rows before and after each layer at which some enter.

    In host memory it is read back while the layers below run, each prompt's once for all rows.

    Args:
        target: the recorded target run.
        start: the first position that is run.
        prompts: `[rows]`, the prompt of each row.
        present: for each stage the rows that have entered by then.
    """

    def __init__(
        self, target: TargetRun, start: int, prompts: Tensor, present: Sequence[int]
    ) -> None:
        self._target = target
        self._tokens = slice(start - target.first, None)
        self._prompts = prompts
        # Before a layer, whatever they begin at inside it, or after it.
        ends = [count for stage, count in enumerate(present) if stage % STAGES != INPUT]
        self._rows = {
            number: slice(came, count)
            for number, (came, count) in enumerate(pairwise([0, *ends]))
            if count > came
        }
        self._ahead = Ahead()

    def joined(self, hidden: Tensor, layer: int, stage: int) -> Tensor:
        """The residual stream `[came, ...]`, with the rows that enter after those.

        Args:
            hidden: the stream of those that came before.
            layer: the layer.
            stage: `OUTPUT` is after the layer, any other before it.
        """
        number = 2 * layer + (stage == OUTPUT)
        rows = self._rows.get(number)
        if rows is None:
            return hidden
        new = self._new(number, hidden.device)
        return torch.cat([hidden, new]) if rows.start else new

    def _new(self, number: int, device: torch.device) -> Tensor:
        """Rows that enter, in memory of their own."""
        recorded, prompts = self._recorded(number), self._prompts[self._rows[number]]
        if recorded.device == device:
            return recorded[prompts.to(device), self._tokens]
        (found,) = self._ahead.take(number, device, lambda: self._read(number, device))
        above = next((each for each in self._rows if each > number), None)
        if above is not None and self._recorded(above).is_pinned():
            self._ahead.begin(above, device, lambda: self._read(above, device))
        occurring = self._occurring(number)
        if len(occurring) == len(prompts):
            return found
        numbers = {prompt: which for which, prompt in enumerate(occurring)}
        which = [numbers[prompt] for prompt in prompts.tolist()]
        return found[torch.tensor(which, dtype=torch.int64, device="cpu").to(device)]

    def _recorded(self, number: int) -> Tensor:
        layer, after = divmod(number, 2)
        return (self._target.outputs if after else self._target.inputs)[layer]

    def _occurring(self, number: int) -> list[int]:
        """Each prompt of the rows once, in their order."""
        return [*dict.fromkeys(self._prompts[self._rows[number]].tolist())]

    def _read(self, number: int, device: torch.device) -> tuple[Tensor, ...]:
        """The stream of each prompt once, `[prompts, seq - start, width]`."""
        prompts = self._occurring(number)
        return (copied(self._recorded(number), prompts, self._tokens, device),)
