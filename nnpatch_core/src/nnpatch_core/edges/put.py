"""The values that a sweep over edges puts, chunk by chunk of its prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.batch import Batch
from nnpatch_core.edges.changes import Entry, Given, SenderChanges
from nnpatch_core.edges.layers import Layers, open_layers, record_run
from nnpatch_core.edges.values import Received
from nnpatch_core.interventions import PairRuns
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention

#: For the layers on some prompts, and which prompts these are: what senders get, and the logits of
#: the run that was made to know it.
GivenOf = Callable[[Layers, slice], tuple[Given, "Tensor | None"]]


@attrs.frozen(eq=False)
class EdgePut:
    """Puts what receivers compute from a stream with the senders' changes.

    Args:
        api: the adapter.
        given: what senders get; None is the source run's activations.
    """

    api: ModelAPI
    given: GivenOf | None = None

    def __call__(self, sweep: Sweep, runs: PairRuns) -> Values:
        """See `PairRuns.put`."""
        mask = runs.mask_of(sweep.patches)

        def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
            layers = open_layers(some.nnmodel, self.api, runs.target.rows(chunk))
            if self.given is not None:
                given, own = self.given(layers, chunk)
                return own, received(some, layers, given, chunk)
            source, logits = source_given(layers, self.api, runs.source.rows(chunk))
            return logits, received(some, layers, attrs.evolve(source, mask=mask[chunk]), chunk)

        return Values(mask, of, {"mask": mask})


def source_given(layers: Layers, api: ModelAPI, source: Batch) -> tuple[Given, Tensor]:
    """The source run's activations, and its logits."""
    run = record_run(layers.nnmodel, api, source)
    return Given(run.streams[0], run.heads, run.mlp, source.mask), run.logits


def received(sweep: Sweep, layers: Layers, given: Given, chunk: slice) -> Received:
    """What the receivers of a sweep's cells compute, in some of its prompts."""
    named: list[Any] = [cell.named for cell in sweep.patches.cells]
    entries: dict[int, Entry] = {id(each.entry): each.entry for each in named}
    numbers = {key: number for number, key in enumerate(entries)}
    rows = torch.arange(chunk.start, chunk.stop, device="cpu")
    changes = SenderChanges.of(layers, given, [each.rows(rows) for each in entries.values()])
    return Received(
        layers,
        changes,
        np.array([numbers[id(each.entry)] for each in named]),
        [each.receivers for each in named],
        given.mask,
    )
