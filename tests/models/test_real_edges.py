"""Edges of real weights, against plain hooks: random edges, and a circuit."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from nnpatch_core import Circuit, PromptPairs, edge_patching, evaluate_circuit
from tests.helpers.edge_oracle import EdgeOracle
from tests.models.real import Real, gemma3_270m, smollm2_135m

#: On logit differences of up to 20.
ATOL = 1e-4
SOURCE = "When Mary and John went to the store, John gave a drink to"
TARGET = "When Mary and John went to the store, Mary gave a drink to"
ANSWERS = (" Mary", " John")
FAMILIES = {"SmolLM2": "llama", "Gemma 3": "gemma3_text"}
MODELS = {"SmolLM2": smollm2_135m, "Gemma 3": gemma3_270m}
#: So many edges, drawn among those between a few nodes.
DRAWN, NODES = 200, 24


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> Iterator[tuple[Real, EdgeOracle]]:
    """One model after the other, so that they are not in memory together."""
    real = MODELS[request.param]()
    yield real, EdgeOracle(real.model, FAMILIES[request.param])
    gc.collect()


def _pairs(real: Real) -> tuple[PromptPairs, tuple[tuple[int, ...], ...]]:
    pairs = PromptPairs.from_texts([SOURCE], [TARGET], [ANSWERS[0]], [ANSWERS[1]], real.tokenizer)
    prompts = tuple(
        tuple(tokens[0].tolist()) for tokens in (pairs.source_tokens, pairs.target_tokens)
    )
    return pairs, prompts


def _difference(pairs: PromptPairs, logits: torch.Tensor) -> float:
    one, other = pairs.source_answer_index, pairs.target_answer_index
    return float(logits[one] - logits[other])


def test_edges_equal_plain_hooks(known: tuple[Real, EdgeOracle]) -> None:
    real, oracle = known
    pairs, (source, target) = _pairs(real)
    draw = torch.Generator().manual_seed(0)
    every = oracle.edges()
    ends = [dict.fromkeys(edge.split("->")[end] for edge in every) for end in (0, 1)]
    senders, receivers = (
        [[*names][number] for number in torch.randperm(len(names), generator=draw)[:NODES].tolist()]
        for names in ends
    )
    edges = edge_patching(
        real.model,
        real.api,
        pairs,
        senders=["input", *senders],
        receivers=[*receivers, "logits"],
        progress=False,
    )
    measured = dict(zip(edges, edges.outcome.raw["logit_difference"]["edge"][:, 0], strict=True))
    chosen = [*measured]
    order = torch.randperm(len(chosen), generator=draw)[:DRAWN].tolist()
    assert len(order) >= min(DRAWN, len(chosen))
    for edge in (chosen[number] for number in order):
        logits = oracle.edge(source, target, *edge.split("->"))
        assert float(measured[edge]) == pytest.approx(_difference(pairs, logits), abs=ATOL), edge


def test_a_circuit_equals_plain_hooks(known: tuple[Real, EdgeOracle]) -> None:
    real, oracle = known
    pairs, (source, target) = _pairs(real)
    edges = edge_patching(real.model, real.api, pairs, method="eap", progress=False)
    circuit = Circuit.from_edges(edges, n=60, method="greedy")
    found = evaluate_circuit(real.model, real.api, circuit, pairs, progress=False)
    expected = _difference(pairs, oracle.circuit(source, target, [*circuit]))
    assert float(found.raw[0]) == pytest.approx(expected, abs=ATOL)
