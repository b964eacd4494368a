"""Integrated gradients along the path from the target's activation to what is put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._rounding import as_typed, rounding
from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.errors import GradientError
from nnpatch_core.gradients.cotangents import cotangents
from nnpatch_core.gradients.graph import Graph
from nnpatch_core.gradients.terms import Terms, change, effect, own_columns
from nnpatch_core.metrics import Metric, MetricContext
from nnpatch_core.tracing import (
    LAYER_INPUT,
    Intervention,
    forward,
    forward_hooks,
    in_words,
    read,
    read_component,
    skip,
    write,
    write_component,
)


@attrs.frozen(eq=False)
class Entries:
    """A target run, kept so that it can begin again before any layer with a site.

    Args:
        logits: `[batch, vocab]`, or `[batch, places, vocab]`.
        activations: what was at the sites.
        inputs: the residual stream before each layer, `[batch, seq, width]`.
        rests: what a layer gives besides the residual stream; None if it gives no tuple.
    """

    logits: Tensor
    activations: Mapping[Location, Tensor]
    inputs: Mapping[int, Tensor]
    rests: Mapping[int, tuple[Any, ...] | None]


def record_entries(nnmodel: Any, batch: Batch, places: Sequence[Place]) -> Entries:
    """Run `batch`, and keep what came into the layers that have places, and what is at these.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        places: where, in the order in which a forward reaches them.
    """
    activations: dict[Location, Tensor] = {}
    inputs: dict[int, Tensor] = {}
    rests: dict[int, tuple[Any, ...] | None] = {}
    shape = len(batch), batch.seq_len

    def visit(traced: Any) -> None:
        for layer in range(places[-1].layer + 1):
            envoy = follow(traced, f"{places[0].api.layers}.{layer}")
            here = [place for place in places if place.layer == layer]
            if here:
                inputs[layer] = read_component(envoy, LAYER_INPUT).clone()
            for place in here:
                if place.location not in activations:
                    activations[place.location] = read(traced, place, shape).clone()
            output = envoy.output
            rests[layer] = tuple(output[1:]) if isinstance(output, tuple | list) else None

    logits = forward(nnmodel, batch, visit)
    return Entries(logits, activations, inputs, rests)


@attrs.frozen(eq=False)
class Paths:
    """Some prompts, and the paths that their activations are led along.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the target prompts.
        intervention: what is put at the end of each path.
        entries: what the target run had before each layer.
        metrics: what is differentiated on these prompts alone.
        context: what the metrics compare with.
        steps: points on each path.
        rows: how many rows may run together from the first layer on.
    """

    nnmodel: Any
    batch: Batch
    intervention: Intervention
    entries: Entries
    metrics: Mapping[str, Metric]
    context: MetricContext
    steps: int
    rows: int

    def effects(self, terms: Terms, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each metric the effects at a place, `[batch, seq, heads + 1]`.

        The whole activation of the place's component is led along the path, all positions and heads
        together, so that the effects of a complete cut add up to the metric's difference. The
        points and weights are those of Gauss and Legendre.

        Args:
            terms: the place.
            given: for further metrics the gradient at each point with respect to the logits there,
                `[steps, batch, vocab]`.
        """
        _, weights = np.polynomial.legendre.leggauss(self.steps)
        means: dict[str, Tensor] = {}
        hooks = forward_hooks(module_of(self.nnmodel))
        if hooks:
            self._check(terms, hooks)
        for some, share in self._shares():
            own = {name: each[some] for name, each in given.items()}
            there, gradients = self._gradients(terms, share, own)
            weight = torch.from_numpy(weights[some] / 2)
            for name, each in gradients.items():
                with as_typed(each):
                    mean = torch.einsum("s,sbpw->bpw", weight.to(each), each)
                means[name] = means[name] + mean if name in means else mean
        difference = change(
            self.intervention, terms.place, there, terms.alignment, limit=terms.limit
        )
        columns = terms.place.columns(difference.shape[-1])
        return {name: effect(mean, difference, columns) for name, mean in means.items()}

    def _check(self, terms: Terms, hooks: list[str]) -> None:
        """Raise `GradientError` unless each row of a path's beginning is the target run itself."""
        steps = min(self._at_once(), self.steps)
        unmoved = torch.zeros(steps, dtype=torch.float64, device="cpu")
        logits = self._run(terms, unmoved, gradients=False)[2]
        expected = self.entries.logits.repeat(steps, *[1] * (self.entries.logits.ndim - 1))
        if self.batch.read is not None:
            padding = self.batch.read_padding[..., None]
            expected, logits = (
                each.masked_fill(padding.repeat(steps, 1, 1), 0.0) for each in (expected, logits)
            )
        allowed = rounding(self.entries.inputs[terms.place.layer]) * float(expected.abs().max())
        gap = float((logits - expected).abs().max())
        if not gap <= allowed:
            raise GradientError(
                f"integrated gradients run {steps} points of each prompt together, from layer "
                f"{terms.place.layer} on, and the model has {in_words(hooks)}, with which such "
                f"rows give other logits than the prompts alone: off by {gap:.3g}, where rounding "
                f"explains {allowed:.3g}; remove it, or leave out steps="
            )

    def logits(self, terms: Terms) -> Tensor:
        """The logits at each point of a place's path, `[steps, batch, ...]`, without a graph."""
        parts = [self._run(terms, share, gradients=False)[2] for _, share in self._shares()]
        logits = torch.cat(parts)
        return logits.view(self.steps, len(self.batch), *logits.shape[1:])

    def _shares(self) -> Iterator[tuple[slice, Tensor]]:
        """Points that run together, by number, and how far along the path they are."""
        points, _ = np.polynomial.legendre.leggauss(self.steps)
        at_once = self._at_once()
        for first in range(0, self.steps, at_once):
            some = slice(first, first + at_once)
            # From [-1, 1] to [0, 1].
            yield some, torch.from_numpy((points[some] + 1) / 2)

    def _at_once(self) -> int:
        """How many points run together."""
        return max(self.rows // len(self.batch), 1)

    def _gradients(
        self, terms: Terms, share: Tensor, given: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The activation at the place, `[batch, seq, width]`, and gradients along its path.

        These are `[steps, batch, seq, width]` for each metric, in float32 at least.
        """
        count, location = len(self.batch), terms.place.location
        there, leaf, logits = self._run(terms, share, gradients=True)
        graph = Graph(logits, {location: leaf}, {}, {})
        weighted: dict[str, list[Tensor]] = {name: [*each] for name, each in given.items()}
        for step in torch.split(logits.detach(), count):
            for name, each in cotangents(self.metrics, step, self.context, flat=True).items():
                weighted.setdefault(name, []).append(each)
        gradients = {}
        for name, parts in weighted.items():
            gradient = graph.gradients(torch.cat(parts), {location: leaf})[location]
            kind = torch.promote_types(gradient.dtype, torch.float32)
            gradients[name] = gradient.to(kind).view(len(share), count, *gradient.shape[1:])
        return there, gradients

    def _run(
        self, terms: Terms, share: Tensor, *, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The model at some points of a place's path.

        What was at the place, `[batch, seq, width]`; what it is at each point, and the logits
        there, `[points * batch, ...]`.
        """
        place, count = terms.place, len(self.batch)
        which = torch.arange(count, device="cpu").repeat(len(share))
        shape = len(which), self.batch.seq_len
        leaves: list[Tensor] = []
        before: list[Tensor] = []

        def visit(traced: Any) -> None:
            for layer in range(place.layer):
                envoy = follow(traced, f"{place.api.layers}.{layer}")
                rest = self.entries.rests[layer]
                skip(envoy, envoy.input if rest is None else (envoy.input, *rest))
            envoy = follow(traced, f"{place.api.layers}.{place.layer}")
            start = self.entries.inputs[place.layer]
            write_component(envoy, LAYER_INPUT, start[which.to(start.device)])
            there = read(traced, place, shape)
            kind = torch.promote_types(there.dtype, torch.float32)
            moved = change(
                self.intervention, place, there[:count], terms.alignment, limit=terms.limit
            )
            # All heads of the component, and of no other that shares its activation.
            moved = torch.where(own_columns(place, None, there), moved, 0.0)
            along = share.to(there.device, kind)[:, None, None, None] * moved
            leaf = (there.detach().to(kind) + along.flatten(0, 1)).to(there.dtype)
            leaf = leaf.requires_grad_(gradients)
            before.append(there[:count].detach())
            leaves.append(leaf)
            write(traced, place, leaf.clone())

        logits = forward(self.nnmodel, self.batch.rows(which), visit, gradients=gradients)
        return before[0], leaves[0], logits
