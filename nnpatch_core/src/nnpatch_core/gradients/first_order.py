"""The first-order estimate: the gradient in the target run, times what would change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.gradients.graph import Graph
from nnpatch_core.gradients.terms import Terms, add_effects, change, effect, own_columns
from nnpatch_core.tracing import BoundSite, Intervention, Patches, forward, read, write


@attrs.frozen(eq=False)
class Estimator:
    """Some prompts, their target run, and the cells to be estimated.

    Args:
        patches: what is patched.
        batch: the target prompts.
        intervention: what is put there.
        graph: the target run.
        terms: the terms of each place and alignment.
    """

    patches: Patches
    batch: Batch
    intervention: Intervention
    graph: Graph
    terms: Sequence[Terms]

    def empty(self) -> Tensor:
        """Zeros, `[cells, batch]`, in float64."""
        shape = len(self.patches.cells), len(self.batch)
        return torch.zeros(shape, dtype=torch.float64, device="cpu")

    def activations(self, places: Iterable[Place]) -> dict[Location, Tensor]:
        """The activations at some places, in the graph."""
        return {place.location: self.graph.activations[place.location] for place in places}

    def add(self, total: Tensor, terms: Terms, gradients: Mapping[Location, Tensor]) -> None:
        """Add the effects at a place to `total` `[cells, batch]`, given the gradients."""
        location = terms.place.location
        activation = self.graph.activations[location]
        add_effects(total, terms, gradients[location], activation, self.intervention)


def joint(
    patches: Patches,
    batch: Batch,
    cell: int,
    intervention: Intervention,
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The first-order estimate of sites that are patched together, `[batch]` for each metric.

    What is put at one of them does not change what is put at another above it, so each is a
    constant in the forward that is differentiated.

    Args:
        patches: what is patched.
        batch: the target prompts.
        cell: the number of the cell.
        intervention: what is put there.
        weights: for each metric its gradient with respect to the logits, `[batch, vocab]`.
    """
    leaves: dict[Location, Tensor] = {}
    patched: dict[Location, Tensor] = {}
    differences: dict[Location, Tensor] = {}
    shape = len(batch), batch.seq_len

    def visit(traced: Any) -> None:
        for site in patches.cells[cell].sites:
            place, location, at = site.place, site.place.location, site.positions
            activation = read(traced, place, shape)
            own = _own(site, activation)
            if location not in leaves:
                leaves[location] = activation.detach().clone().requires_grad_()
                patched[location] = torch.zeros_like(own)
                differences[location] = change(
                    intervention, place, activation, at, cell, site.limit
                )
            moved = change(intervention, place, leaves[location], at, cell, site.limit)
            differences[location] = torch.where(own, moved, differences[location])
            patched[location] = patched[location] | own
            write(traced, place, torch.where(patched[location], leaves[location], activation))

    logits = forward(patches.nnmodel, batch, visit, gradients=True)
    graph = Graph(logits, leaves, {}, {})
    estimates = {}
    for name, cotangent in weights.items():
        gradients = graph.gradients(cotangent, leaves)
        total = torch.zeros(len(batch), dtype=torch.float64, device="cpu")
        for location, gradient in gradients.items():
            difference = torch.where(patched[location], differences[location], 0.0)
            total += effect(gradient, difference, None).sum((1, 2)).to(total)
        estimates[name] = total
    return estimates


def _own(site: BoundSite, activation: Tensor) -> Tensor:
    """`[batch or 1, seq, width]`, bool: the part of an activation that a site is."""
    positions = site.positions.mask(activation.shape[1]).to(activation.device)
    return positions[..., None] & own_columns(site.place, site.head, activation)
