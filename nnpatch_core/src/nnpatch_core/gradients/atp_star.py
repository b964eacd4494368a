"""AtP*: the QK fix and GradDrop, alone or together.

Kramár, Lieberum, Shah & Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour
to components" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor

from nnpatch_core.adapters import INPUT, OUTPUT, STAGES, Location, Place, place_of, table_of
from nnpatch_core.errors import GradientError
from nnpatch_core.gradients.attention import Attention, AttentionPlaces, attention_places
from nnpatch_core.gradients.first_order import Estimator
from nnpatch_core.gradients.terms import Terms
from nnpatch_core.seq_pos import Positions
from nnpatch_core.spaces import Limit
from nnpatch_core.tracing import Patches

#: The components that the QK fix is for.
FIXED = ("q", "k")
_ADDING = ("attn", "mlp")


def adding_places(patches: Patches) -> list[Place]:
    """Where each layer adds to the residual stream, which GradDrop holds.

    Raises:
        GradientError: by its adapter the model's layers do something else than add.
    """
    api, model = patches.places[0].api, patches.model
    places: list[Place] = []
    for layer in range(patches.n_layers):
        names = [name for name in _ADDING if name in table_of(api, model, layer)]
        if getattr(api, "residual", "sum") is None or not names:
            raise GradientError(
                f"GradDrop holds what a layer adds to the residual stream, and by adapter "
                f"{api.name!r} layer {layer} does not give a sum of resid_pre, attn and mlp"
            )
        places.extend(place_of(api, model, layer, name) for name in names)
    return places


def fixed_attentions(patches: Patches) -> dict[int, AttentionPlaces]:
    """By layer the attentions that the QK fix runs again.

    Raises:
        GradientError: the adapter does not tell enough of one.
    """
    layers = {place.layer: place.api for place in patches.places if place.name in FIXED}
    return {layer: attention_places(api, patches.model, layer) for layer, api in layers.items()}


@attrs.frozen(eq=False)
class AtPStar:
    """The repaired estimates of one chunk of prompts.

    Args:
        estimator: the chunk.
        fixed: by layer the attentions whose queries and keys go through the real softmax; none
            without the QK fix.
        rows: how many rows of an attention may run together.
        tick: called after each backward.
    """

    estimator: Estimator
    fixed: Mapping[int, AttentionPlaces]
    rows: int
    tick: Callable[[], None]

    def signed(self, cotangent: Tensor) -> Tensor:
        """The first-order estimate, with the QK fix: `[cells, batch]`."""
        gradients = self._plain(cotangent)
        total = self.estimator.empty()
        for terms in self._simple():
            self.estimator.add(total, terms, gradients)
        for layer, attention in self.fixed.items():
            self._add_fixed(total[None], layer, gradients[attention.o.location][None])
        return total

    def sizes(self, cotangent: Tensor) -> Tensor:
        """The mean size of the estimate over the layers that are held: `[cells, batch]`.

        In turn each layer adds what it added in the target run, whatever comes in, so that a direct
        effect and one through that layer can no longer cancel. A cell inside the held layer has no
        effect, and does not count it: the mean is over the others.
        """
        estimator = self.estimator
        plain = self._plain(cotangent)
        first = min(terms.place.layer for terms in estimator.terms)
        unheld = estimator.empty()
        total = estimator.empty()
        simple = self._simple()
        for terms in simple:
            estimator.add(unheld, terms, plain)
        at_heads = {layer: [plain[each.o.location]] for layer, each in self.fixed.items()}
        for held in range(first, self._n_layers):
            below = [terms for terms in simple if _below(terms.place, held)]
            heads = [each.o for layer, each in self.fixed.items() if layer < held]
            wanted = estimator.activations([*(terms.place for terms in below), *heads])
            cotangents = plain[_end(self._path, held)]
            gradients = estimator.graph.gradients_held(held, cotangents, wanted)
            this = estimator.empty()
            for terms in below:
                estimator.add(this, terms, gradients)
            total += this.abs()
            for place in heads:
                at_heads[place.layer].append(gradients[place.location])
            self.tick()
        # Holding a layer below a cell changes nothing for it: there it is the plain estimate.
        times = self._times(simple, _above)
        total += unheld.abs() * times[:, None]
        for layer, held_gradients in at_heads.items():
            each = torch.zeros(len(held_gradients), *total.shape, dtype=total.dtype, device="cpu")
            self._add_fixed(each, layer, torch.stack(held_gradients))
            total += layer * each[0].abs() + each[1:].abs().sum(0)
        # A place inside a layer does not count that layer.
        counts = self._times(
            estimator.terms, lambda place: self._n_layers - bool(place.component.module)
        )
        # Of a single layer there is nothing to hold.
        if self._n_layers == 1:
            single = self.signed(cotangent).abs()
            return torch.where((counts == 0)[:, None], single, total / counts.clamp(min=1)[:, None])
        return total / counts[:, None]

    @property
    def _path(self) -> str:
        return self.estimator.patches.layers

    @property
    def _n_layers(self) -> int:
        return self.estimator.patches.n_layers

    def _plain(self, cotangent: Tensor) -> dict[Location, Tensor]:
        """The gradients at all places, at the heads of fixed layers, and at the ends of layers."""
        graph = self.estimator.graph
        heads = [attention.o for attention in self.fixed.values()]
        wanted = self.estimator.activations([*(terms.place for terms in self._simple()), *heads])
        for layer in graph.outputs:
            end = _end(self._path, layer)
            wanted[end] = graph.activations[end]
        gradients = graph.gradients(cotangent, wanted)
        self.tick()
        return gradients

    def _simple(self) -> list[Terms]:
        """The places without those of the QK fix."""
        terms = self.estimator.terms
        return [each for each in terms if not (self.fixed and each.place.name in FIXED)]

    def _add_fixed(self, total: Tensor, layer: int, gradients: Tensor) -> None:
        """Add the effects of a layer's queries and keys to `total` `[many, cells, batch]`."""
        estimator = self.estimator
        by_values: dict[tuple[Positions | None, Limit | None], dict[str, Terms]] = {}
        for terms in estimator.terms:
            if terms.place.layer == layer and terms.place.name in FIXED:
                at = terms.alignment, terms.limit
                by_values.setdefault(at, {})[terms.place.name] = terms
        kind = torch.promote_types(gradients.dtype, torch.float32)
        for (alignment, limit), here in by_values.items():
            groups = here["k"].groups if "k" in here else ()
            attention = Attention(
                estimator.patches.nnmodel,
                estimator.graph,
                self.fixed[layer],
                estimator.intervention,
                alignment,
                limit,
                self.rows,
            )
            queries, keys = attention.effects(gradients.to(kind), "q" in here, groups)
            for name, effects in (("q", queries), ("k", keys)):
                if effects is not None:
                    here[name].add(total, effects)

    def _times(self, every: Iterable[Terms], count: Callable[[Place], int]) -> Tensor:
        """A number for each cell, by its place."""
        times = torch.zeros(len(self.estimator.patches.cells), dtype=torch.float64, device="cpu")
        for terms in every:
            times[terms.cells] = count(terms.place)
        return times


def _below(place: Place, held: int) -> bool:
    """Whether what is changed at a place passes the held layer."""
    return place.layer < held or (place.layer == held and place.stage % STAGES == INPUT)


def _above(place: Place) -> int:
    """How many layers can be held without a change: those below, and its own if it ends it."""
    return place.layer + (place.stage % STAGES == OUTPUT)


def _end(path: str, layer: int) -> Location:
    return (f"{path}.{layer}.", "output", 0)
