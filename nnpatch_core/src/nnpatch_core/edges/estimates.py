"""All edges, estimated: what a sender changes, times a gradient at what a receiver reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._models import evaluating, frozen
from nnpatch_core.edges.changes import Entry, Given, SenderChanges, written
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.put import EdgePut, Opened
from nnpatch_core.edges.recording import Graph, Moved, graphed
from nnpatch_core.edges.tangent import Tangent, open_tangent
from nnpatch_core.errors import MetricError
from nnpatch_core.gradients import GraphLimits, check_gradients, cotangents, graph_limits
from nnpatch_core.interventions import PairRuns
from nnpatch_core.metrics import MetricContext, activations_read, answers_followed
from nnpatch_core.results import Outcome
from nnpatch_core.sweep import (
    Checkpoint,
    Ledger,
    Parts,
    Sweep,
    Versions,
    baselines,
    identity,
    make_bar,
    outcome,
    run_unpatched,
    try_out,
)

#: The methods, each by how a run is led from the target's to the source's.
EAP, INPUTS, ACTIVATIONS, BOTH = "eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"
METHODS = (EAP, INPUTS, ACTIVATIONS, BOTH)
#: How many rows of senders' changes are made at a time.
_ROWS = 128

#: A run with its graph, the share of the estimate that its gradient is, and the steps between
#: which a sender must write for it: all senders, but for those whose own output is moved.
_Point: TypeAlias = "tuple[Tangent, float, tuple[int, int] | None, Mapping[str, Tensor]]"


@attrs.frozen
class Estimate:
    """How edges are estimated.

    Args:
        method: one of `METHODS`.
        steps: points on a path from the target run to the source run.
    """

    method: str
    steps: int

    @property
    def words(self) -> str:
        """Its name in an outcome."""
        integrated = self.method in (INPUTS, ACTIVATIONS)
        return f"{self.method}, {self.steps} steps" if integrated else self.method

    @property
    def points(self) -> int:
        """How many runs with a graph there are, of each part."""
        return {EAP: 1, BOTH: 2}.get(self.method, self.steps)

    def passes(self, layers: int) -> int:
        """How many runs with a graph there are, of all parts."""
        return self.points * (1 + 2 * layers if self.method == ACTIVATIONS else 1)

    def parts(self, sweep: Sweep) -> Parts:
        """The parts that can be made apart: all edges of senders that have runs of their own.

        Along activations these are the edges of each layer's heads, and of each MLP; else all of a
        prompt's edges come of the same runs.
        """
        named: list[Any] = list(sweep.patches.cells.named)
        owner = np.zeros(len(named), dtype=np.int64)
        if self.method == ACTIVATIONS:
            owner[:] = [written(each.entry.senders[0]) for each in named]
        return Parts(owner, np.full(1 + owner.max(), self.points))


def estimate_edges(
    sweep: Sweep,
    runs: PairRuns,
    put: EdgePut,
    how: Estimate,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Estimate what each edge would measure.

    Args:
        sweep: the edges.
        runs: the prompts of both runs.
        put: what senders get.
        how: by which gradients.
        checkpoint: where what was estimated is kept.

    Raises:
        PatchingError: one of its kinds; bad input before any backward runs.
    """
    model = sweep.patches.model
    told = "" if put.given is None else f"ablation {put.given.runs.ablation}, "
    kind = f"edge ({told}{how.words})"
    check_gradients(model)
    _check_metrics(sweep, how)
    limits = graph_limits(
        sweep.limits,
        sweep.batch,
        sweep.seq_len,
        sweep.patches.n_layers,
        given=sweep.options.memory_budget is not None,
        batch_size=sweep.options.batch_size,
        held=False,
    )
    chunks = sweep.limits.chunks(sweep.batch, limits.prompts)
    with evaluating(model), frozen(model):
        # The runs that senders' changes are read off have the graphs that are needed, if two fit.
        opened_in = partial(
            put.opened,
            sweep,
            runs,
            target=how.method in (EAP, BOTH),
            source=how.method == BOTH and limits.rows >= 2 * limits.prompts,
        )
        # Where all prompts run together, the recorded runs are the unpatched ones too.
        kept = [opened_in(chunk) for chunk in chunks] if len(chunks) == 1 else []
        context = _context(sweep, runs, chunks, kept)
        baseline, versions = baselines(sweep, context), Versions.of(sweep, runs.reading)
        once = versions.baselines(baseline)
        runs.check_baseline(context.once, once)
        try_out(sweep.metrics, context, baseline)
        # Of all prompts at once, so that a metric sees them in their order.
        weights = cotangents(sweep.metrics, context.target_logits, context, flat=how.method != EAP)
        if checkpoint is not None:
            values, cut = put(sweep, runs), _cut(sweep, limits)
            own = identity(sweep, runs, values, kind, "gradient", cut, context, baseline)
            checkpoint.open(own, sweep.options.call, model)
        parts = how.parts(sweep)
        ledger = Ledger.of(parts, chunks, sweep.metrics, checkpoint)
        total = int(ledger.left.sum()) * how.points
        with make_bar(total, sweep.options.progress, desc="gradients") as bar:
            for number, chunk in enumerate(chunks):
                left = ledger.to_make(number, parts.there)
                if not left:
                    continue
                opened = kept.pop() if kept else opened_in(chunk)
                part = _Part.of(sweep, runs, opened, how, chunk, context, weights)
                del opened
                still = part.still
                for some, changes in part.changes(left, bar.update):
                    ledger.note(number, some, changes, still, torch.zeros_like(still))
        # A graph that nobody needs must not stay.
        kept.clear()
        ledger.close()
    tally = versions.tally(ledger.total(baseline))
    mask = put.mask(sweep, runs)
    return outcome(
        versions.sweep(sweep),
        kind,
        runs.scale,
        tally,
        once,
        runs.prompts,
        versions.mask(mask),
        exact=tally.known.all(1),
    )


