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
from nnpatch_core.tracing import (
    BoundSite,
    Intervention,
    PatchedTokens,
    Patches,
    forward,
    put_site,
    read,
    write,
)


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
    constant in the forward that is differentiated. Of a site in a subspace that is a constant, and
    the rest of the activation is not.

    Args:
        patches: what is patched.
        batch: the target prompts.
        cell: the number of the cell.
        intervention: what is put there.
        weights: for each metric its gradient with respect to the logits, `[batch, vocab]`.
    """
    # By location, and those of a site in a subspace by its number too.
    leaves: dict[tuple[Any, ...], Tensor] = {}
    differences: dict[tuple[Any, ...], Tensor] = {}
    shape = len(batch), batch.seq_len

    def visit(traced: Any) -> None:
        for number, site in enumerate(patches.cells[cell].sites):
            place, at = site.place, site.positions
            key = (*place.location, None if site.limit is None else number)
            activation = read(traced, place, shape)
            if key not in leaves:
                leaves[key] = activation.detach().clone().requires_grad_()
                differences[key] = torch.zeros_like(activation, requires_grad=False)
            own = _own(site, activation)
            moved = change(intervention, place, leaves[key], at, cell, site.limit)
            differences[key] = torch.where(own, moved, differences[key])
            if site.limit is not None:
                # What a site below changes goes on through the rest of the activation.
                activation = activation.clone()
                put_site(activation, site, cell, _Held(leaves[key], intervention.mask))
                own = torch.zeros_like(own)
            write(traced, place, torch.where(own, leaves[key], activation))

    logits = forward(patches.nnmodel, batch, visit, gradients=True)
    graph = Graph(logits, leaves, {}, {})
    estimates = {}
    for name, cotangent in weights.items():
        gradients = graph.gradients(cotangent, leaves)
        total = torch.zeros(len(batch), dtype=torch.float64, device="cpu")
        for key, gradient in gradients.items():
            total += effect(gradient, differences[key], None).sum((1, 2)).to(total)
        estimates[name] = total
    return estimates


@attrs.frozen(eq=False)
class _Held:
    """The activation that was there, as an intervention: `[batch, seq, width]`."""

    value: Tensor
    mask: Tensor
    by_cell: bool = False

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`."""
        device = self.value.device
        return self.value[tokens.prompts.to(device), tokens.positions.to(device)]


def _own(site: BoundSite, activation: Tensor) -> Tensor:
    """`[batch or 1, seq, width]`, bool: the part of an activation that a site is."""
    positions = site.positions.mask(activation.shape[1]).to(activation.device)
    return positions[..., None] & own_columns(site.place, site.head, activation)
