"""Circuits that no model has, for tests and for pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core.circuits import Circuit
from nnpatch_core.edges import Nodes


@attrs.frozen(eq=False)
class Edges:
    """Edges with scores, as `edge_patching` gives them."""

    nodes: Nodes
    matrix: Tensor
    exact: Tensor | None = None
    info: Mapping[str, str] = attrs.field(factory=dict)


def nodes_of(layers: int, heads: int, group: int = 1, parallel: bool = False) -> Nodes:
    return Nodes((heads,) * layers, (heads // group,) * layers, (parallel,) * layers)


def made_edges(nodes: Nodes, seed: int = 0, few: float = 2.0, **options: Any) -> Edges:
    """Scores of which few are large, as those of models are: by sender, by receiver and by edge."""
    random = np.random.default_rng(seed)
    senders, receivers = (random.normal(size=count) * few for count in nodes.mask.shape)
    matrix = np.exp(senders[:, None] + receivers) * random.normal(size=nodes.mask.shape)
    matrix /= np.abs(matrix[nodes.mask]).max()
    matrix[~nodes.mask] = math.nan
    return Edges(nodes, torch.from_numpy(matrix), **options)


def made_circuit(nodes: Nodes, n: int, seed: int = 0, **options: Any) -> Circuit:
    return Circuit.from_edges(made_edges(nodes, seed, **options), n=n, method="greedy")


@st.composite
def some_nodes(draw: st.DrawFn, uniform: bool = False) -> Nodes:
    layers = draw(st.integers(1, 4))
    one = st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans())
    sizes = [draw(one)] * layers if uniform else [draw(one) for _ in range(layers)]
    shared, group, parallel = zip(*sizes, strict=True)
    query = tuple(count * size for count, size in zip(shared, group, strict=True))
    return Nodes(query, shared, parallel)


@st.composite
def some_edges(draw: st.DrawFn, uniform: bool = False, ties: bool = True) -> Edges:
    """Scores of all edges, some of them equal."""
    nodes = draw(some_nodes(uniform))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    matrix = random.normal(size=nodes.mask.shape)
    if ties and draw(st.booleans()):
        matrix = np.round(matrix)
    matrix[~nodes.mask] = math.nan
    return Edges(nodes, torch.from_numpy(matrix))


@st.composite
def some_circuits(draw: st.DrawFn, uniform: bool = False) -> Circuit:
    """Any edges, whether connected or not, with scores or without."""
    nodes = draw(some_nodes(uniform))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    share = draw(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]))
    kept = torch.from_numpy((random.random(nodes.mask.shape) < share) & nodes.mask)
    scores = exact = None
    if draw(st.booleans()):
        numbers = random.normal(size=nodes.mask.shape)
        numbers[~nodes.mask | (random.random(nodes.mask.shape) < 0.1)] = math.nan
        scores = torch.from_numpy(numbers)
    if draw(st.booleans()):
        exact = torch.from_numpy((random.random(nodes.mask.shape) < 0.5) & nodes.mask)
    info = draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=2))
    return Circuit(nodes, kept, scores, exact, info)


def writers(nodes: Nodes, receiver: str) -> list[str]:
    """The senders that compute what they write from what a receiver reads."""
    if receiver == "logits" or receiver.startswith("m"):
        return [] if receiver == "logits" else [receiver]
    name, letter = receiver[:-3], receiver[-2]
    layer, head = (int(part[1:]) for part in name.split("."))
    size = 1 if letter == "q" else nodes.query[layer] // nodes.key_value[layer]
    return [f"a{layer}.h{each}" for each in range(head * size, (head + 1) * size)]


def ways(circuit: Circuit) -> Iterator[tuple[str, ...]]:
    """Each way from the input to the logits, as the edges on it."""
    out: dict[str, list[str]] = {}
    for edge in circuit:
        out.setdefault(edge.split("->")[0], []).append(edge)

    def on(sender: str, way: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for edge in out.get(sender, []):
            receiver = edge.split("->")[1]
            if receiver == "logits":
                yield (*way, edge)
            for writer in writers(circuit.nodes, receiver):
                yield from on(writer, (*way, edge))

    yield from on("input", ())