def _context(
    sweep: Sweep, runs: PairRuns, chunks: Sequence[slice], kept: Sequence[Opened]
) -> MetricContext:
    """The context of metrics; runs that are opened already need not be made again."""
    logits = [(each.logits, each.layers.target.logits) for each in kept if each.logits is not None]
    if logits:
        return runs.context(*logits[0])
    source, target = (run_unpatched(sweep, batch, chunks) for batch in (runs.source, runs.target))
    return runs.context(source, target)


def _cut(sweep: Sweep, limits: GraphLimits) -> dict[str, str]:
    """How much runs together; see `identity`."""
    return {
        "given all prompts": ", ".join(sweep.waiting) or "no metric",
        "prompts at once": str(limits.prompts),
        "rows at once": str(limits.rows),
    }


def _check_metrics(sweep: Sweep, how: Estimate) -> None:
    """Raise `MetricError` for a metric of which more is asked than the target run's gradient."""
    for name, metric in sweep.metrics.items():
        if activations_read(metric):
            raise MetricError(
                f"metric {name!r} reads activations, and estimates of edges follow the logits "
                "alone: take method='exact'"
            )
        if how.method != EAP and (name in sweep.waiting or answers_followed(metric)):
            raise MetricError(
                f"method={how.method!r} takes gradients in other runs than the target's, of each "
                f"prompt alone, and metric {name!r} is not declared so: take method='eap' or "
                "'exact', or declare it with @per_prompt"
            )


