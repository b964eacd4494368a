"""What estimates of edges must give, by differences of whole runs: shares no code with nnpatch.

An estimate of an edge is how fast the metric moves as the sender's change begins to reach the
receiver: the derivative of the exact edge at a change of nothing. `EdgeOracle` in float64 runs the
model with a little of the change, and with as little of its opposite; no gradient is taken. For the
methods that integrate it does so in runs on their way to the source run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from tests.helpers.edge_oracle import (
    INPUT,
    EdgeOracle,
    Node,
    Positions,
    Prompt,
    Value,
    node_of,
)

#: `[vocab]`, the logits at the last token, to a number.
Metric = Callable[[Tensor], Any]
#: How much of a change is made: its square is what the difference is off by.
STEP = 1e-6


class EdgeDerivatives(EdgeOracle):
    """An oracle on a copy of `model` in float64."""

    def __init__(self, model: Any, family: str) -> None:
        super().__init__(model.double(), family)
        self._points = functools.cache(self._points)

    def estimate(
        self,
        source: Prompt,
        target: Prompt,
        edge: str,
        metric: Metric,
        method: str = "eap",
        steps: int = 5,
        positions: Positions = None,
        value: Value = "source",
    ) -> float:
        """What an edge would change of the metric, raw, by one of the methods."""
        sender, receiver = map(node_of, edge.split("->"))
        change = self.change(source, target, sender, positions, value)
        slopes = [
            self._slope(prompt, receiver, change, metric, held)
            for prompt, held in self._points(source, target, method, steps, sender[:2], value)
        ]
        return sum(slopes) / len(slopes)

    def added(
        self, source: Prompt, target: Prompt, sender: str, metric: Metric, value: Value = "source"
    ) -> float:
        """What all edges of a sender add up to: its change times the gradient where it is added.

        Added to the stream behind the sender, so that whoever reads the stream reads it.
        """
        node = node_of(sender)
        change = self.change(source, target, node, value=value)
        if node == INPUT:
            place, change = node, change
        else:
            place = ("attn" if node[0] == "o" else "mlp", node[1])
            change = change / self.factor
        own = self.activation(target, *place)

        def moved(share: float) -> Any:
            held = {place: own + share * change}
            return metric(self.logits(target, self._holding(target, held)))

        return (moved(STEP) - moved(-STEP)) / (2 * STEP)

    def _slope(
        self,
        prompt: Prompt,
        receiver: Node,
        change: Tensor,
        metric: Metric,
        held: Mapping[Node, Tensor],
    ) -> Any:
        """How fast the metric moves in a run in which some nodes are held."""
        stream = self._streams(prompt, held)[self._reads(receiver)]

        def moved(share: float) -> Any:
            value = self._output(receiver, stream + share * change)
            hooks = self._holding(prompt, {**held, receiver: value})
            return metric(self.logits(prompt, hooks))

        return (moved(STEP) - moved(-STEP)) / (2 * STEP)

    def _streams(self, prompt: Prompt, held: Mapping[Node, Tensor]) -> Any:
        known = self.__dict__.setdefault("_known_streams", {})
        key = prompt, id(held)
        if key not in known:
            # With what is held, so that its number stays its own.
            known[key] = held, self._run(prompt, dict(held))
        return known[key][1]

    def _points(
        self, source: Prompt, target: Prompt, method: str, steps: int, group: Any, value: Value
    ) -> list[tuple[Prompt, dict[Node, Tensor]]]:
        """The runs in which slopes are taken."""
        return [*self._between(source, target, method, steps, group, value)]

    def _between(
        self, source: Prompt, target: Prompt, method: str, steps: int, group: Any, value: Value
    ) -> Iterator[tuple[Prompt, dict[Node, Tensor]]]:
        if method == "eap":
            yield target, {}
            return
        if method == "clean-corrupted":
            yield target, {}
            yield source, {}
            return
        if method == "eap-ig-inputs" or group == INPUT:
            place, to = INPUT, self._put(source, target, INPUT, value)
        elif group[0] == "mlp":
            place, to = group, self._put(source, target, group, value)
        else:
            place = ("attn", group[1])
            z = self.activation(target, "o", group[1]).clone()
            for head in self.heads("o", group[1]):
                node = ("o", group[1], head)
                z[:, self._columns(node)] = self._put(source, target, node, value)
            to = self._added(group[1], z) / self.factor
        own = self.activation(target, *place)
        for step in range(1, steps + 1):
            yield target, {place: own + step / steps * (to - own)}
