"""Runs in which nothing is patched, that are known before a sweep begins, or kept for the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.metrics import MetricContext
from nnpatch_core.sweep.opened import Opened
from nnpatch_core.sweep.runs import Runs
from nnpatch_core.sweep.share import Share
from nnpatch_core.sweep.sweep import Sweep, run_unpatched

#: The logits of some prompts, by the name of the run.
Logits = Mapping[str, Tensor]


@attrs.define(eq=False)
class Held:
    """The runs of a sweep in which nothing is patched, as far as a process knows them.

    Args:
        keeps: whether it keeps what is recorded, for the next share of the same sweep.
        unpatched: by the number of a chunk the logits of its prompts, where others have run them.
        wanted: the share of these runs that is wanted, and nothing else of the sweep.
        told: is told how much of that is run, from 0 to 1.
    """

    keeps: bool = False
    unpatched: Mapping[int, Logits] = attrs.field(factory=dict)
    wanted: Share | None = None
    told: Callable[[float], object] = float
    recorded: Opened | None = attrs.field(default=None, init=False)

    def check_wanted(self, sweep: Sweep, runs: Runs) -> None:
        """End the sweep here, if its unpatched runs alone are wanted.

        Where all prompts run together there are none: the recorded runs are the unpatched ones.
        """
        if self.wanted is None:
            return
        found: dict[int, Logits] = {}
        own = [*enumerate(sweep.chunks)][self.wanted.number - 1 :: self.wanted.count]
        if len(sweep.chunks) > 1:
            for number, chunk in own:
                found[number] = _run(sweep, runs.batches, [chunk])
                self.told(len(found) / len(own))
        raise UnpatchedRun(found)

    def context(self, sweep: Sweep, runs: Runs) -> MetricContext:
        """The context of metrics, by unpatched runs that are known, or by runs of its own."""
        chunks = sweep.chunks
        if not set(range(len(chunks))) <= set(self.unpatched):
            return runs.unpatched(sweep, chunks)
        parts = [self.unpatched[number] for number in range(len(chunks))]
        whole = {name: torch.cat([part[name] for part in parts]) for name in runs.batches}
        return runs.context(whole.get("source"), whole["target"])

    def open(self, sweep: Sweep, make: Callable[[], Opened]) -> Opened:
        """Some prompts, opened; those that were kept, if they were.

        Args:
            sweep: what is opened.
            make: opens it.
        """
        # Cells that wait for all prompts may be opened in groups, which are others each time.
        if not self.keeps or len(sweep.chunks) > 1 or sweep.waiting:
            return make()
        if self.recorded is None:
            self.recorded = make()
        return self.recorded


class UnpatchedRun(Exception):  # noqa: N818 - it is no error
    """The unpatched runs that were wanted are run, and the sweep ends here.

    Args:
        logits: by the number of a chunk.
    """

    def __init__(self, logits: Mapping[int, Logits]) -> None:
        super().__init__(len(logits))
        self.logits = logits


def _run(sweep: Sweep, batches: Mapping[str, Batch], chunks: Sequence[slice]) -> Logits:
    return {name: run_unpatched(sweep, batch, chunks) for name, batch in batches.items()}
