"""The planted circuits are what they say, by an oracle that knows nothing of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.planted_cases import (
    EACH,
    NOTHING,
    SHARES,
    estimated,
    exact,
    oracle,
    planted,
)
from tests.helpers.planted_circuits import PLANTED
from tests.helpers.planted_oracle import METHODS, PlantedEdges, Run


@EACH
def test_the_model_answers(name: str) -> None:
    """So the two runs are as far apart in each pair, and the metric has a sign."""
    edges = oracle(name)
    whole = edges.source.metric - edges.target.metric
    assert whole.min() > 1
    torch.testing.assert_close(whole, whole.mean().expand_as(whole), rtol=0, atol=1e-3)


@EACH
def test_every_edge_is_worth_what_was_planted(name: str) -> None:
    circuit, found = planted(name), exact(name)
    assert set(circuit.values) == circuit.edges <= set(found)
    for edge, value in found.items():
        assert value == pytest.approx(circuit.values.get(edge, 0.0), abs=NOTHING), edge


@EACH
def test_precision_and_recall_are_1(name: str) -> None:
    circuit = planted(name)
    assert {each for each, value in exact(name).items() if abs(value) > circuit.threshold} == (
        circuit.edges
    )
    # No value is near the threshold, so rounding decides nothing.
    assert circuit.threshold < 0.7 * min(map(abs, circuit.values.values()))
    assert circuit.threshold > 50 * NOTHING


def test_each_kind_of_receiver_occurs() -> None:
    read = {edge.partition("->")[2] for edge in planted("chain").edges}
    assert read == {"a0.h0<v>", "a1.h0<k>", "m1", "a2.h1<q>", "a3.h1<v>", "logits"}


def test_the_edges_are_all() -> None:
    """4 layers, 4 heads that share 2 keys and values: 21 senders, 37 receivers."""
    edges = oracle("chain")
    assert len(edges.stages) == 1 + 4 * (4 + 1)
    assert len(edges.receivers) == 4 * (4 + 2 + 2 + 1) + 1
    attention, mlps = 8 * (1 + 6 + 11 + 16), 5 + 10 + 15 + 20
    assert len(exact("chain")) == len(set(edges.edges)) == attention + mlps + 21


def written(edges: PlantedEdges, run: Run) -> dict[str, Tensor]:
    """By head and MLP: what it adds to the stream, `[batch, seq, width]`."""
    wrote = {}
    for number, layer in enumerate(edges.layers):
        mixed = run.heads[number].unflatten(-1, (edges.n_heads, edges.dim))
        project = layer.self_attn.o_proj.weight.unflatten(-1, (edges.n_heads, edges.dim))
        for head in range(edges.n_heads):
            wrote[f"a{number}.h{head}"] = mixed[..., head, :] @ project[:, head].T
        wrote[f"m{number}"] = run.mlps[number]
    return wrote


@EACH
def test_nodes_outside_the_circuit_are_what_they_are_called(name: str) -> None:
    circuit, edges = planted(name), oracle(name)
    wrote = written(edges, edges.target)
    for sender in circuit.idle:
        assert not wrote[sender].any(), sender
        assert not edges.changes[sender][1].any(), sender
    for sender in circuit.alike:
        assert wrote[sender].abs().max() == pytest.approx(1, abs=NOTHING), sender
        assert not edges.changes[sender][1].any(), sender
    for sender in circuit.stray:
        assert edges.changes[sender][1].abs().max() == pytest.approx(1, abs=NOTHING), sender
    outside = circuit.idle | circuit.alike | circuit.stray
    inside = {edge.partition("->")[0] for edge in circuit.edges}
    assert not outside & inside
    if name in ("chain", "redundant", "redundant, restored", "backup", "negative"):
        assert outside | inside == set(edges.stages)


@EACH
def test_what_is_alike_is_read(name: str) -> None:
    """It moves logits, if not the difference between the runs."""
    model = planted(name).model
    read = model.lm_head.weight.detach().any(0)
    written_to = torch.zeros_like(read)
    for sender in planted(name).alike:
        number, _, head = sender[1:].partition(".h")
        layer, dim = model.model.layers[int(number)], model.config.head_dim
        weight = layer.self_attn.o_proj.weight if head else layer.mlp.down_proj.weight
        columns = slice(int(head) * dim, (int(head) + 1) * dim) if head else slice(None)
        written_to |= weight.detach()[:, columns].any(1)
    assert (read & written_to).sum() == 1


@pytest.mark.parametrize("name", [each for each in PLANTED if each.startswith("redundant")])
def test_two_paths_together_are_worth_all(name: str) -> None:
    edges = oracle(name)
    alone = planted(name).values.get("a0.h0->m1", 0.0)
    assert edges.value(["a0.h0"], "m1") == pytest.approx(alone, abs=NOTHING)
    assert edges.value(["m0"], "m1") == pytest.approx(alone, abs=NOTHING)
    assert edges.value(["a0.h0", "m0"], "m1") == pytest.approx(1, abs=NOTHING)


def test_the_backup_head_acts_only_without_the_main_head() -> None:
    edges = oracle("backup")
    acts, rests = (written(edges, run)["a2.h1"][:, -1] for run in (edges.source, edges.target))
    assert acts.abs().amax(-1).min() == pytest.approx(0.6, abs=NOTHING)
    assert rests.abs().max() < 1e-6


def test_the_negative_head_writes_against_the_answer() -> None:
    values = exact("negative")
    own = {edge: value for edge, value in values.items() if "a2.h1<" in edge or "a2.h3" in edge}
    moved = {edge: value for edge, value in own.items() if abs(value) > NOTHING}
    assert len(moved) == 4
    assert max(moved.values()) < -0.3


@EACH
def test_padding_changes_nothing(name: str) -> None:
    """So circuits can be looked for in padded prompts too."""
    circuit = planted(name)
    tokens = circuit.source_tokens
    padded = torch.cat([tokens.new_ones(len(tokens), 3), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        plain = circuit.model(tokens).logits[:, -1]
        found = circuit.model(padded, attention_mask=mask).logits[:, -1]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


# What estimates say. A softmax that has found its token, and an OR that is on, are flat there.

PATHS = frozenset({"input->a0.h0<v>", "a0.h0->m1", "input->a0.h1<v>", "a0.h2->m0", "m0->m1"})
BEFORE_QUERY = frozenset({"input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->m1", "m1->a2.h1<q>"})
CUED = frozenset({"input->a0.h0<v>", "a0.h0->a1.h2<q>"})
BACKED = frozenset({"a1.h2->a2.h1<q>"})
FOUND = frozenset({"a1.h0->a2.h3<q>", "input->a2.h1<k>"})
NONE: frozenset[str] = frozenset()
#: The edges of the circuit that are not above its threshold: by `eap`, by `clean-corrupted`, by
#: `eap-ig-inputs`, by `eap-ig-activations`, the latter two in 5 steps.
MISSED = {
    "chain": (BEFORE_QUERY,) * 4,
    "redundant": (PATHS, NONE, NONE, NONE),
    "redundant, no leak": (NONE,) * 4,
    "redundant, restored": (NONE,) * 4,
    "backup": (CUED | BACKED, CUED | BACKED, BACKED, BACKED),
    "backup, spared": (NONE,) * 4,
    "negative": (FOUND,) * 4,
}
IN_ORDER = ("eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")


@pytest.mark.parametrize("method", METHODS)
@EACH
def test_which_edges_an_estimate_finds(name: str, method: str) -> None:
    circuit, found = planted(name), estimated(name, method)
    above = {edge for edge, value in found.items() if abs(value) > circuit.threshold}
    assert circuit.edges - above == MISSED[name][IN_ORDER.index(method)]
    # Averages over runs tell of the paths of an OR, none of which is worth anything alone.
    told = name == "redundant, no leak" and method != "eap"
    assert above - circuit.edges == (PATHS if told else NONE)


@EACH
def test_an_estimate_is_exact_where_all_that_follows_is_linear(name: str) -> None:
    """The final norm's length is as good as constant, so what is added to the logits is."""
    for method in METHODS:
        for edge, value in estimated(name, method).items():
            if edge.endswith("->logits"):
                assert value == pytest.approx(exact(name)[edge], abs=NOTHING), (method, edge)


@pytest.mark.parametrize("method", ["eap", "clean-corrupted", "eap-ig-inputs"])
@EACH
def test_the_edges_of_a_sender_add_up(name: str, method: str) -> None:
    """To what it changes, times the gradient where it is added: the oracle's own law."""
    edges = oracle(name)
    shares = {"eap": (0.0,), "clean-corrupted": (0.0, 1.0), "eap-ig-inputs": SHARES}[method]
    gradients = [edges.stream_gradients(edges.between(share)) for share in shares]
    sums = dict.fromkeys(edges.stages, 0.0)
    for edge, value in estimated(name, method).items():
        sums[edge.partition("->")[0]] += value
    for sender, (stage, change) in edges.changes.items():
        gradient = sum(each[stage] for each in gradients) / len(gradients)
        found = (change * gradient).sum().item() / len(edges.target.metric) / edges.whole
        assert sums[sender] == pytest.approx(found, abs=NOTHING), sender
