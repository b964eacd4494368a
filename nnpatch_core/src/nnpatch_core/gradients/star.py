"""AtP*: the QK fix and GradDrop, alone or together.

Kramár, Lieberum, Shah & Nanda, "AtP*: An efficient and scalable method for localizing LLM behaviour
to components" (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Component, ModelAPI, table_of
from nnpatch_core.errors import GradientError
from nnpatch_core.gradients.attention import Attention, attention_sites
from nnpatch_core.gradients.first_order import Estimator
from nnpatch_core.gradients.terms import Terms, Where, row_at
from nnpatch_core.site import Location, Site

#: What the QK fix is for.
FIXED = ("q", "k")
_ADDING = ("attn", "mlp")


def adding_sites(api: ModelAPI, model: Any, n_layers: int) -> list[Site]:
    """Where each layer adds to the residual stream, which GradDrop holds.

    Raises:
        GradientError: by its adapter the model's layers do something else than add.
    """
    found: list[Site] = []
    for layer in range(n_layers):
        names = [name for name in _ADDING if name in table_of(api, model, layer)]
        if getattr(api, "residual", "sum") is None or not names:
            raise GradientError(
                f"GradDrop holds what a layer adds to the residual stream, and by adapter "
                f"{api.name!r} layer {layer} does not give a sum of resid_pre, attn and mlp"
            )
        found.extend(Site(api, name, layer) for name in names)
    return found


@attrs.frozen(eq=False)
class Star:
    """The repaired estimates of one chunk of prompts.

    Args:
        estimator: the chunk.
        n_layers: the model's layers.
        qk_fix: whether queries and keys go through the real softmax.
        rows: how many rows of an attention may run together.
        tick: called after each backward.
    """

    estimator: Estimator
    n_layers: int
    qk_fix: bool
    rows: int
    tick: Callable[[], None]

    def signed(self, cotangent: Tensor) -> Tensor:
        """The first-order estimate, with the QK fix: `[cells, batch]`."""
        gradients = self._plain(cotangent)
        total = self.estimator.empty()
        for terms in self._simple().values():
            terms.add(total, self.estimator.effects(terms, gradients))
        for layer in self._fixed_layers():
            self._add_fixed(total[None], layer, gradients[self._o(layer)][None])
        return total

    def sizes(self, cotangent: Tensor) -> Tensor:
        """The mean size of the estimate over the layers that are held: `[cells, batch]`.

        In turn each layer adds what it added in the target run, whatever comes in, so that a direct
        effect and one through that layer can no longer cancel. A cell inside the held layer has no
        effect, and does not count it: the mean is over the others.
        """
        estimator = self.estimator
        plain = self._plain(cotangent)
        first = min(each.site.layer for each in estimator.terms.values())
        unheld = estimator.empty()
        total = estimator.empty()
        simple = self._simple()
        for terms in simple.values():
            terms.add(unheld, estimator.effects(terms, plain))
        at_heads = {layer: [plain[self._o(layer)]] for layer in self._fixed_layers()}
        for held in range(first, self.n_layers):
            below = {
                place: terms for place, terms in simple.items() if self._below(terms.site, held)
            }
            wanted = estimator.activations(below)
            heads = {layer: self._o(layer) for layer in at_heads if layer < held}
            wanted |= {at: estimator.graph.activations[at] for at in heads.values()}
            found = estimator.graph.gradients_held(held, plain[_end(self._path, held)], wanted)
            this = estimator.empty()
            for terms in below.values():
                terms.add(this, estimator.effects(terms, found))
            total += this.abs()
            for layer, location in heads.items():
                at_heads[layer].append(found[location])
            self.tick()
        # Holding a layer below a cell changes nothing for it: there it is the plain estimate.
        times = self._times(simple, lambda site: self._above(site))
        total += unheld.abs() * times[:, None]
        for layer, gradients in at_heads.items():
            each = torch.zeros(len(gradients), *total.shape, dtype=total.dtype, device="cpu")
            self._add_fixed(each, layer, torch.stack(gradients))
            total += layer * each[0].abs() + each[1:].abs().sum(0)
        counts = self._times(estimator.terms, self._outside)
        # Of a single layer there is nothing to hold.
        if self.n_layers == 1:
            single = self.signed(cotangent).abs()
            return torch.where((counts == 0)[:, None], single, total / counts.clamp(min=1)[:, None])
        return total / counts[:, None]

    @property
    def _path(self) -> str:
        return next(iter(self.estimator.terms.values())).site.api.layers

    def _plain(self, cotangent: Tensor) -> dict[Location, Tensor]:
        """The gradients at all sites, at the heads of fixed layers, and at the ends of layers."""
        estimator = self.estimator
        wanted = estimator.activations(self._simple())
        ends = [_end(self._path, layer) for layer in estimator.graph.outputs]
        for location in (*ends, *map(self._o, self._fixed_layers())):
            wanted[location] = estimator.graph.activations[location]
        found = estimator.graph.gradients(cotangent, wanted)
        self.tick()
        return found

    def _simple(self) -> dict[Where, Terms]:
        """The places without those of the QK fix."""
        return {
            place: terms
            for place, terms in self.estimator.terms.items()
            if not (self.qk_fix and terms.site.component in FIXED)
        }

    def _fixed_layers(self) -> list[int]:
        layers = {
            each.site.layer
            for each in self.estimator.terms.values()
            if self.qk_fix and each.site.component in FIXED
        }
        return sorted(layers)

    def _o(self, layer: int) -> Location:
        api = next(iter(self.estimator.terms.values())).site.api
        return Site(api, "o", layer).location(self.estimator.nnmodel)

    def _add_fixed(self, total: Tensor, layer: int, gradients: Tensor) -> None:
        """Add the effects of a layer's queries and keys to `total` `[many, cells, batch]`."""
        estimator = self.estimator
        here = {
            terms.site.component: terms
            for terms in estimator.terms.values()
            if terms.site.layer == layer and terms.site.component in FIXED
        }
        groups = here["k"].groups if "k" in here else ()
        api = next(iter(here.values())).site.api
        attention = Attention(
            estimator.nnmodel, estimator.graph, api, layer, estimator.replacement, self.rows
        )
        kind = torch.promote_types(gradients.dtype, torch.float32)
        queries, keys = attention.effects(gradients.to(kind), "q" in here, groups)
        for name, effects in (("q", queries), ("k", keys)):
            if effects is not None:
                here[name].add(total, effects)

    def _times(self, places: Mapping[Where, Terms], count: Callable[[Site], int]) -> Tensor:
        """A number for each cell, by its place."""
        times = torch.zeros(len(self.estimator.cells), dtype=torch.float64, device="cpu")
        for terms in places.values():
            times[terms.cells] = count(terms.site)
        return times

    def _row(self, site: Site) -> Component:
        return row_at(site, module_of(self.estimator.nnmodel))

    def _inside(self, site: Site) -> bool:
        return bool(self._row(site).module)

    def _below(self, site: Site, held: int) -> bool:
        """Whether what a site changes passes the held layer."""
        row = self._row(site)
        before = not row.module and row.side == "input"
        return site.layer < held or (site.layer == held and before)

    def _above(self, site: Site) -> int:
        """How many layers can be held without a change: those below, and its own if it ends it."""
        row = self._row(site)
        return site.layer + (not row.module and row.side == "output")

    def _outside(self, site: Site) -> int:
        """How many layers a site is not inside of."""
        return self.n_layers - self._inside(site)


def _end(path: str, layer: int) -> Location:
    return (f"{path}.{layer}.", "output", 0)


def needed_sites(sites: list[Site], model: Any) -> list[Site]:
    """The sites of the attentions that the QK fix runs again."""
    layers = {site.layer: site.api for site in sites if site.component in FIXED}
    return [site for layer, api in layers.items() for site in attention_sites(api, model, layer)]
