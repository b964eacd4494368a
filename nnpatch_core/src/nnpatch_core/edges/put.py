"""The values that a sweep over edges puts, chunk by chunk of its prompts."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.batch import Batch
from nnpatch_core.edges.changes import Entry, Given, SenderChanges, told_of
from nnpatch_core.edges.given import Ablated
from nnpatch_core.edges.layers import Layers, Structure, open_graphed, open_layers
from nnpatch_core.edges.recording import Graph, Recording, graphed, record_run
from nnpatch_core.edges.values import Received
from nnpatch_core.interventions import PairRuns
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention


@attrs.frozen(eq=False)
class Opened:
    """Some prompts, ready for their edges.

    Args:
        layers: the layers, and the target run.
        given: what senders get.
        logits: of the source run, if that told it.
        target: the graph of the target run, where that was asked for.
        source: the same of the source run.
    """

    layers: Layers
    given: Given
    logits: Tensor | None
    target: Graph | None = None
    source: Graph | None = None


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
            opened = self.opened(some, runs, chunk)
            return opened.logits, received(some, opened.layers, opened.given, chunk)

        return Values(mask, of, {"mask": mask, "senders": _senders(sweep), **depends})

    def mask(self, sweep: Sweep, runs: PairRuns) -> Tensor:
        """`[batch, seq]`: 1 where a prompt may be changed."""
        if self.given is None:
            return runs.mask_of(sweep.patches)
        return self.given.mask(runs.target)

    def opened(
        self,
        sweep: Sweep,
        runs: PairRuns,
        chunk: slice,
        *,
        target: bool = False,
        source: bool = False,
    ) -> Opened:
        """Some of the prompts.

        Args:
            sweep: the edges.
            runs: the prompts of both runs.
            chunk: which prompts.
            target: whether to keep the graph of the target run.
            source: whether to keep that of the source run.
        """
        model, batch = sweep.nnmodel, runs.target.rows(chunk)
        graph, other = None, None
        if target:
            layers, graph = open_graphed(model, self.api, self.structure, batch)
        else:
            layers = open_layers(model, self.api, self.structure, batch)
        if self.given is not None:
            return Opened(layers, *self.given(layers, chunk), graph)
        batch = runs.source.rows(chunk)
        if source:
            run, _, other = graphed(model, self.api, batch)
        else:
            run = record_run(model, self.api, batch)
        given = attrs.evolve(_given(run), mask=self.mask(sweep, runs)[chunk])
        return Opened(layers, given, run.logits, graph, other)


def source_given(layers: Layers, api: ModelAPI, source: Batch) -> tuple[Given, Tensor]:
    """The source run's activations, and its logits."""
    run = record_run(layers.nnmodel, api, source)
    return _given(run), run.logits


def _given(run: Recording) -> Given:
    return Given(run.streams[0], run.heads, run.mlp, run.batch.mask)


def _senders(sweep: Sweep) -> Tensor:
    """The positions of senders, which no label tells where they are each prompt's own."""
    named: list[Any] = list(sweep.patches.cells.named)
    entries: dict[int, Entry] = {id(each.entry): each.entry for each in named}
    words = [told_of(at) for each in entries.values() for at in each.positions]
    return torch.tensor([number for word in words for number in word], device="cpu")


def received(sweep: Sweep, layers: Layers, given: Given, chunk: slice) -> Received:
    """The receivers of a sweep's cells, computed in some of its prompts."""
    named: list[Any] = list(sweep.patches.cells.named)
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
