"""What attribution patching must give, by hooks and autograd: shares no code with nnpatch.

As in oracle.py each prompt runs alone and unpadded, on a copy of a plain Hugging Face model, and a
position is counted from the end of a prompt. The copy is in float64 from end to end, so that finite
differences show the derivatives to many digits.

An estimate says how a metric of the target run would move if what a donor gives were put in a
place. A metric takes `[vocab]`, the logits at the last token, in float64, and gives a scalar; a
function that is passed more than once is not run more than once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.helpers.oracle import Donor, Oracle, Part, Place, Prompt

Metric = Callable[[Tensor], Tensor]
#: A prompt to take activations from, or anything else that gives them.
Source = Prompt | Donor

#: They lie between layers; every other component is inside of one.
BETWEEN = ("resid_pre", "resid")
#: What a layer adds to the residual stream.
ADDED = ("attn", "mlp")


class Wide(TorchFunctionMode):
    """float64 where code asks for float32: norms, rotations and attention do, in any model.

    A derivative would be as wrong as they round, and a difference of two runs far more so. Under
    this a model in float64 computes in it throughout, whoever runs it.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        def widened(argument: Any) -> Any:
            return torch.float64 if argument is torch.float32 else argument

        if function is Tensor.float:
            function = Tensor.double
        named = {name: widened(argument) for name, argument in (kwargs or {}).items()}
        return function(*map(widened, args), **named)


