"""How a sweep is estimated: by which gradients, and on how many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PatchingError
from nnpatch_core.gradients import (
    AtPStar,
    AttentionPlaces,
    Entries,
    Estimator,
    Graph,
    GraphLimits,
    Paths,
    Terms,
    adding_places,
    are_apart,
    cotangents,
    fixed_attentions,
    graph_limits,
    joint,
    open_graph,
    record_entries,
    still,
    terms_of,
    waiting_paths,
)
from nnpatch_core.memory import Limits
from nnpatch_core.metrics import MetricContext
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Intervention


@attrs.frozen
class Repairs:
    """Which estimate is wanted; see `attribution_patching`."""

    steps: int | None
    qk_fix: bool
    grad_drop: bool

    @property
    def words(self) -> list[str]:
        """Its names in an outcome."""
        if self.qk_fix and self.grad_drop:
            return ["AtP*"]
        named = {"QK fix": self.qk_fix, "GradDrop": self.grad_drop}
        integrated = [] if self.steps is None else [f"integrated, {self.steps} steps"]
        return integrated + [name for name, wanted in named.items() if wanted]


def check_repairs(steps: Any, qk_fix: Any, grad_drop: Any) -> Repairs:
    """The repairs that arguments ask for.

    Raises:
        PatchingError: they ask for two at once, or for something that is none.
    """
    for name, value in (("qk_fix", qk_fix), ("grad_drop", grad_drop)):
        # Strictly, as 1 would be a number of steps.
        if not isinstance(value, bool):
            raise PatchingError(f"{name} must be True or False, got {shown(value)}")
    if steps is not None:
        if not 1 <= strict_int(steps, "steps", PatchingError) < 2**31:
            raise PatchingError(f"steps must be at least 1, and not beyond 2**31, got {steps}")
        if qk_fix or grad_drop:
            given = "qk_fix=True" if qk_fix else "grad_drop=True"
            raise PatchingError(
                f"steps={steps} and {given} are two repairs of one estimate, and nobody has said "
                "what they are together: ask for one of them"
            )
    return Repairs(steps, qk_fix, grad_drop)


@attrs.frozen(eq=False)
class OpenedGraph:
    """Some prompts with their target run.

    Args:
        chunk: which prompts.
        target: the prompts.
        intervention: what is put there.
        logits: `[batch, vocab]` of the target run.
        source_logits: `[batch, vocab]` of the run where activations were taken, if there is one.
        graph: the target run with its graph; None along a path, where each step has its own.
        entries: what paths begin with; None otherwise.
    """

    chunk: slice
    target: Batch
    intervention: Intervention
    logits: Tensor
    source_logits: Tensor | None
    graph: Graph | None
    entries: Entries | None


@attrs.frozen(eq=False)
class Estimation:
    """A sweep that is estimated.

    Args:
        sweep: what is patched.
        repairs: how it is estimated.
        limits: how much is kept at once.
        fixed: by layer the attentions that the QK fix runs again.
        every: the terms of all cells.
        together: those of the cells that are estimated together; keys are fixed a group at a time.
        joint: the other cells, whose sites act on one another, by number.
        at_once: how many paths are looked at together, where the logits along them wait for
            those of all prompts; 0 where none do.
        tick: called after each backward.
    """

    sweep: Sweep
    repairs: Repairs
    limits: GraphLimits
    fixed: Mapping[int, AttentionPlaces]
    every: Sequence[Terms]
    together: Sequence[Terms]
    joint: tuple[int, ...]
    at_once: int = 0
    tick: Callable[[], None] = lambda: None

    @property
    def first_layer(self) -> int:
        """The lowest layer that has a site."""
        return self.sweep.patches.places[0].layer

    @classmethod
    def of(cls, sweep: Sweep, repairs: Repairs) -> Estimation:
        """Check what the repairs ask of sites and adapter, and cut the prompts to the memory.

        Raises:
            PatchingError: one of its kinds.
        """
        patches, batch = sweep.patches, sweep.batch
        _check_adapters(sweep, repairs)
        cells = dict(enumerate(patches.cells))
        several = [cell for cell in cells.values() if len(cell.sites) > 1]
        if several and repairs.words:
            raise PatchingError(
                f"{' and '.join(repairs.words)} is defined for one site at a time, and "
                f"{several[0].label} has several: leave it out, or ask for the plain estimate"
            )
        fixed = fixed_attentions(patches) if repairs.qk_fix else {}
        if repairs.grad_drop:
            adding_places(patches)

        def cut(limits: Limits) -> GraphLimits:
            return graph_limits(
                limits,
                batch,
                sweep.seq_len,
                patches.n_layers - patches.places[0].layer,
                given=sweep.options.memory_budget is not None,
                batch_size=sweep.options.batch_size,
                held=repairs.grad_drop and repairs.qk_fix,
            )

        alone = {n: cell for n, cell in cells.items() if are_apart(cell.sites)}
        joint = tuple(n for n in cells if n not in alone)
        # Along a path all of an activation moves, so that a cell's elsewhere matters.
        every = together = terms_of(patches, cells, apart=repairs.steps is not None)
        if joint or repairs.qk_fix:
            together = terms_of(patches, alone, ("k",) if repairs.qk_fix else ())
        limits, waiting = cut(sweep.limits), 0
        if repairs.steps is not None and sweep.waiting and limits.prompts < batch:
            sizes = len(every), batch, repairs.steps
            waiting, left = waiting_paths(sweep.limits, *sizes, [*sweep.waiting])
            limits = cut(left)
        return cls(sweep, repairs, limits, fixed, every, together, joint, waiting)

    @property
    def chunks(self) -> list[slice]:
        """The prompts whose graphs are kept together."""
        return self.sweep.limits.chunks(self.sweep.batch, self.limits.prompts)

    @property
    def passes(self) -> int:
        """How many backwards there are, about."""
        each = 1 + len(self.joint)
        if self.repairs.steps is not None:
            each = len(self.every)
        elif self.repairs.grad_drop:
            each += self.sweep.patches.n_layers - self.first_layer
        return len(self.chunks) * each * len(self.sweep.metrics)

    def open(
        self,
        chunk: slice,
        target: Batch,
        intervention: Intervention,
        source_logits: Tensor | None,
    ) -> OpenedGraph:
        """Make the target run of the prompts of a chunk, with its graph.

        Raises:
            PatchingError: the value depends on the cell, which a repair does not go with.
        """
        patches, repairs = self.sweep.patches, self.repairs
        nnmodel, places = patches.nnmodel, patches.places
        if intervention.by_cell and repairs.words:
            raise PatchingError(
                f"{' and '.join(repairs.words)} is defined for values that are the same in every "
                "cell, and these depend on it: ask for the plain estimate"
            )
        if repairs.steps is not None:
            entries = record_entries(nnmodel, target, places)
            logits = entries.logits
            return OpenedGraph(chunk, target, intervention, logits, source_logits, None, entries)
        called = {layer: each.module for layer, each in self.fixed.items()}
        needed = [place for each in self.fixed.values() for place in each.all]
        held = []
        if repairs.grad_drop:
            held = [place for place in adding_places(patches) if place.layer >= self.first_layer]
        graph = open_graph(nnmodel, target, [*places, *needed], held=held, called=called)
        logits = graph.logits.detach()
        return OpenedGraph(chunk, target, intervention, logits, source_logits, graph, None)

    def weights(self, context: MetricContext) -> dict[str, Tensor]:
        """For each metric its gradient with respect to the logits of the target run.

        Of all prompts at once, so that a metric sees them in their order.

        Raises:
            MetricError: a metric has none.
        """
        flat = self.repairs.steps is not None
        return cotangents(self.sweep.metrics, context.target_logits, context, flat=flat)

    def groups(self) -> list[Sequence[Terms]]:
        """The terms that are estimated together: all, unless the logits of paths have to wait."""
        if not self.at_once:
            return [self.every]
        starts = range(0, len(self.every), self.at_once)
        return [self.every[first : first + self.at_once] for first in starts]

    def path_logits(
        self, opened: OpenedGraph, context: MetricContext, group: Sequence[Terms]
    ) -> dict[Terms, Tensor]:
        """For each of the terms the logits along its path, `[steps, batch, vocab]`."""
        paths = self._paths(opened, context)
        return {terms: paths.logits(terms.rows(opened.chunk)) for terms in group}

    def path_weights(self, logits: Tensor, context: MetricContext) -> dict[str, Tensor]:
        """For each metric that is given all prompts its gradients at the points of a path.

        Args:
            logits: `[steps, batch, vocab]` there, of all prompts.
            context: what the metrics compare with, for all of them.

        Returns:
            `[steps, batch, vocab]` for each.
        """
        steps = [cotangents(self.sweep.waiting, each, context, flat=True) for each in logits]
        return {name: torch.stack([each[name] for each in steps]) for name in self.sweep.waiting}

    def estimate(
        self,
        opened: OpenedGraph,
        context: MetricContext,
        weights: Mapping[str, Tensor],
        group: Sequence[Terms],
        along: Mapping[Terms, Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The estimates of some prompts.

        Args:
            opened: the prompts.
            context: what the metrics compare with, for these.
            weights: the metrics' gradients with respect to their logits.
            group: along paths: the terms whose part it is.
            along: for these the gradients that are known already; see `path_weights`.

        Returns:
            For each metric the estimated change `[cells, batch]`, and the masks of `still`.
        """
        patches = self.sweep.patches.rows(opened.chunk)
        source = opened.graph if opened.graph is not None else opened.entries
        assert source is not None
        every = [terms.rows(opened.chunk) for terms in self.every]
        elided, unread = still(
            every,
            len(patches.cells),
            source.activations,
            opened.intervention,
            opened.target,
        )
        if self.repairs.steps is not None:
            changes = self._along_paths(opened, context, group, along)
        else:
            changes = self._at_target(opened, weights)
            for cell in self.joint:
                each = joint(patches, opened.target, cell, opened.intervention, weights)
                for name, values in each.items():
                    changes[name][cell] = values
                self.tick()
        zero = elided | unread
        changes = {name: torch.where(zero, 0.0, values) for name, values in changes.items()}
        return changes, elided, unread

    def _at_target(self, opened: OpenedGraph, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert opened.graph is not None
        estimator = Estimator(
            self.sweep.patches,
            opened.target,
            opened.intervention,
            opened.graph,
            [terms.rows(opened.chunk) for terms in self.together],
        )
        if not self.together:
            return {name: estimator.empty() for name in weights}
        star = AtPStar(estimator, self.fixed, self.limits.rows, self.tick)
        estimated = star.sizes if self.repairs.grad_drop else star.signed
        return {name: estimated(weight) for name, weight in weights.items()}

    def _paths(self, opened: OpenedGraph, context: MetricContext) -> Paths:
        entries, steps = opened.entries, self.repairs.steps
        assert entries is not None
        assert steps is not None
        return Paths(
            self.sweep.nnmodel,
            opened.target,
            opened.intervention,
            entries,
            self.sweep.alone if self.at_once else self.sweep.metrics,
            context,
            steps,
            self.limits.rows,
        )

    def _along_paths(
        self,
        opened: OpenedGraph,
        context: MetricContext,
        group: Sequence[Terms],
        along: Mapping[Terms, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        paths = self._paths(opened, context)
        shape = len(self.sweep.patches.cells), len(opened.target)
        changes = {
            name: torch.zeros(shape, dtype=torch.float64, device="cpu")
            for name in self.sweep.metrics
        }
        for terms in group:
            own = terms.rows(opened.chunk)
            for name, effects in paths.effects(own, along.get(terms, {})).items():
                own.add(changes[name], effects)
            self.tick()
        return changes


def _check_adapters(sweep: Sweep, repairs: Repairs) -> None:
    adapters = sweep.patches.adapters
    paths = {api.layers for api in adapters}
    if len(paths) > 1:
        raise PatchingError(
            "sites of adapters that name different lists of layers cannot be attributed "
            f"together: {', '.join(sorted(paths))}"
        )
    if len(adapters) > 1 and (repairs.qk_fix or repairs.grad_drop):
        raise PatchingError(
            f"{' and '.join(repairs.words)} goes by the table of one adapter, and the sites are "
            "of several: ask for them in turn, or for the plain estimate"
        )
