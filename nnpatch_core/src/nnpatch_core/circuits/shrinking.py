"""A faithful circuit is made smaller: edges that it does without are dropped, as runs tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.edges import Nodes

#: By so much rounding may part what is equal.
ROUNDING = 1e-5


@attrs.frozen
class Step:
    """A circuit that was run on the way.

    Args:
        stage: what it was run for.
        edges: how many it has.
        faithfulness: its own.
        kept: whether the search went on from it.
    """

    stage: str
    edges: int
    faithfulness: float
    kept: bool


def is_faithful(faithfulness: float, goal: float) -> bool:
    """Whether that is faithful enough, but for rounding: too much is as far off as too little."""
    return _closeness(faithfulness) >= goal - ROUNDING


def _closeness(faithfulness: float) -> float:
    return 1 - abs(1 - faithfulness)


@attrs.define(eq=False)
class Search:
    """A search for a small circuit that is faithful; no circuit is run twice.

    Args:
        measure: runs a circuit, and says how faithful it is.
        goal: how faithful one must be.
        most: how many circuits may be run.
        steps: those that were run.
    """

    measure: Callable[[Circuit], float]
    goal: float
    most: int
    steps: list[Step] = attrs.field(factory=list)
    _known: dict[bytes, float] = attrs.field(factory=dict, init=False)

    @property
    def left(self) -> int:
        """How many circuits may still be run."""
        return max(self.most - len(self.steps), 0)

    def reaches(self, faithfulness: float) -> bool:
        """Whether that is faithful enough."""
        return is_faithful(faithfulness, self.goal)

    def run(self, stage: str, circuit: Circuit) -> float:
        """Run a circuit, and note it."""
        edges = np.packbits(circuit.kept.numpy()).tobytes()
        if edges not in self._known:
            found = self._known[edges] = self.measure(circuit)
            self.steps.append(Step(stage, len(circuit), found, self.reaches(found)))
        return self._known[edges]


def smallest(search: Search, choose: Callable[[int], Circuit], sizes: Sequence[int]) -> Circuit:
    """The smallest faithful circuit among those of a ranking.

    Sizes are tried from the smallest on; between the first that is faithful and the one before, the
    size is halved in. Faithfulness need not grow with size: so a smaller one may be missed.

    Args:
        search: runs circuits.
        choose: the circuit of so many edges.
        sizes: which numbers of edges are tried, ascending.

    Returns:
        The circuit; if none that was run is faithful, the one that comes closest.
    """
    low, first = 0, None
    known: dict[int, tuple[Circuit, float]] = {}

    def reaches(size: int) -> bool:
        circuit = choose(size)
        known[size] = circuit, search.run("size", circuit)
        return search.reaches(known[size][1])

    for size in sizes:
        if not search.left:
            break
        if reaches(size):
            first = size
            break
        low = size
    if first is None:
        return max(known.values(), key=lambda each: _closeness(each[1]))[0]
    while first - low > max(first // 50, 1) and search.left:
        middle = (low + first) // 2
        if reaches(middle):
            first = middle
        else:
            low = middle
    return known[first][0]


def without_blocks(search: Search, circuit: Circuit, scores: Tensor) -> Circuit:
    """The circuit without what it does without, tried in blocks, from the weakest edges on.

    Blocks are halved from an eighth of the circuit to single edges, as long as circuits may be run.

    Args:
        search: runs circuits.
        circuit: one that is faithful.
        scores: `[senders, receivers]`, by whose size edges are weak.
    """
    size = max(len(circuit) // 8, 1)
    while search.left:
        # A block that was needed is not tried again at the same size.
        for block in _blocks(circuit, scores, size):
            if not search.left:
                break
            smaller = _dropped(circuit, block).pruned()
            if len(smaller) == len(circuit) or not len(smaller):
                continue
            if search.reaches(search.run("prune", smaller)):
                circuit = smaller
        if size == 1:
            break
        size = max(size // 2, 1)
    return circuit


def as_acdc(search: Search, circuit: Circuit, threshold: float) -> Circuit:
    """The circuit without each edge whose loss changes the faithfulness by less than a threshold.

    From the logits down, each receiver's edges in turn, as Conmy et al. do it, "Towards Automated
    Circuit Discovery for Mechanistic Interpretability" (2023). An edge that is dropped stays so. In
    the end all goes that is on no way from the input to the logits.

    Args:
        search: runs circuits.
        circuit: where it begins; it was run.
        threshold: of the change.
    """
    value = search.run("acdc", circuit)
    for sender, receiver in _from_logits(circuit.nodes):
        if not bool(circuit.kept[sender, receiver]):
            continue
        if not search.left:
            break
        smaller = _dropped(circuit, torch.tensor([[sender, receiver]], device="cpu"))
        other = search.run("acdc", smaller)
        if abs(other - value) < threshold:
            circuit, value = smaller, other
    return circuit.pruned()


def _from_logits(nodes: Nodes) -> Iterator[tuple[int, int]]:
    """All edges by receiver, from the logits down, each receiver's from its last sender on."""
    for receiver in reversed(range(len(nodes.receivers))):
        for sender in reversed(nodes.mask[:, receiver].nonzero()[0].tolist()):
            yield sender, receiver


def _blocks(circuit: Circuit, scores: Tensor, size: int) -> Iterator[Tensor]:
    """The edges of a circuit, `[size, 2]` at a time, from the weakest on."""
    edges = circuit.kept.nonzero()
    sizes = scores[tuple(edges.T)].abs().nan_to_num(0.0)
    ordered = edges[sizes.argsort(stable=True)]
    for first in range(0, len(ordered), size):
        yield ordered[first : first + size]


def _dropped(circuit: Circuit, edges: Tensor) -> Circuit:
    kept = circuit.kept.clone()
    kept[tuple(edges.T)] = False
    return attrs.evolve(circuit, kept=kept)
