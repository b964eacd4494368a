"""AtP*: the QK fix and GradDrop, alone or together.

Kramár, Lieberum, Shah & Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour
to components" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

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

    def signed(self, cotangent: Tensor, simple: bool, layers: Sequence[int]) -> Tensor:
        """The first-order estimate, with the QK fix: `[cells, batch]`.

        Args:
            cotangent: the gradient with respect to the logits.
            simple: whether the cells are wanted that the QK fix is not for; 0 stands at others.
            layers: in which layers queries and keys are wanted.
        """
        gradients = self._plain(cotangent)
        total = self.estimator.empty()
        if simple:
            self._add_simple(total, gradients)
        for layer in layers:
            self._add_fixed(total[None], layer, gradients[self.fixed[layer].o.location][None])
        return total

    def held(
        self, cotangent: Tensor, unheld: bool, held: Sequence[int], layers: Sequence[int]
    ) -> Tensor:
        """All that `mean_size` is made of, `[1 + layers, cells, batch]`.

        In turn each layer adds what it added in the target run, whatever comes in, so that a direct
        effect and one through that layer can no longer cancel. First comes the estimate in which
        none is held, and then that of each layer from the lowest one with a cell on. Of queries and
        keys that the QK fix is for there is the sum of all sizes alone, in the first place.

        Args:
            cotangent: the gradient with respect to the logits.
            unheld: whether the first one is wanted; 0 stands at what is not.
            held: the layers that are held of those that are wanted.
            layers: in which layers queries and keys are wanted.
        """
        estimator, n_layers = self.estimator, self._n_layers
        first = lowest(estimator.terms)
        plain = self._plain(cotangent)
        blocks = torch.stack([estimator.empty()] * (1 + n_layers - first))
        if unheld:
            self._add_simple(blocks[0], plain)
        at_heads = {layer: [plain[self.fixed[layer].o.location]] for layer in layers}
        for layer in range(first, n_layers):
            above = [each for each in layers if each < layer]
            if layer not in held and not above:
                continue
            below = [terms for terms in self._simple() if _below(terms.place, layer)]
            heads = [each.o for number, each in self.fixed.items() if number < layer]
            # All of them, whatever is wanted, so that the backward is the same.
            wanted = estimator.activations([*(terms.place for terms in below), *heads])
            cotangents = plain[_end(self._path, layer)]
            gradients = estimator.graph.gradients_held(layer, cotangents, wanted)
            if layer in held:
                for terms in below:
                    estimator.add(blocks[1 + layer - first], terms, gradients)
            for number in above:
                at_heads[number].append(gradients[self.fixed[number].o.location])
            self.tick()
        for layer, gradients_held in at_heads.items():
            each = torch.stack([estimator.empty()] * len(gradients_held))
            self._add_fixed(each, layer, torch.stack(gradients_held))
            # Of a single layer there is nothing to hold, and the plain estimate counts.
            times = layer if n_layers > 1 else 1
            blocks[0] += times * each[0].abs() + each[1:].abs().sum(0)
        return blocks

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

    def _add_simple(self, total: Tensor, gradients: Mapping[Location, Tensor]) -> None:
        """Add the effects of all places but those of the QK fix to `total` `[cells, batch]`."""
        for terms in self._simple():
            self.estimator.add(total, terms, gradients)


def mean_size(blocks: Tensor, every: Sequence[Terms], fixed: Collection[int]) -> Tensor:
    """The mean size of the estimate over the layers that are held: `[cells, batch]`.

    A cell inside the held layer has no effect, and does not count it: the mean is over the others.

    Args:
        blocks: as `AtPStar.held` gives them, `[1 + layers, cells, batch]`.
        every: the terms of all cells.
        fixed: the layers whose queries and keys the QK fix is for.
    """
    unheld, n_layers = blocks[0].abs(), every[0].place.n_layers
    total = torch.zeros_like(unheld)
    for block in blocks[1:]:
        total += block.abs()

    def times(terms: Terms) -> int:
        # Holding a layer below a cell changes nothing for it: there it is the plain estimate.
        return (
            1 if terms.place.layer in fixed and terms.place.name in FIXED else _above(terms.place)
        )

    cells = blocks.shape[1]
    total += unheld * _by_cell(every, cells, times)[:, None]
    # A place inside a layer does not count that layer.
    counts = _by_cell(every, cells, lambda terms: n_layers - bool(terms.place.component.module))
    # Of a single layer there is nothing to hold.
    if n_layers == 1:
        return torch.where((counts == 0)[:, None], unheld, total / counts.clamp(min=1)[:, None])
    return total / counts[:, None]


def lowest(every: Iterable[Terms]) -> int:
    """The lowest layer that has a cell."""
    return min(terms.place.layer for terms in every)


def _by_cell(every: Iterable[Terms], cells: int, count: Callable[[Terms], int]) -> Tensor:
    """A number for each cell, by its terms: `[cells]`."""
    numbers = torch.zeros(cells, dtype=torch.float64, device="cpu")
    for terms in every:
        numbers[terms.cells] = count(terms)
    return numbers


def _below(place: Place, held: int) -> bool:
    """Whether what is changed at a place passes the held layer."""
    return place.layer < held or (place.layer == held and place.stage % STAGES == INPUT)


def _above(place: Place) -> int:
    """How many layers can be held without a change: those below, and its own if it ends it."""
    return place.layer + (place.stage % STAGES == OUTPUT)


def _end(path: str, layer: int) -> Location:
    return (f"{path}.{layer}.", "output", 0)
