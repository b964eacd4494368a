"""How a sweep is estimated: by which gradients, and on how many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import shown
from nnpatch_core._integers import strict_int
from nnpatch_core._models import module_of
from nnpatch_core.adapters import n_layers
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PatchingError
from nnpatch_core.gradients import (
    Entries,
    Estimator,
    Graph,
    GraphLimits,
    Paths,
    Star,
    Terms,
    Where,
    adding_sites,
    are_apart,
    cotangents,
    graph_limits,
    joint,
    known,
    needed_sites,
    open_graph,
    record_entries,
    terms_of,
    waiting_paths,
)
from nnpatch_core.gradients.attention import attention_module
from nnpatch_core.memory import Limits
from nnpatch_core.metrics import MetricContext
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Replacement


@attrs.frozen
class Method:
    """Which estimate is wanted; see `attribution_patching`."""

    steps: int | None
    qk_fix: bool
    grad_drop: bool

    @property
    def words(self) -> list[str]:
        """What it is called in an outcome."""
        if self.qk_fix and self.grad_drop:
            return ["AtP*"]
        named = {"QK fix": self.qk_fix, "GradDrop": self.grad_drop}
        integrated = [] if self.steps is None else [f"integrated, {self.steps} steps"]
        return integrated + [name for name, wanted in named.items() if wanted]


def check_method(steps: Any, qk_fix: Any, grad_drop: Any) -> Method:
    """The method that arguments ask for.

    Raises:
        PatchingError: they ask for two at once, or for something that is none.
    """
    for name, value in (("qk_fix", qk_fix), ("grad_drop", grad_drop)):
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
    return Method(steps, qk_fix, grad_drop)


@attrs.frozen(eq=False)
class Chunk:
    """Some prompts with their target run.

    Args:
        target: the prompts.
        replacement: what is put there.
        logits: `[batch, vocab]` of the target run.
        source_logits: `[batch, vocab]` of the run where activations were taken, if there is one.
        graph: the target run with its graph; None along a path, where each step has its own.
        entries: what paths begin with; None otherwise.
    """

    target: Batch
    replacement: Replacement
    logits: Tensor
    source_logits: Tensor | None
    graph: Graph | None
    entries: Entries | None


@attrs.frozen(eq=False)
class Estimation:
    """A sweep that is estimated.

    Args:
        sweep: what is patched.
        method: how it is estimated.
        limits: how much is kept at once.
        every: the terms of all cells.
        together: those of the cells that are estimated together; keys are fixed a group at a time.
        joint: the other cells, whose sites act on one another, by number.
        places: how many paths are looked at together, where the logits along them wait for those of
            all prompts; 0 where none do.
        tick: called after each backward.
    """

    sweep: Sweep
    method: Method
    limits: GraphLimits
    every: Mapping[Where, Terms]
    together: Mapping[Where, Terms]
    joint: tuple[int, ...]
    places: int = 0
    tick: Callable[[], None] = lambda: None

    @property
    def first_layer(self) -> int:
        """The lowest layer that has a site."""
        return min(layer for _, _, layer in self.every)

    @property
    def n_layers(self) -> int:
        """The model's layers."""
        return n_layers(self.sweep.sites[0].api, module_of(self.sweep.nnmodel))

    @classmethod
    def of(
        cls, sweep: Sweep, method: Method, mask: Tensor, given: bool, batch_size: int | None
    ) -> Estimation:
        """Check what the method asks of sites and adapter, and cut the prompts to the memory.

        Args:
            sweep: what is patched.
            method: how it is estimated.
            mask: `[batch, seq]`: where.
            given: whether the user has given the memory budget.
            batch_size: how many prompts may run together.

        Raises:
            PatchingError: one of its kinds.
        """
        paths = {site.api.layers for site in sweep.sites}
        if len(paths) > 1:
            raise PatchingError(
                "sites of adapters that name different lists of layers cannot be attributed "
                f"together: {', '.join(sorted(paths))}"
            )
        if len({id(site.api) for site in sweep.sites}) > 1 and (method.qk_fix or method.grad_drop):
            raise PatchingError(
                f"{' and '.join(method.words)} goes by the table of one adapter, and the sites are "
                "of several: ask for them in turn, or for the plain estimate"
            )
        batch, seq_len = mask.shape
        cells = dict(enumerate(sweep.cells))
        several = [cell for cell in cells.values() if len(cell.sites) > 1]
        if several and method.words:
            raise PatchingError(
                f"{' and '.join(method.words)} is defined for one site at a time, and "
                f"{several[0].label} has several: leave it out, or ask for the plain estimate"
            )
        model, places = module_of(sweep.nnmodel), sweep.places
        layers = n_layers(places[0].api, model)
        if method.qk_fix:
            for site in needed_sites(places, model):
                attention_module(site.api, model, site.layer)
        if method.grad_drop:
            adding_sites(places[0].api, model, layers)

        def cut(limits: Limits) -> GraphLimits:
            return graph_limits(
                limits,
                batch,
                seq_len,
                layers - min(site.layer for site in places),
                given=given,
                batch_size=batch_size,
                held=method.grad_drop and method.qk_fix,
            )

        limits, waiting = cut(sweep.limits), 0
        if method.steps is not None and sweep.waiting and limits.prompts < batch:
            sizes = len(places), batch, method.steps
            waiting, left = waiting_paths(sweep.limits, *sizes, [*sweep.waiting])
            limits = cut(left)
        alone = {n: cell for n, cell in cells.items() if are_apart(cell.sites, seq_len)}
        joint = tuple(n for n in cells if n not in alone)
        every = terms_of(cells, seq_len)
        together = every
        if joint or method.qk_fix:
            together = terms_of(alone, seq_len, ("k",) if method.qk_fix else ())
        return cls(sweep, method, limits, every, together, joint, waiting)

    def passes(self, batch: int) -> int:
        """How many backwards there are, about."""
        chunks = -(-batch // self.limits.prompts)
        each = 1 + len(self.joint)
        if self.method.steps is not None:
            each = len(self.every)
        elif self.method.grad_drop:
            each += self.n_layers - self.first_layer
        return chunks * each * len(self.sweep.metrics)

    def open(self, target: Batch, replacement: Replacement, source_logits: Tensor | None) -> Chunk:
        """Make the target run of some prompts, with its graph."""
        sweep, method = self.sweep, self.method
        model, sites = module_of(sweep.nnmodel), sweep.places
        if method.steps is not None:
            entries = record_entries(sweep.nnmodel, target, sites)
            return Chunk(target, replacement, entries.logits, source_logits, None, entries)
        needed = needed_sites(sites, model) if method.qk_fix else []
        called = {site.layer: attention_module(site.api, model, site.layer) for site in needed}
        held = []
        if method.grad_drop:
            adding = adding_sites(sites[0].api, model, self.n_layers)
            held = [site for site in adding if site.layer >= self.first_layer]
        graph = open_graph(sweep.nnmodel, target, [*sites, *needed], held=held, called=called)
        return Chunk(target, replacement, graph.logits.detach(), source_logits, graph, None)

    def weights(self, context: MetricContext) -> dict[str, Tensor]:
        """For each metric its gradient with respect to the logits of the target run.

        Of all prompts at once, so that a metric sees them in their order.

        Raises:
            MetricError: a metric has none.
        """
        flat = self.method.steps is not None
        return cotangents(self.sweep.metrics, context.target_logits, context, flat=flat)

    def groups(self) -> list[Mapping[Where, Terms]]:
        """The places that are estimated together: all, unless the logits of paths have to wait."""
        if not self.places:
            return [self.every]
        items = list(self.every.items())
        starts = range(0, len(items), self.places)
        return [dict(items[first : first + self.places]) for first in starts]

    def path_logits(
        self, chunk: Chunk, context: MetricContext, group: Mapping[Where, Terms]
    ) -> dict[Where, Tensor]:
        """For each place the logits along its path, `[steps, batch, vocab]`, of some prompts."""
        paths = self._paths(chunk, context)
        return {where: paths.logits(terms) for where, terms in group.items()}

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
        chunk: Chunk,
        context: MetricContext,
        weights: Mapping[str, Tensor],
        group: Mapping[Where, Terms],
        along: Mapping[Where, Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """For each metric the estimated change `[cells, batch]`, and where it is known to be none.

        The latter is two masks: where the patch is elided, and where nothing reads it.

        Args:
            chunk: some prompts.
            context: what the metrics compare with, for these.
            weights: the metrics' gradients with respect to their logits.
            group: along paths: the places whose part it is.
            along: for these the gradients that are known already; see `path_weights`.
        """
        sweep, cells = self.sweep, self.sweep.cells
        source = chunk.graph if chunk.graph is not None else chunk.entries
        assert source is not None
        elided, unread = known(
            self.every, len(cells), source.activations, chunk.replacement, sweep.nnmodel
        )
        still = elided | unread
        if self.method.steps is not None:
            found = self._along_paths(chunk, context, group, along)
        else:
            found = self._at_target(chunk, weights)
            for number in self.joint:
                sites = cells[number].sites
                together = joint(sweep.nnmodel, chunk.target, sites, chunk.replacement, weights)
                for name, values in together.items():
                    found[name][number] = values
                self.tick()
        found = {name: torch.where(still, 0.0, values) for name, values in found.items()}
        return found, elided, unread

    def _at_target(self, chunk: Chunk, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sweep, graph = self.sweep, chunk.graph
        assert graph is not None
        estimator = Estimator(
            sweep.nnmodel, chunk.target, sweep.cells, chunk.replacement, graph, self.together
        )
        star = Star(estimator, self.n_layers, self.method.qk_fix, self.limits.rows, self.tick)
        estimated = star.sizes if self.method.grad_drop else star.signed
        if not self.together:
            return {name: estimator.empty() for name in weights}
        return {name: estimated(weight) for name, weight in weights.items()}

    def _paths(self, chunk: Chunk, context: MetricContext) -> Paths:
        entries, steps = chunk.entries, self.method.steps
        assert entries is not None
        assert steps is not None
        return Paths(
            self.sweep.nnmodel,
            chunk.target,
            chunk.replacement,
            entries,
            self.sweep.alone if self.places else self.sweep.metrics,
            context,
            steps,
            self.limits.rows,
        )

    def _along_paths(
        self,
        chunk: Chunk,
        context: MetricContext,
        group: Mapping[Where, Terms],
        along: Mapping[Where, Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        paths = self._paths(chunk, context)
        shape = len(self.sweep.cells), len(chunk.target)
        found = {
            name: torch.zeros(shape, dtype=torch.float64, device="cpu")
            for name in self.sweep.metrics
        }
        for where, terms in group.items():
            for name, effects in paths.effects(terms, along.get(where, {})).items():
                terms.add(found[name], effects)
            self.tick()
        return found
