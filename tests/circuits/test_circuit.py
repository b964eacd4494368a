"""Circuits as sets of edges, and how their edges are chosen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnpatch_core.circuits import Circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError
from tests.helpers.circuits import (
    Edges,
    made_edges,
    nodes_of,
    some_circuits,
    some_edges,
    some_nodes,
    ways,
    writers,
)

NODES = nodes_of(2, 4, group=2)
SOME = ["input->m0", "m0->a1.h1<k>", "a1.h3->logits", "a0.h1->a1.h0<q>"]


def scored(circuit: Circuit) -> dict[str, float]:
    return {edge: float(circuit.scores[circuit.nodes.place(edge)]) for edge in circuit}


# The set ------------------------------------------------------------------------------------------


def test_it_is_a_set_of_edges_in_their_order() -> None:
    circuit = Circuit.of(NODES, [*SOME, SOME[0]])
    assert len(circuit) == 4
    assert circuit.edges == tuple(circuit) == ("input->m0", SOME[3], "m0->a1.h1<k>", SOME[2])
    assert all(edge in circuit for edge in SOME)
    for other in ("input->logits", "m1->m0", "nonsense", 3, None):
        assert other not in circuit
    assert repr(circuit) == f"Circuit(4 of {len(NODES)} edges, 6 nodes)"
    assert circuit.nodes_in_it == ("input", "a0.h1", "m0", "a1.h0", "a1.h3", "logits")


@given(some_nodes(), st.data())
def test_sums_cuts_and_differences_are_those_of_sets(nodes: Nodes, data: st.DataObject) -> None:
    names = st.sets(st.sampled_from(list(nodes)))
    one, other = data.draw(names), data.draw(names)
    first, second = Circuit.of(nodes, one), Circuit.of(nodes, other)
    assert set(first | second) == one | other
    assert set(first & second) == one & other
    assert set(first - second) == one - other
    assert (first == second) == (one == other)
    assert first == Circuit.of(nodes, sorted(one))
    assert hash(first) == hash(Circuit.of(nodes, sorted(one)))


def test_sums_have_scores_if_both_have_the_same() -> None:
    edges = made_edges(NODES)
    one, other = (Circuit.from_edges(edges, n=n, pruned=False) for n in (3, 5))
    assert scored(one | other) == scored(other)
    assert (one | Circuit.of(NODES, SOME)).scores is None
    assert (one | Circuit.from_edges(made_edges(NODES, seed=1), n=3)).scores is None
    assert scored(other - one) == {key: scored(other)[key] for key in set(other) - set(one)}
    assert (one & Circuit.of(NODES, list(NODES))).scores is not None


def test_circuits_of_other_nodes_are_no_match() -> None:
    one, other = Circuit.of(NODES, SOME), Circuit.of(nodes_of(2, 4), [])
    assert one != other
    assert one != "a circuit"
    for call in (
        lambda: one | other,
        lambda: one & other,
        lambda: one - other,
        lambda: one.precision_recall(other),
    ):
        with pytest.raises(EdgeError, match="circuits of other nodes: one has 2 layers, 82"):
            call()
    with pytest.raises(EdgeError, match="must be a Circuit"):
        one.precision_recall(SOME)
    with pytest.raises(TypeError):
        one | SOME


def test_precision_and_recall() -> None:
    known = Circuit.of(NODES, SOME)
    precision, recall = Circuit.of(NODES, [*SOME[:3], "input->logits"]).precision_recall(known)
    assert (precision, recall) == (0.75, 0.75)
    found = Circuit.of(NODES, []).precision_recall(known)
    assert math.isnan(found.precision)
    assert found.recall == 0
    assert math.isnan(known.precision_recall(Circuit.of(NODES, [])).recall)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nodes", torch.zeros(2)), "nodes must be the Nodes of a model, got 'nodes'"),
        ((NODES, "kept"), r"kept must be a tensor \[senders, receivers\], got 'kept'"),
        ((NODES, torch.zeros(3, 4, dtype=torch.bool)), r"kept must have the shape \[11, 19\]"),
        ((NODES, torch.zeros(11, 19)), "kept must be a tensor of bool, got torch.float32"),
        ((NODES, torch.ones(11, 19, dtype=torch.bool)), "kept has True at a0.h0->a0.h0<q>, which"),
        ((NODES, np.zeros((11, 19), bool), torch.zeros(11, 19)), "scores has a number at a0.h0->"),
        ((NODES, np.zeros((11, 19), bool), None, torch.zeros(2, 2)), "exact must have the shape"),
        ((NODES, np.zeros((11, 19), bool), None, None, {"a": 3}), "info must be texts by name"),
        ((NODES, np.zeros((11, 19), bool), None, None, 3), "info must be texts by name, got 3"),
    ],
)
def test_what_is_no_circuit(arguments: Any, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        Circuit(*arguments)


def test_names_that_are_no_edges() -> None:
    for edges, words in (
        (["input->a0.h1"], "does not say which of a head's inputs receives"),
        (["m1->m0"], "m1 writes after m0 has read the stream"),
        (["input->q"], "the model has no receiver 'q'"),
        ("input->m0", "edges must be names such as"),
        (3, "edges must be names such as"),
        ([["input"]], "an edge is named like"),
    ):
        with pytest.raises(EdgeError, match=words):
            Circuit.of(NODES, edges)
    with pytest.raises(EdgeError, match="nodes must be the Nodes of a model, got None"):
        Circuit.of(None, [])


# Pruning ------------------------------------------------------------------------------------------


@given(some_circuits())
def test_pruned_has_all_that_is_on_a_way_and_no_more(circuit: Circuit) -> None:
    if len(circuit) > 40:
        circuit = Circuit.of(circuit.nodes, circuit.edges[:: len(circuit) // 20])
    pruned = circuit.pruned()
    assert set(pruned) == {edge for way in ways(circuit) for edge in way}
    assert pruned.pruned() == pruned
    assert set(pruned.nodes_in_it) <= set(circuit.nodes_in_it)


@given(some_circuits())
def test_pruning_grouped_edges_drops_no_more_than_pruning_their_copies(circuit: Circuit) -> None:
    """The copies that it drops beyond are of heads from which nothing leads on."""
    nodes = circuit.nodes
    apart = Nodes(nodes.query, nodes.query, nodes.parallel)

    def copies(edges: Any) -> set[str]:
        found = set()
        for edge in edges:
            sender, receiver = edge.split("->")
            letter = receiver[-2:-1] if receiver.endswith(">") else ""
            heads = writers(nodes, receiver) if letter in ("k", "v") else []
            found |= {f"{sender}->{head}<{letter}>" for head in heads} or {edge}
        return found

    of_copies = set(Circuit.of(apart, copies(circuit)).pruned())
    ours = copies(circuit.pruned())
    assert of_copies <= ours
    leads = {edge.split("->")[0] for edge in of_copies}
    for edge in ours - of_copies:
        receiver = edge.split("->")[1]
        assert receiver[-2:] in ("k>", "v>")
        assert receiver[:-3] not in leads


def test_pruning_keeps_scores() -> None:
    edges = made_edges(NODES)
    circuit = Circuit.from_edges(edges, n=20, pruned=False)
    assert 0 < len(circuit.pruned()) < 20
    assert torch.equal(circuit.pruned().scores.nan_to_num(), edges.matrix.nan_to_num())
    assert circuit.pruned().info["chosen"] == "top 20 by size, then pruned"


# Choosing -----------------------------------------------------------------------------------------


def in_order(edges: Edges, absolute: bool) -> list[str]:
    """The names of all edges, strongest first, as plain Python sorts them."""
    scores = {edge: float(edges.matrix[edges.nodes.place(edge)]) for edge in edges.nodes}
    return sorted(scores, key=lambda edge: -(abs(scores[edge]) if absolute else scores[edge]))


@given(some_edges(), st.booleans(), st.data())
def test_top_and_threshold(edges: Edges, absolute: bool, data: st.DataObject) -> None:
    names = in_order(edges, absolute)
    n = data.draw(st.integers(0, len(names)))
    made = Circuit.from_edges(edges, n=n, pruned=False, absolute=absolute)
    assert set(made) == set(names[:n])
    keys = edges.matrix.abs() if absolute else edges.matrix
    some = sorted({float(keys[edges.nodes.place(name)]) for name in names})
    least = data.draw(st.floats(-2, 2) | st.sampled_from(some))
    by = Circuit.from_edges(edges, threshold=least, pruned=False, absolute=absolute)
    assert set(by) == {edge for edge in names if keys[edges.nodes.place(edge)] >= least}


@given(some_edges(), st.booleans(), st.data())
def test_greed(edges: Edges, absolute: bool, data: st.DataObject) -> None:
    """Each edge leads to one before it or to the logits, and none that does is stronger."""
    nodes, names = edges.nodes, in_order(edges, absolute)
    n = data.draw(st.integers(0, min(12, len(names))))
    taken: list[str] = []
    reached = {"logits"}
    for _ in range(n):
        edge = next(each for each in names if each not in taken and each.split("->")[1] in reached)
        taken.append(edge)
        sender = edge.split("->")[0]
        reached |= {each for each in nodes.receiver_names if sender in writers(nodes, each)}
    options = {"method": "greedy", "absolute": absolute, "pruned": False}
    assert set(Circuit.from_edges(edges, n=n, **options)) == set(taken)
    everything = Circuit.from_edges(edges, n=len(nodes), **options)
    assert len(everything) == len(nodes)


@given(some_edges(), st.booleans(), st.data())
def test_greedy_circuits_lead_to_the_logits(
    edges: Edges, absolute: bool, data: st.DataObject
) -> None:
    nodes = edges.nodes
    n = data.draw(st.integers(1, len(nodes)))
    made = Circuit.from_edges(edges, n=n, method="greedy", absolute=absolute, pruned=False)
    fed = {f"input->{name}" for name in nodes.receiver_names if f"input->{name}" in nodes}
    # Fed from the input everywhere, all of it is on a way.
    whole = made | Circuit.of(nodes, fed)
    assert set(made) <= set(whole.pruned())
    pruned = Circuit.from_edges(edges, n=n, method="greedy", absolute=absolute)
    assert pruned == made.pruned()


@given(some_edges(), st.booleans(), st.data())
def test_top_circuits_are_nested(edges: Edges, absolute: bool, data: st.DataObject) -> None:
    whole = Circuit.from_edges(edges, n=len(edges.nodes))
    sizes = st.integers(0, len(edges.nodes) + 2)
    small, large = sorted((data.draw(sizes), data.draw(sizes)))
    one, other = (whole.top(size, absolute=absolute) for size in (small, large))
    assert set(one) <= set(other)
    assert len(one) == min(small, len(whole))
    assert other.top(small, absolute=absolute) == one


def test_edges_without_a_score_are_never_chosen() -> None:
    edges = made_edges(NODES)
    matrix = edges.matrix.clone()
    matrix[NODES.sender("m0")] = math.nan
    some = Edges(NODES, matrix)
    count = int((~matrix.isnan()).sum())
    made = Circuit.from_edges(some, n=count, pruned=False)
    assert not any(edge.startswith("m0->") for edge in made)
    assert not any(
        edge.startswith("m0->") for edge in Circuit.from_edges(some, threshold=-9, absolute=False)
    )
    for method in ("top", "greedy"):
        with pytest.raises(EdgeError, match=f"n is {count + 1}, and {count} edges have a score"):
            Circuit.from_edges(some, n=count + 1, method=method)
    only = {"a0.h0->m0": 1.0, "input->m0": 2.0}
    with pytest.raises(EdgeError, match="ends after 0 edges, for those further down have no"):
        Circuit.from_edges(only, n=1, method="greedy", nodes=NODES)


def test_estimates_stay_estimates() -> None:
    edges = made_edges(NODES)
    exact = torch.from_numpy(NODES.mask) & (edges.matrix.abs() > 0.3)
    circuit = Circuit.from_edges(Edges(NODES, edges.matrix, exact), n=12)
    assert torch.equal(circuit.exact, exact)
    for made in (circuit.pruned(), circuit.top(3), circuit - circuit.top(3), circuit & circuit):
        assert torch.equal(made.exact, exact)
    assert Circuit.from_edges(edges, n=3).exact is None
    assert Circuit.from_edges({"input->m0": 0.5}, n=1, nodes=NODES).exact is None


def test_the_info_says_how_it_was_chosen() -> None:
    edges = made_edges(NODES, info={"model": "a model", "n": 3})
    one = Circuit.from_edges(edges, n=5, method="greedy", absolute=False)
    assert one.info == {"model": "a model", "chosen": "greedy 5 by value, then pruned"}
    two = Circuit.from_edges(edges, threshold=0.25, pruned=False).top(2)
    assert two.info["chosen"] == "edges of at least 0.25 by size, then top 2 by size"


def test_numbers_of_all_kinds_are_scores() -> None:
    numbers = {
        "input->m0": np.float32(0.5),
        "input->m1": torch.tensor(-2),
        "m0->m1": 3,
        "m0 -> logits": math.inf,
    }
    circuit = Circuit.from_edges(numbers, n=4, nodes=NODES, pruned=False)
    assert scored(circuit) == {
        "input->m0": 0.5, "input->m1": -2.0, "m0->m1": 3.0, "m0->logits": math.inf
    }  # fmt: skip
    assert list(circuit.top(1)) == ["m0->logits"]


@pytest.mark.parametrize(
    ("edges", "options", "words"),
    [
        (None, {}, "by n= or by threshold=: give one of them"),
        (None, {"n": 1, "threshold": 0.5}, "by n= or by threshold=: give one of them"),
        (None, {"n": 1, "method": "threshold"}, "method 'threshold' takes threshold="),
        (None, {"threshold": 1, "method": "greedy"}, "method 'greedy' takes n="),
        (None, {"n": 1, "method": "best"}, "method must be 'top', 'threshold' or 'greedy', got"),
        (None, {"n": 1, "method": ["top"]}, "method must be 'top', 'threshold' or 'greedy', got"),
        (None, {"n": -1}, "n must be at least 0, got -1"),
        (None, {"n": 1.5}, "n must be an integer, got 1.5"),
        (None, {"n": True}, "n must be an integer, got True"),
        (None, {"n": 83}, "n is 83, and 82 edges have a score"),
        (None, {"threshold": "0"}, "threshold must be a number, got '0'"),
        (None, {"threshold": math.nan}, "threshold must be a number, got nan"),
        (None, {"n": 1, "nodes": nodes_of(1, 1)}, "nodes= are others than those of the edges"),
        (None, {"n": 1, "nodes": "nodes"}, "nodes must be the Nodes of a model, got 'nodes'"),
        ({}, {"n": 1}, "numbers by name need nodes="),
        ([], {"n": 1, "nodes": NODES}, "a circuit is made of the outcome of edge_patching, or"),
        ({"input->m9": 1}, {"n": 1, "nodes": NODES}, "the model has no receiver 'm9'"),
        ({"input->m0": "1"}, {"n": 1, "nodes": NODES}, "the score of input->m0 must be a number"),
        ({"input->m0": True}, {"n": 1, "nodes": NODES}, "the score of input->m0 must be a number"),
        ({"input->m0": 1, "input-> m0": 2}, {"n": 1, "nodes": NODES}, "are one edge, with a score"),
        (Edges(NODES, torch.zeros(3)), {"n": 1}, "matrix must have the shape"),
        (Edges(NODES, torch.zeros(11, 19)), {"n": 1}, "matrix has a number at a0.h0->a0.h0<q>"),
        (Edges(NODES, torch.zeros(11, 19, dtype=torch.complex64)), {"n": 1}, "real numbers"),
        (Edges(NODES, made_edges(NODES).matrix, "all"), {"n": 1}, "exact must be a tensor"),
    ],
)
def test_what_no_circuit_is_made_of(edges: Any, options: Any, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        Circuit.from_edges(made_edges(NODES) if edges is None else edges, **options)


def test_top_needs_scores_and_a_count() -> None:
    with pytest.raises(EdgeError, match="a circuit without scores has no strongest edges"):
        Circuit.of(NODES, SOME).top(2)
    circuit = Circuit.from_edges(made_edges(NODES), n=4)
    with pytest.raises(EdgeError, match="n must be at least 0, got -2"):
        circuit.top(-2)
    with pytest.raises(EdgeError, match="n must be an integer"):
        circuit.top("2")


# Its table ----------------------------------------------------------------------------------------


def test_its_table() -> None:
    edges = made_edges(NODES)
    exact = torch.from_numpy(NODES.mask) & (edges.matrix.abs() > 0.2)
    circuit = Circuit.from_edges(Edges(NODES, edges.matrix, exact, {"model": "<b>x</b>"}), n=40,
                                 pruned=False)  # fmt: skip
    title, head, *lines, more = str(circuit).splitlines()
    assert title == f"Circuit: 40 of the 82 edges, {len(circuit.nodes_in_it)} nodes"
    assert head.split() == ["edge", "score", "kind"]
    assert len(lines) == 20
    assert more == "and 20 more: to_dataframe() has all"
    sizes = [abs(float(line.split()[1])) for line in lines]
    assert sizes == sorted(sizes, reverse=True)
    for line in lines:
        name, score, kind = line.split()
        assert kind == ("exact" if exact[NODES.place(name)] else "estimate")
        assert abs(float(score) - scored(circuit)[name]) < 5e-4
    page = circuit._repr_html_()
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert page.count("<tr>") == 22 + 1  # with the info: how it was chosen, and the model
    frame = circuit.to_dataframe()
    assert list(frame) == ["edge", "sender", "receiver", "score", "exact"]
    assert dict(zip(frame["edge"], frame["score"], strict=True)) == scored(circuit)
    assert (frame["edge"] == frame["sender"] + "->" + frame["receiver"]).all()


def test_tables_of_circuits_without_scores() -> None:
    plain = Circuit.of(NODES, SOME)
    assert str(plain).splitlines()[1:] == ["edge", *plain.edges]
    assert list(plain.to_dataframe()) == ["edge", "sender", "receiver"]
    assert str(Circuit.of(NODES, [])) == "Circuit: 0 of the 82 edges, 0 nodes"
    lost = Circuit.from_edges({"input->m0": 1.0}, n=1, nodes=NODES)
    assert str(lost).splitlines()[1:] == [
        "top 1 by size, then pruned: no way leads from the input to the logits"
    ]
    assert "<table></table>" in Circuit.of(NODES, [])._repr_html_()
    matrix = made_edges(NODES).matrix
    matrix[NODES.place("input->m0")] = math.nan
    partly = Circuit(NODES, Circuit.of(NODES, SOME).kept, matrix)
    assert str(partly).splitlines()[-1] == "input->m0"


def test_nothing_that_was_given_is_changed() -> None:
    edges = made_edges(NODES)
    before = edges.matrix.clone()
    circuit = Circuit.from_edges(edges, n=5)
    circuit.scores[:] = 7
    assert torch.equal(edges.matrix.nan_to_num(), before.nan_to_num())
