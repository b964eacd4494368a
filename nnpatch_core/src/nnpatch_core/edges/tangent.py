"""The gradient of a metric at what each receiver reads, through that receiver alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Location, Place
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.recording import Graph, Moved, graphed

_ATTENTION = ("q", "k", "v")
#: Types in which a difference of two gradients keeps enough digits.
_FINE = (torch.float32, torch.float64)


@attrs.frozen(eq=False)
class Tangent:
    """A run with its graph.

    Args:
        layers: the layers of the model.
        graph: the graph of the run.
    """

    layers: Layers
    graph: Graph

    def gradients(
        self, cotangent: Tensor, start: int, lowest: int = 0
    ) -> Iterator[tuple[int, list[int], Tensor]]:
        """The gradients at what receivers read, step by step, from the logits down.

        Args:
            cotangent: the gradient with respect to the logits.
            start: the first position that is wanted.
            lowest: the lowest step that is wanted.

        Yields:
            The step, the numbers of its receivers, and `[receivers, batch, seq - start, width]`.

        Raises:
            GradientError: the logits do not depend on one of them.
        """
        nodes = self.layers.nodes
        by_step: dict[int, list[int]] = {}
        for number, step in enumerate(nodes.read.tolist()):
            if step >= lowest:
                by_step.setdefault(step, []).append(number)
        known = self._from_logits(cotangent, lowest // 2)
        for step in sorted(by_step, reverse=True):
            layer, numbers = step // 2, by_step[step]
            if layer == nodes.n_layers:
                yield step, numbers, known[None][None, :, start:]
                continue
            # In parallel blocks attention and MLP read the same stream.
            heads = [each for each in numbers if nodes.receivers[each].kind != "mlp"]
            found = []
            if heads:
                found.append(self._of_heads(layer, heads, known))
            if len(heads) < len(numbers):
                found.append(self._of_mlp(layer, known)[None])
            yield step, numbers, torch.cat(found)[:, :, start:]

    def _from_logits(self, cotangent: Tensor, lowest: int) -> dict[Location | None, Tensor]:
        """At what each receiver writes, and at each stream; under None at the final one."""
        wanted: dict[Location | None, Tensor] = {None: self.graph.streams[-1]}
        for layer, own in enumerate(self.layers.places):
            if layer < lowest:
                continue
            for name in (*_ATTENTION, "attn", "mlp"):
                wanted[own[name].location] = self.graph.parts[own[name].location]
            if layer:
                wanted[self.layers.end(layer - 1)] = self.graph.streams[layer]
        gradients = torch.autograd.grad(
            self.graph.logits, [*wanted.values()], cotangent, retain_graph=True, allow_unused=True
        )
        known = {}
        for (location, value), gradient in zip(wanted.items(), gradients, strict=True):
            # In the last layer nobody reads the queries of tokens other than the last.
            known[location] = torch.zeros_like(value) if gradient is None else gradient
        return known

    def _of_heads(
        self, layer: int, numbers: Sequence[int], known: Mapping[Location | None, Tensor]
    ) -> Tensor:
        own, nodes = self.layers.places[layer], self.layers.nodes
        found: dict[int, Tensor] = {}
        by_place: dict[str, list[int]] = {}
        for number in numbers:
            by_place.setdefault(nodes.receivers[number].kind, []).append(number)
        for kind, some in by_place.items():
            place = own[kind]
            gradient = known[place.location]
            columns = place.columns(gradient.shape[-1])
            assert columns is not None
            heads = [nodes.receivers[number].head or 0 for number in some]
            found.update(zip(some, self._back(layer, place, gradient, columns[heads]), strict=True))
        return torch.stack([found[number] for number in numbers])

    def _back(self, layer: int, place: Place, gradient: Tensor, columns: Tensor) -> Tensor:
        """Gradients at the columns of some heads, taken back to the stream before the layer.

        Returns:
            `[heads, batch, seq, width]`.
        """
        stream, given = self.graph.streams[layer], self.graph.projected.get(place.location)
        index = columns.to(gradient.device)
        if given is None:
            alone = gradient.new_zeros(len(index), *gradient.shape)
            for number, own in enumerate(index):
                alone[number][..., own] = gradient[..., own]
            return _backwards(self.graph.parts[place.location], stream, alone)
        weight = module_of(self.layers.nnmodel).get_submodule(place.path).weight
        assert isinstance(weight, Tensor)
        # Each head's rows of the matrix alone.
        back = torch.stack([gradient[..., own] @ weight[own] for own in index])
        return _backwards(given, stream, back.to(given.dtype))

    def _of_mlp(self, layer: int, known: Mapping[Location | None, Tensor]) -> Tensor:
        own, last = self.layers.places[layer], self.layers.nodes.n_layers - 1
        mlp, attn = own["mlp"].location, own["attn"].location
        if self.layers.nodes.parallel[layer]:
            return _backwards(self.graph.parts[mlp], self.graph.streams[layer], known[mlp][None])[0]
        factor = self.layers.attn[layer]
        if known[mlp].dtype in _FINE:
            # All that attention adds goes on in the stream, and through the MLP.
            behind = known[None] if layer == last else known[self.layers.end(layer)]
            return known[attn] / factor - behind
        # The MLP sees attention in the stream alone, to which it is added.
        back = _backwards(self.graph.parts[mlp], self.graph.parts[attn], known[mlp][None])[0]
        return back / factor


def open_tangent(layers: Layers, moved: Moved) -> Tangent:
    """Run the target prompts with something in place of their own, and keep the graph.

    Raises:
        GradientError: the logits have no gradient.
    """
    *_, graph = graphed(layers.nnmodel, layers.api, layers.target.batch, moved)
    return Tangent(layers, graph)


def _backwards(of: Tensor, at: Tensor, cotangents: Tensor) -> Tensor:
    """The gradients at `at` of `of` weighted by each of `cotangents` `[many, *of.shape]`."""
    if of is at:
        return cotangents
    if not of.requires_grad:
        return cotangents.new_zeros(len(cotangents), *at.shape)
    if len(cotangents) > 1:
        try:
            (found,) = torch.autograd.grad(
                of, at, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            # Some backwards have no version for several at once.
            pass
        else:
            return _or_zero(found, at, len(cotangents))
    each = [
        torch.autograd.grad(of, at, one, retain_graph=True, allow_unused=True)[0]
        for one in cotangents
    ]
    return torch.stack([_or_zero(one, at, None) for one in each])


def _or_zero(found: Tensor | None, at: Tensor, many: int | None) -> Tensor:
    if found is not None:
        return found
    return at.new_zeros(at.shape if many is None else (many, *at.shape))