@attrs.frozen(eq=False)
class _Part:
    """The edges in some of the prompts.

    Args:
        sweep: the edges.
        runs: the prompts of both runs.
        how: by which gradients.
        chunk: which prompts.
        context: what metrics compare with, for these.
        weights: for each metric its gradient with respect to the target run's logits, of these.
        layers: the layers, and the target run.
        given: what senders get.
        changes_of: what the entries change in the stream.
        entries: `[cells]`, the entry of each cell.
        receivers: `[cells]`, the number of its receiver.
        steps: `[entries]`, from which step on the stream holds what each writes.
        graphs: of the target and the source run, those that there are; each is used once.
    """

    sweep: Sweep
    runs: PairRuns
    how: Estimate
    chunk: slice
    context: MetricContext
    weights: Mapping[str, Tensor]
    layers: Layers
    given: Given
    changes_of: SenderChanges
    entries: Any
    receivers: Any
    steps: Any
    graphs: dict[str, Graph | None]

    @classmethod
    def of(
        cls,
        sweep: Sweep,
        runs: PairRuns,
        opened: Opened,
        how: Estimate,
        chunk: slice,
        context: MetricContext,
        weights: Mapping[str, Tensor],
    ) -> _Part:
        layers, given = opened.layers, opened.given
        nodes = layers.nodes
        named: list[Any] = list(sweep.patches.cells.named)
        every: dict[int, Entry] = {id(each.entry): each.entry for each in named}
        # In the order in which they write, so that those before a receiver are the first ones.
        order = sorted(every, key=lambda key: written(every[key].senders[0]))
        numbers = {key: number for number, key in enumerate(order)}
        entries = [every[key].rows(chunk) for key in order]
        receivers = {each: number for number, each in enumerate(nodes.receivers)}
        return cls(
            sweep,
            runs,
            how,
            chunk,
            context.rows(torch.arange(chunk.start, chunk.stop, device="cpu")),
            {name: weight[chunk] for name, weight in weights.items()},
            layers,
            given,
            SenderChanges.of(layers, given, entries),
            np.array([numbers[id(each.entry)] for each in named]),
            np.array([receivers[each.receivers[0]] for each in named]),
            np.array([written(each.senders[0]) for each in entries]),
            {"target": opened.target, "source": opened.source},
        )

    @property
    def still(self) -> Tensor:
        """`[cells, prompts]`, bool: where nothing that is read changes."""
        reaching = self.runs.target.rows(self.chunk).reaching
        return ~(self.changes_of.moved & reaching).any(-1)[torch.from_numpy(self.entries)]

    def changes(
        self, parts: Sequence[int], tick: Callable[[], object]
    ) -> Iterator[tuple[Sequence[int], dict[str, Tensor]]]:
        """Parts, and for each metric what each edge changes, `[cells, prompts]` in float64.

        Args:
            parts: which are wanted; see `Estimate.parts`.
            tick: called after each run.
        """
        moved = self.changes_of.moved.any(0).any(0).nonzero()
        if not len(moved):
            shape = len(self.entries), self.chunk.stop - self.chunk.start
            nothing = torch.zeros(shape, dtype=torch.float64, device="cpu")
            yield parts, {name: nothing.clone() for name in self.sweep.metrics}
            return
        start = int(moved[0])
        added = self._added(start)
        # There may be no gradient at padding, where nothing is added.
        still = ~self.changes_of.moved.any(0)[:, start:, None]
        size = len(self.steps), len(self.layers.nodes.receivers), len(added)
        for part in parts:
            every = {
                name: torch.zeros(size, dtype=torch.float64, device="cpu")
                for name in self.sweep.metrics
            }
            senders, gradients = self._averaged(self._points(part), start, tick)
            first, last = 0, len(self.steps)
            if senders is not None:
                first, last = np.searchsorted(self.steps, senders).tolist()
            for (name, step), (numbers, gradient) in gradients.items():
                below = min(last, int(np.searchsorted(self.steps, step, side="right")))
                if below <= first:
                    continue
                gradient = gradient.masked_fill(still.to(gradient.device), 0)
                # It is smaller than what all senders add, and may lie on another device.
                own = gradient.flatten(2).permute(1, 2, 0).to(added.device)
                effects = torch.bmm(added[:, first:below].to(own), own).permute(1, 2, 0)
                every[name][first:below, numbers] += effects.cpu().double()
            yield (
                [part],
                {name: value[self.entries, self.receivers] for name, value in every.items()},
            )

    def _averaged(
        self, points: Iterator[_Point], start: int, tick: Callable[[], object]
    ) -> tuple[tuple[int, int] | None, dict[tuple[str, int], tuple[list[int], Tensor]]]:
        """The steps of the senders that points are for, and their gradients, averaged.

        For each metric and step: the numbers of its receivers, and `[receivers, prompts, seq -
        start, width]`.
        """
        found: dict[tuple[str, int], tuple[list[int], Tensor]] = {}
        senders: tuple[int, int] | None = None
        for tangent, share, senders, weights in points:
            for name, weight in weights.items():
                lowest = 0 if senders is None else senders[0]
                for step, numbers, gradient in tangent.gradients(weight, start, lowest):
                    if (name, step) in found:
                        found[name, step][1].add_(gradient, alpha=share)
                    else:
                        found[name, step] = numbers, share * gradient
            # Its graph must not stay while the next one is made.
            del tangent
            tick()
        return senders, found

    def _added(self, start: int) -> Tensor:
        """`[prompts, entries, (seq - start) * width]`: what each entry adds to the stream."""
        count, batch = len(self.steps), len(self.layers.target.batch)
        last = 2 * self.layers.nodes.n_layers
        entries, prompts = np.divmod(np.arange(count * batch), batch)
        parts = [
            self.changes_of.at(
                entries[first : first + _ROWS],
                torch.from_numpy(prompts[first : first + _ROWS]),
                last,
            )[:, start:].flatten(1)
            for first in range(0, count * batch, _ROWS)
        ]
        return torch.cat(parts).view(count, batch, -1).transpose(0, 1).contiguous()

    def _points(self, part: int) -> Iterator[_Point]:
        """The runs whose gradients are averaged for a part."""
        target, method = self.layers.target, self.how.method
        if method == EAP:
            return iter([self._of_run("target", 1.0, whole=True)])
        if method == BOTH:
            return self._both()
        if method == INPUTS or not part:
            to = self._masked(self.given.stream, target.streams[0])
            return self._along(target.streams[0], to, Moved, None if method == INPUTS else (0, 1))
        # The step at which a sender writes: heads of a layer, and then its MLP.
        layer, senders = (part - 1) // 2, (part, part + 1)
        if part % 2:
            attn = target.attn[layer]
            everyone = torch.arange(len(attn), device="cpu")
            heads = self.given.heads[layer].expand(len(attn), -1, -1)
            added = self.layers.added_by_heads(layer, heads, everyone) / self.layers.attn[layer]
            return self._along(attn, self._masked(added, attn), partial(_attn_at, layer), senders)
        mlp = target.mlp[layer]
        to = self._masked(self.given.mlp[layer], mlp)
        return self._along(mlp, to, partial(_mlp_at, layer), senders)

    def _along(
        self,
        own: Tensor,
        to: Tensor,
        moved: Callable[[Tensor], Moved],
        senders: tuple[int, int] | None,
    ) -> Iterator[_Point]:
        """Points on the way from the target run's activation to what it is to be."""
        steps = self.how.steps
        for number in range(steps):
            value = torch.lerp(own, to, (number + 1) / steps)
            yield self._at(moved(value), 1 / steps, senders)

    def _both(self) -> Iterator[_Point]:
        """The target run and the source run."""
        yield self._of_run("target", 0.5)
        yield self._of_run("source", 0.5)

    def _of_run(self, run: str, share: float, *, whole: bool = False) -> _Point:
        """One of the two runs."""
        graph = self.graphs.pop(run)
        if graph is None:
            batch = self.runs.source.rows(self.chunk)
            *_, graph = graphed(self.layers.nnmodel, self.layers.api, batch)
        tangent = Tangent(self.layers, graph)
        return tangent, share, None, self._weights(tangent, whole=whole)

    def _masked(self, given: Tensor, own: Tensor) -> Tensor:
        """The given activation, where a prompt may be changed."""
        real = self.given.mask.bool().to(own.device)[..., None]
        return torch.where(real, given.to(own), own)

    def _at(self, moved: Moved, share: float, senders: tuple[int, int] | None) -> _Point:
        tangent = open_tangent(self.layers, moved)
        return tangent, share, senders, self._weights(tangent)

    def _weights(self, tangent: Tangent, *, whole: bool = False) -> Mapping[str, Tensor]:
        """For each metric its gradient with respect to a run's logits."""
        if whole:
            return self.weights
        logits = tangent.graph.logits.detach()
        return cotangents(self.sweep.metrics, logits, self.context, flat=True)


def _attn_at(layer: int, value: Tensor) -> Moved:
    return Moved(attn={layer: value})


def _mlp_at(layer: int, value: Tensor) -> Moved:
    return Moved(mlp={layer: value})
