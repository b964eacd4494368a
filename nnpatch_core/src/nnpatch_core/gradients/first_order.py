"""The first-order estimate: the gradient in the target run, times what would change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core.adapters import components
from nnpatch_core.batch import Batch
from nnpatch_core.gradients.graph import Graph
from nnpatch_core.gradients.terms import (
    Terms,
    Where,
    change,
    columns_of,
    effect,
    own_columns,
    row_at,
)
from nnpatch_core.site import AnySite, Location, Site, execution_order
from nnpatch_core.tracing import Replacement, forward


@attrs.frozen(eq=False)
class Estimator:
    """Some prompts, their target run, and the cells to be estimated.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the target prompts.
        cells: what is patched, each alone.
        replacement: what is put there.
        graph: the target run.
        terms: what the cells of one place are made of.
    """

    nnmodel: Any
    batch: Batch
    cells: Sequence[AnySite]
    replacement: Replacement
    graph: Graph
    terms: Mapping[Where, Terms]

    def empty(self) -> Tensor:
        """Zeros, `[cells, batch]`, in float64."""
        return torch.zeros(len(self.cells), len(self.batch), dtype=torch.float64, device="cpu")

    def activations(self, places: Mapping[Where, Terms] | None = None) -> dict[Location, Tensor]:
        """What was at the places' locations, in the graph."""
        chosen = self.terms if places is None else places
        where = [each.site.location(self.nnmodel) for each in chosen.values()]
        return {location: self.graph.activations[location] for location in where}

    def effects(self, terms: Terms, gradients: Mapping[Location, Tensor]) -> Tensor:
        """The effects `[batch, seq, heads + 1]` at a place, given the gradients."""
        location = terms.site.location(self.nnmodel)
        difference = change(self.replacement, location, self.graph.activations[location])
        columns = columns_of(terms.site, module_of(self.nnmodel), difference.shape[-1])
        return effect(gradients[location], difference, columns)


def joint(
    nnmodel: Any,
    batch: Batch,
    sites: Sequence[Site],
    replacement: Replacement,
    weights: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The first-order estimate of sites that are patched together, `[batch]` for each metric.

    What is put at one of them does not change what is put at another above it, so each is a
    constant in the forward that is differentiated.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the target prompts.
        sites: what is patched together.
        replacement: what is put there.
        weights: for each metric its gradient with respect to the logits, `[batch, vocab]`.
    """
    model = module_of(nnmodel)
    leaves: dict[Location, Tensor] = {}
    patched: dict[Location, Tensor] = {}
    shape = (batch.tokens.shape[0], batch.tokens.shape[1])

    def visit(traced: Any) -> None:
        for site in execution_order(sites, nnmodel):
            location, row = site.location(nnmodel), row_at(site, model)
            envoy = follow(traced, location[0])
            found = components.read(envoy, row, shape)
            there = _patched(site, found, model)
            if location in leaves:
                there = there | patched[location]
            else:
                leaves[location] = found.detach().clone().requires_grad_()
            patched[location] = there
            components.write(envoy, row, torch.where(there, leaves[location], found))

    logits = forward(nnmodel, batch, visit, gradients=True)
    graph = Graph(logits, leaves, {}, {})
    found = {}
    for name, cotangent in weights.items():
        gradients = graph.gradients(cotangent, leaves)
        total = torch.zeros(len(batch), dtype=torch.float64, device="cpu")
        for location, gradient in gradients.items():
            difference = change(replacement, location, leaves[location])
            difference = torch.where(patched[location], difference, 0.0)
            total += effect(gradient, difference, None).sum((1, 2)).to(total)
        found[name] = total
    return found


def _patched(site: Site, found: Tensor, model: Any) -> Tensor:
    """`[1, seq, width]`, bool: what a site is of an activation."""
    there = torch.zeros(found.shape[1], dtype=torch.bool, device=found.device)
    there[list(site.group(found.shape[1]))] = True
    return there[None, :, None] & own_columns(site, model, found)
