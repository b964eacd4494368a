"""The values that a sweep over edges puts, chunk by chunk of its prompts."""

from __future__ import annotations

from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.batch import Batch
from nnpatch_core.edges.changes import Entry, Given, SenderChanges, told_of
from nnpatch_core.edges.given import Ablated
from nnpatch_core.edges.layers import Layers, Structure, open_layers, record_run
from nnpatch_core.edges.values import Received
from nnpatch_core.interventions import PairRuns
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention

#: The layers on some prompts, what senders get, and the logits of the run that told it, if any.
Opened: TypeAlias = "tuple[Layers, Given, Tensor | None]"


@attrs.frozen(eq=False)
class EdgePut:
    """Puts what receivers compute from a stream with the senders' changes.

    Args:
        api: the adapter.
        structure: what is known of the layers.
        given: how senders are ablated; None is by the source run's activations.
    """

    api: ModelAPI
    structure: Structure
    given: Ablated | None = None

    def __call__(self, sweep: Sweep, runs: PairRuns) -> Values:
        """See `PairRuns.put`."""
        mask, depends = self.mask(sweep, runs), {} if self.given is None else self.given.depends

        def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
            layers, given, logits = self.opened(some, runs, chunk)
            return logits, received(some, layers, given, chunk)

        return Values(mask, of, {"mask": mask, "senders": _senders(sweep), **depends})

    def mask(self, sweep: Sweep, runs: PairRuns) -> Tensor:
        """`[batch, seq]`: 1 where a prompt may be changed."""
        if self.given is None:
            return runs.mask_of(sweep.patches)
        return self.given.mask(runs.target)

    def opened(self, sweep: Sweep, runs: PairRuns, chunk: slice) -> Opened:
        """The layers on some prompts, what senders get, and the logits of the run that told it."""
        layers = open_layers(sweep.nnmodel, self.api, self.structure, runs.target.rows(chunk))
        if self.given is not None:
            return layers, *self.given(layers, chunk)
        given, logits = source_given(layers, self.api, runs.source.rows(chunk))
        mask = self.mask(sweep, runs)[chunk]
        return layers, attrs.evolve(given, mask=mask), logits


def source_given(layers: Layers, api: ModelAPI, source: Batch) -> tuple[Given, Tensor]:
    """The source run's activations, and its logits."""
    run = record_run(layers.nnmodel, api, source)
    return Given(run.streams[0], run.heads, run.mlp, source.mask), run.logits


def _senders(sweep: Sweep) -> Tensor:
    """The positions of senders, which no label tells where they are each prompt's own."""
    named: list[Any] = [cell.named for cell in sweep.patches.cells]
    entries: dict[int, Entry] = {id(each.entry): each.entry for each in named}
    words = [told_of(at) for each in entries.values() for at in each.positions]
    return torch.tensor([number for word in words for number in word], device="cpu")


def received(sweep: Sweep, layers: Layers, given: Given, chunk: slice) -> Received:
    """The receivers of a sweep's cells, computed in some of its prompts."""
    named: list[Any] = [cell.named for cell in sweep.patches.cells]
    entries: dict[int, Entry] = {id(each.entry): each.entry for each in named}
    numbers = {key: number for number, key in enumerate(entries)}
    changes = SenderChanges.of(layers, given, [each.rows(chunk) for each in entries.values()])
    return Received(
        layers,
        changes,
        np.array([numbers[id(each.entry)] for each in named]),
        [each.receivers for each in named],
        given.mask,
    )
