"""How a sweep is estimated: by which gradients, and on how many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PatchingError
from nnpatch_core.gradients import (
    FIXED,
    AtPStar,
    AttentionPlaces,
    Entries,
    Estimator,
    Graph,
    GraphLimits,
    Paths,
    Terms,
    adding_places,
    cells_apart,
    cotangents,
    fixed_attentions,
    graph_limits,
    joint,
    lowest,
    mean_size,
    open_graph,
    record_entries,
    still,
    terms_of,
    waiting_paths,
)
from nnpatch_core.memory import Limits
from nnpatch_core.metrics import MetricContext
from nnpatch_core.sweep.parts import Parts
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
        several = (np.diff(patches.cells.ends) > 1).nonzero()[0]
        if len(several) and repairs.words:
            raise PatchingError(
                f"{' and '.join(repairs.words)} is defined for one site at a time, and "
                f"{patches.cells[int(several[0])].label} has several: leave it out, or ask for the "
                "plain estimate"
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

        alone = cells_apart(patches.cells)
        joint = tuple((~alone).nonzero()[0].tolist())
        # Along a path all of an activation moves, so that a cell's elsewhere matters.
        numbers = np.arange(len(alone))
        every = together = terms_of(patches, numbers, apart=repairs.steps is not None)
        if joint or repairs.qk_fix:
            grouped = ("k",) if repairs.qk_fix else ()
            together = terms_of(patches, alone.nonzero()[0], grouped)
        limits, waiting = cut(sweep.limits), 0
        if repairs.steps is not None and sweep.waiting and limits.prompts < batch:
            sizes = len(every), batch, repairs.steps
            waiting, left = waiting_paths(sweep.limits, *sizes, [*sweep.waiting])
            limits = cut(left)
        return cls(sweep, repairs, limits, fixed, every, together, joint, waiting)

    @cached_property
    def chunks(self) -> list[slice]:
        """The prompts whose graphs are kept together."""
        return self.sweep.limits.chunks(self.sweep.batch, self.limits.prompts)

    @property
    def told(self) -> dict[str, str]:
        """How much runs together, which decides on last digits."""
        waiting, limits = self.sweep.waiting, self.limits
        return {
            "given all prompts": ", ".join(waiting) or "no metric",
            "prompts at once": str(limits.prompts),
            "rows at once": str(limits.rows),
            "paths at once": str(self.at_once),
        }

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

    @property
    def blocks(self) -> int:
        """How many rows of the tally each cell has: several where layers are held by parts.

        They are where all prompts run together, and there is nothing else to share out.
        """
        if not self.repairs.grad_drop or len(self.chunks) > 1:
            return 1
        return 1 + self.sweep.patches.n_layers - lowest(self.together)

    @cached_property
    def parts(self) -> Parts:
        """All that can be made apart: paths; or layers that are held, attentions, and joint cells.

        The part of all cells of which one backward tells comes first.
        """
        cells, layers = len(self.sweep.patches.cells), self.sweep.patches.n_layers
        if self.repairs.steps is not None:
            owner = np.zeros(cells, dtype=np.int64)
            for number, terms in enumerate(self.every):
                owner[terms.cells.numpy()] = number
            work = [self.repairs.steps * (layers - each.place.layer) for each in self.every]
            return Parts(owner, np.array(work), together=bool(self.at_once))
        # A forward, and a backward, which takes twice as long.
        whole = 3 * (layers - self.first_layer)
        if self.repairs.grad_drop and len(self.chunks) > 1:
            return Parts(np.zeros(cells, dtype=np.int64), np.array([whole * layers]))
        held = range(1, self.blocks)
        owner = np.repeat(np.arange(self.blocks), cells)
        work = [whole, *held]
        for layer in self.fixed:
            own = [each for each in self._at_attention if each.place.layer == layer]
            for terms in own:
                for block in range(self.blocks):
                    owner[block * cells + terms.cells.numpy()] = len(work)
            work.append(1 + max((len(each.groups) for each in own), default=0))
        for cell in self.joint:
            owner[cell] = len(work)
            work.append(whole)
        return Parts(owner, np.array(work))

    @property
    def _at_attention(self) -> list[Terms]:
        """The terms of queries and keys that the QK fix is for."""
        fixed = self.fixed
        return [each for each in self.together if fixed and each.place.name in FIXED]

    def groups(self) -> list[Sequence[int]]:
        """The parts that are looked at together: all, unless the logits of paths have to wait."""
        every = range(len(self.parts.work))
        if not self.at_once:
            return [every]
        return [every[first : first + self.at_once] for first in every[:: self.at_once]]

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

    def still(self, opened: OpenedGraph) -> tuple[Tensor, Tensor]:
        """Two masks of some prompts: where what is put is what was there, or nothing reads it."""
        source = opened.graph if opened.graph is not None else opened.entries
        assert source is not None
        return still(
            [terms.rows(opened.chunk) for terms in self.every],
            len(self.sweep.patches.cells),
            source.activations,
            opened.intervention,
            opened.target,
        )

    def estimate(
        self,
        opened: OpenedGraph,
        context: MetricContext,
        weights: Mapping[str, Tensor],
        parts: Sequence[int],
        along: Mapping[Terms, Mapping[str, Tensor]],
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The estimates of some prompts, as they are made.

        Args:
            opened: the prompts.
            context: what the metrics compare with, for these.
            weights: the metrics' gradients with respect to their logits.
            parts: which are wanted.
            along: for the paths among these the gradients that are known already; see
                `path_weights`.

        Yields:
            Parts, and for each metric the estimated change `[rows, batch]`, 0 in other rows.
        """
        if self.repairs.steps is not None:
            yield from self._along_paths(opened, context, parts, along)
            return
        first_joint = len(self.parts.work) - len(self.joint)
        of_target = [part for part in parts if part < first_joint]
        if of_target:
            yield of_target, self._at_target(opened, weights, of_target)
        patches = self.sweep.patches.rows(opened.chunk)
        for part in parts[len(of_target) :]:
            cell = self.joint[part - first_joint]
            each = joint(patches, opened.target, cell, opened.intervention, weights)
            changes = self._nothing(opened)
            for name, values in each.items():
                changes[name][cell] = values
            self.tick()
            yield [part], changes

    def folded(self, rows: Tensor) -> Tensor:
        """The rows of the tally as `[cells, batch]`, where each cell has several."""
        if self.blocks == 1:
            return rows
        blocks = rows.view(self.blocks, -1, rows.shape[1])
        return mean_size(blocks, self.together, [*self.fixed])

    def _nothing(self, opened: OpenedGraph) -> dict[str, Tensor]:
        """Zeros for each metric, `[rows, batch]`."""
        shape = len(self.parts.owner), len(opened.target)
        return {
            name: torch.zeros(shape, dtype=torch.float64, device="cpu")
            for name in self.sweep.metrics
        }

    def _at_target(
        self, opened: OpenedGraph, weights: Mapping[str, Tensor], parts: Sequence[int]
    ) -> dict[str, Tensor]:
        assert opened.graph is not None
        if not self.together:
            return self._nothing(opened)
        every = [terms.rows(opened.chunk) for terms in self.together]
        estimator = Estimator(
            self.sweep.patches, opened.target, opened.intervention, opened.graph, every
        )
        star = AtPStar(estimator, self.fixed, self.limits.rows, self.tick)
        held = range(lowest(self.together), self.sweep.patches.n_layers)
        if self.repairs.grad_drop and self.blocks == 1:
            return {
                name: mean_size(star.held(weight, True, held, [*self.fixed]), every, self.fixed)
                for name, weight in weights.items()
            }
        layers = [layer for n, layer in enumerate(self.fixed, self.blocks) if n in parts]
        if not self.repairs.grad_drop:
            return {
                name: star.signed(weight, 0 in parts, layers) for name, weight in weights.items()
            }
        some = [layer for n, layer in enumerate(held, 1) if n in parts]
        return {
            name: star.held(weight, 0 in parts, some, layers).flatten(0, 1)
            for name, weight in weights.items()
        }

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
        parts: Sequence[int],
        along: Mapping[Terms, Mapping[str, Tensor]],
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        paths = self._paths(opened, context)
        for part in parts:
            terms, changes = self.every[part], self._nothing(opened)
            own = terms.rows(opened.chunk)
            for name, effects in paths.effects(own, along.get(terms, {})).items():
                own.add(changes[name], effects)
            self.tick()
            yield [part], changes


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