class Attention(NamedTuple):
    """What the attention of a layer is given besides the residual stream, and its weights."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    #: `[heads, query, key]`
    weights: Tensor


class AttributionOracle(Oracle):
    """Hooks and autograd on a copy of `model` in float64, with eager attention."""

    def __init__(self, model: nn.Module, family: str) -> None:
        super().__init__(model, family)
        self.model.double().requires_grad_(True)
        # The only attention that gives its weights.
        self.model.set_attn_implementation("eager")
        # Each oracle has caches of its own, which go when it goes.
        self._gradients = functools.cache(self._gradients)
        self._averaged = functools.cache(self._averaged)
        self._attention = functools.cache(self._attention)

    def gradient(
        self, target: Prompt, metric: Metric, component: str, layer: int, held: int | None = None
    ) -> Tensor:
        """`[seq, width]`: of the metric in the target run, with respect to an activation.

        What layer `held` adds to the residual stream is constant, whatever changes before it.
        """
        return self._gradients(target, metric, held)[component, layer][0]

    def first_order(
        self,
        target: Prompt,
        source: Source,
        place: Place,
        metric: Metric,
        *,
        held: int | None = None,
    ) -> float:
        """The gradient times what changes at the place, which is 0 where nothing is patched."""
        gradient = self.gradient(target, metric, place.component, place.layer, held)
        moves = self.moves(target, source, place)
        return sum(float(self.part(gradient[row], place) @ move) for row, move in moves.items())

    def joint(
        self, target: Prompt, source: Source, places: Sequence[Place], metric: Metric
    ) -> float:
        """The same of several places at once, none of which is reached by a change in another.

        Each holds the target's own values, as it would hold the donor's were it patched.
        """
        leaves, moves, edits = [], [], []
        for place in places:
            own = self.part(self.activation(target, place.component, place.layer), place)
            written = {}
            for row, move in self.moves(target, source, place).items():
                written[row] = own[row].clone().requires_grad_()
                leaves.append(written[row])
                moves.append(move)
            edits.append((place, written))
        # Only now, as what is looked up above may run other prompts.
        hooks = [self._hook(place, self._writer(place, written)) for place, written in edits]
        value = metric(self._logits(target, hooks))
        if not leaves:
            return 0.0
        gradients = torch.autograd.grad(value, leaves)
        return sum(float(found @ move) for found, move in zip(gradients, moves, strict=True))

    def finite_difference(
        self,
        target: Prompt,
        source: Source,
        places: Sequence[Place],
        metric: Metric,
        eps: float = 1e-5,
        *,
        held: int | None = None,
    ) -> float:
        """What first_order, or joint, must be, by two forwards and no autograd.

        In one of them each place is `eps` of the way to the donor, in the other `eps` beyond the
        target. What layer `held` adds is written over by what it adds in the target run.
        """

        def value(share: float) -> float:
            edits = []
            for place in places:
                own = self.part(self.activation(target, place.component, place.layer), place)
                moves = self.moves(target, source, place)
                edits.append((place, {row: own[row] + share * move for row, move in moves.items()}))
            for component in ADDED if held is not None else ():
                written = dict(enumerate(self.activation(target, component, held)))
                edits.append((Place(component, held), written))
            hooks = [self._hook(place, self._writer(place, written)) for place, written in edits]
            return float(metric(self._forward(target, hooks)))

        return (value(eps) - value(-eps)) / (2 * eps)

    def integrated(
        self, target: Prompt, source: Source, place: Place, metric: Metric, steps: int
    ) -> float:
        """The mean gradient on the way to the donor, times what changes at the place.

        On the way is the whole activation, at all positions and in all heads, whichever of them
        the place has: so the estimates of its parts add up to that of all.
        """
        only = place.only
        if only is not None and place.head is not None:
            only = only.of_each(len(self.heads(place.component)))
        gradient = self._averaged(target, source, place.component, place.layer, only, metric, steps)
        moves = self.moves(target, source, place)
        return sum(float(self.part(gradient[row], place) @ move) for row, move in moves.items())

    def qk_fixed(
        self,
        target: Prompt,
        source: Source,
        place: Place,
        metric: Metric,
        *,
        held: int | None = None,
    ) -> float:
        """For queries or keys: first order only from the attention probabilities on.

        How the probabilities change is computed. Their softmax may be flat where the target is,
        and then the gradient of a query says nothing of what another one would do.
        """
        given = {each: self.activation(target, each, place.layer).clone() for each in ("q", "k")}
        before = self.probabilities(target, place.layer, **given)
        seen = self._attention(target)[place.layer].weights
        torch.testing.assert_close(before, seen, atol=1e-12, rtol=0)
        for row, move in self.moves(target, source, place).items():
            self.part(given[place.component][row], place).add_(move)
        after = self.probabilities(target, place.layer, **given)
        gradient = self.probability_gradient(target, metric, place.layer, held)
        return float((gradient * (after - before)).sum())

    def probabilities(self, target: Prompt, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """`[heads, query, key]`, if the projections of the target had given these, `[seq, width]`.

        Query heads of a group are next to one another.
        """
        attention = self.model.model.layers[layer].self_attn
        cos, sin, mask, _ = self._attention(target)[layer]

        def prepared(rows: Tensor, norm: str) -> Tensor:
            heads = rows.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
            with Wide():
                heads = getattr(attention, norm, nn.Identity())(heads)
            first, second = heads.chunk(2, -1)
            return heads * cos + torch.cat([-second, first], -1) * sin

        with torch.no_grad():
            queries, keys = prepared(q, "q_norm"), prepared(k, "k_norm")
            keys = keys.repeat_interleave(len(queries) // len(keys), 0)
            scores = queries @ keys.mT * attention.scaling
            cap = getattr(attention, "attn_logit_softcapping", None)
            if cap is not None:
                scores = (scores / cap).tanh() * cap
            return (scores if mask is None else scores + mask).softmax(-1)

    def probability_gradient(
        self, target: Prompt, metric: Metric, layer: int, held: int | None = None
    ) -> Tensor:
        """`[heads, query, key]`: of the metric, with respect to the attention probabilities."""
        return self._gradients(target, metric, held)["probabilities", layer][0]

    def grad_drop(
        self,
        target: Prompt,
        source: Source,
        place: Place,
        metric: Metric,
        *,
        qk_fix: bool = False,
    ) -> float:
        """The mean size of the estimates in each of which another layer is held constant.

        Effects by two layers that cancel each other are seen where either is held. A layer is not
        held for a place inside of it, from which nothing would come out; if there is no other one,
        this is the size of the plain estimate.
        """
        fixed = qk_fix and place.component in ("q", "k")
        estimate = self.qk_fixed if fixed else self.first_order
        between = place.component in BETWEEN
        layers = [layer for layer in range(self.n_layers) if between or layer != place.layer]
        held: Sequence[int | None] = layers or [None]
        sizes = [abs(estimate(target, source, place, metric, held=layer)) for layer in held]
        return sum(sizes) / len(sizes)

    def star(self, target: Prompt, source: Source, place: Place, metric: Metric) -> float:
        """AtP*: GradDrop of the QK-fixed estimate, where there is one."""
        return self.grad_drop(target, source, place, metric, qk_fix=True)

    def moves(self, target: Prompt, source: Source, place: Place) -> dict[int, Tensor]:
        """Donor less target at the place's columns, for each row that is patched."""
        donor = self.of_prompt(source) if isinstance(source, tuple) else source
        own = self.part(self.activation(target, place.component, place.layer), place)
        found = {}
        for back in place.from_end:
            if back <= len(target) and (vector := donor(place, back)) is not None:
                row = len(target) - back
                found[row] = vector.double() - own[row]
                if place.only is not None:
                    found[row] = place.only.of(found[row])
        return found

    def _gradients(
        self, target: Prompt, metric: Metric, held: int | None
    ) -> dict[tuple[str, int], Tensor]:
        """With respect to all activations `[1, seq, width]` that reach the metric."""
        hooks: list[Callable[[], Any]] = []
        graph: dict[tuple[str, int], Tensor] = {}

        def reader(key: tuple[str, int]) -> Callable[[Tensor], Tensor]:
            def read(activation: Tensor) -> Tensor:
                graph[key] = activation
                return activation

            return read

        def weights(layer: int) -> Callable[..., None]:
            def read(_: nn.Module, args: tuple, output: tuple) -> None:
                graph["probabilities", layer] = output[1]

            return read

        for layer, module in enumerate(self.model.model.layers):
            for component in self.table:
                hooks.append(self._hook(Place(component, layer), reader((component, layer))))
            hooks.append(module.self_attn.register_forward_hook(weights(layer)).remove)
        if held is not None:
            hooks += [self._hook(Place(component, held), Tensor.detach) for component in ADDED]
        value = metric(self._logits(target, hooks))
        found = torch.autograd.grad(value, list(graph.values()), allow_unused=True)
        pairs = zip(graph, found, strict=True)
        return {key: gradient for key, gradient in pairs if gradient is not None}

    def _averaged(
        self,
        target: Prompt,
        source: Source,
        component: str,
        layer: int,
        only: Part | None,
        metric: Metric,
        steps: int,
    ) -> Tensor:
        """`[seq, width]`: the mean gradient on the straight line, by Gauss and Legendre."""
        whole = Place(component, layer, None, tuple(range(1, len(target) + 1)), only)
        moves = self.moves(target, source, whole)
        own = self.activation(target, component, layer)
        mean = torch.zeros_like(own)
        nodes, weights = np.polynomial.legendre.leggauss(steps)
        # They are those of [-1, 1].
        for alpha, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            leaf = own.clone()
            for row, move in moves.items():
                leaf[row] += float(alpha) * move
            leaf.requires_grad_()
            written = {row: leaf[row] for row in moves}
            logits = self._logits(target, [self._hook(whole, self._writer(whole, written))])
            if moves:
                mean += float(weight) * torch.autograd.grad(metric(logits), leaf)[0]
        return mean

    def _attention(self, target: Prompt) -> list[Attention]:
        """Of each layer, in the target run."""
        found: list[Attention] = []

        def read(_: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
            cos, sin = kwargs["position_embeddings"]
            mask = kwargs["attention_mask"]
            found.append(Attention(cos[0], sin[0], None if mask is None else mask[0], output[1][0]))

        attentions = [layer.self_attn for layer in self.model.model.layers]
        self._forward(
            target,
            [each.register_forward_hook(read, with_kwargs=True).remove for each in attentions],
        )
        return found

    def _forward(self, prompt: Prompt, hooks: list[Callable[[], None]]) -> Tensor:
        with torch.no_grad():
            return self._logits(prompt, hooks)

    def _logits(self, prompt: Prompt, hooks: list[Callable[[], None]]) -> Tensor:
        """`[vocab]`, in float64 and with their graph."""
        try:
            with Wide():
                logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits
        finally:
            for remove in hooks:
                remove()
        return logits[0, -1]
