"""Circuits of many families, run, against plain hooks that share no code with nnpatch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import reads_tokens
from nnpatch_core.circuits import Circuit, evaluate_circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import AdapterWarning, PromptWarning
from tests.edges.test_exact_edges import REFUSED, model_of
from tests.helpers.edge_oracle import WIRINGS, EdgeOracle, oracle_of
from tests.helpers.family_oracle import Prompt

#: Pairs of one length each; the second is longer, beside which the first is padded.
PAIRS = (
    ((3, 9, 4, 17, 5, 8), (3, 9, 21, 17, 30, 8)),
    ((7, 7, 12, 3, 9, 40, 2, 11), (7, 7, 12, 3, 8, 40, 6, 11)),
)
#: Another prompt, whose activations are put outside of a circuit; as long as the first ones.
DONOR = (14, 2, 33, 9, 1, 25)
DENSITIES = (0.1, 0.4, 0.8, 0.95)
LOGITS = (1, 2, 14)
NEAR = {"rtol": 0, "atol": 2e-5}
#: What is outside, and the arguments that say so.
OUTSIDE: dict[str, dict[str, Any]] = {
    "target": {},
    "zero": {"ablation": "zero"},
    "mean": {"ablation": "mean"},
    "mean per position": {"ablation": "mean", "per_position": True},
    "another prompt": {"ablation": "resample", "reference": torch.tensor([DONOR])},
}


def logit(token: int) -> Any:
    """A metric that is one logit of each prompt."""

    @reads_tokens(lambda context: torch.tensor([token]))
    def metric(logits: Tensor, _: Any) -> Tensor:
        return logits[:, token]

    return metric


@functools.cache
def subject(name: str) -> tuple[Any, Any, EdgeOracle]:
    model, api = model_of(name)
    return model, api, oracle_of(model, name)


def drawn(oracle: EdgeOracle, densities: Sequence[float]) -> list[list[str]]:
    """Circuits that have each edge with some probability."""
    draw = torch.Generator().manual_seed(0)
    edges = oracle.edges()
    found = []
    for share in densities:
        chosen = torch.rand(len(edges), generator=draw) < share
        found.append([edge for edge, own in zip(edges, chosen.tolist(), strict=True) if own])
    return found


def measured(
    name: str, circuits: Sequence[Sequence[str]], pairs: Sequence[Any], **options: Any
) -> Tensor:
    """`[circuits, pairs, LOGITS]`, by nnpatch; shorter prompts are padded on their left."""
    model, api, oracle = subject(name)
    width = max(len(source) for source, _ in pairs)
    spare = [width - len(source) for source, _ in pairs]
    tokens = [
        torch.tensor([[0] * n + [*pair[side]] for n, pair in zip(spare, pairs, strict=True)])
        for side in (0, 1)
    ]
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in spare])
    answers = [torch.tensor([each] * len(pairs)) for each in (1, 2)]
    nodes = nodes_of(oracle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        warnings.simplefilter("ignore", PromptWarning)
        found = evaluate_circuit(
            model,
            api,
            [Circuit.of(nodes, edges) for edges in circuits],
            *tokens,
            *answers,
            attention_mask=mask,
            metric={f"logit {token}": logit(token) for token in LOGITS},
            progress=False,
            **options,
        )
    raw = [found.outcome.raw[f"logit {token}"]["circuit"] for token in LOGITS]
    return torch.stack(raw, -1)


def nodes_of(oracle: EdgeOracle) -> Nodes:
    layers = range(len(oracle.layers))
    return Nodes(
        [len(oracle.heads("q", layer)) for layer in layers],
        [len(oracle.heads("k", layer)) for layer in layers],
        [oracle.wirings[layer].parallel for layer in layers],
    )


def outside(name: str, pairs: Sequence[Any], what: str) -> Any:
    """For each pair what the oracle takes as the value of what is outside."""
    oracle = subject(name)[2]
    targets = [target for _, target in pairs]

    def one(prompt: Prompt, sender: Any) -> Tensor:
        """`[seq, columns]`."""
        found = oracle.activation(prompt, *oracle._place(sender))
        return found[:, oracle._columns(sender)]

    def of(target: Prompt) -> Any:
        def value(sender: Any) -> Tensor:
            own = one(target, sender)
            if what == "mean":
                return torch.cat([one(each, sender) for each in targets]).mean(0)[None]
            if what == "another prompt":
                mixed = own.clone()
                mixed[-len(DONOR) :] = one(DONOR, sender)
                return mixed
            found: list[torch.Tensor] = []
            for back in range(1, len(target) + 1):
                rows = [one(each, sender)[-back] for each in targets if len(each) >= back]
                found.insert(0, torch.stack(rows).mean(0))
            return torch.stack(found)

        return what if what in ("target", "zero") else value

    return [of(target) for target in targets]


def expected(
    name: str, circuits: Sequence[Sequence[str]], pairs: Sequence[Any], what: str = "target"
) -> Tensor:
    """The same, by the oracle: each prompt alone."""
    oracle = subject(name)[2]
    values = outside(name, pairs, what)
    rows = [
        torch.stack(
            [
                oracle.circuit(*pair, edges, value=value)[list(LOGITS)].float()
                for pair, value in zip(pairs, values, strict=True)
            ]
        )
        for edges in circuits
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("name", sorted(set(WIRINGS) - set(REFUSED)))
@pytest.mark.parametrize("padded", [False, True])
def test_circuits_equal_plain_hooks(name: str, padded: bool) -> None:
    """Several together, outside of which the target run is, or zeros."""
    pairs = PAIRS if padded else PAIRS[:1]
    circuits = drawn(subject(name)[2], DENSITIES)
    for what in ("target", "zero"):
        found = measured(name, circuits, pairs, **OUTSIDE[what])
        torch.testing.assert_close(found, expected(name, circuits, pairs, what), **NEAR, msg=what)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox", "granite", "llama", "mistral"])
@pytest.mark.parametrize("what", OUTSIDE)
def test_whatever_is_outside_and_however_it_is_cut(name: str, what: str) -> None:
    circuits = drawn(subject(name)[2], DENSITIES)
    wanted = expected(name, circuits, PAIRS, what)
    for cut in ({}, {"batch_size": 1}, {"memory_budget": "300 KiB"}):
        found = measured(name, circuits, PAIRS, **OUTSIDE[what], **cut)
        torch.testing.assert_close(found, wanted, **NEAR, msg=f"{cut}")
    for circuit, own in zip(circuits, wanted, strict=True):
        found = measured(name, [circuit], PAIRS, **OUTSIDE[what])
        torch.testing.assert_close(found[0], own, **NEAR)


@pytest.mark.parametrize("name", ["gemma2", "llama", "mixtral"])
def test_wherever_the_prompts_differ(name: str) -> None:
    """In the first token, in the last one alone, or in all; and where they are one prompt."""
    pairs = [
        ((5, 9, 4, 17), (2, 9, 4, 17)),
        ((5, 9, 4, 17), (5, 9, 4, 30)),
        ((5, 9, 4, 17), (2, 7, 30, 8)),
        ((5, 9, 4, 17), (5, 9, 4, 17)),
    ]
    circuits = drawn(subject(name)[2], DENSITIES)
    wanted = expected(name, circuits, pairs)
    for some in ([0, 3], [1], [1, 3], [2, 1], [0, 1, 2, 3]):
        found = measured(name, circuits, [pairs[number] for number in some])
        torch.testing.assert_close(found, wanted[:, some], **NEAR, msg=f"pairs {some}")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_one_token(name: str) -> None:
    circuits = drawn(subject(name)[2], DENSITIES)
    pairs = [((5,), (9,)), ((3,), (7,))]
    for some in (pairs, pairs[:1]):
        found = measured(name, circuits, some)
        torch.testing.assert_close(found, expected(name, circuits, some), **NEAR)


def test_a_circuit_runs_on_the_target_prompts_when_they_are_swapped() -> None:
    circuits = drawn(subject("llama")[2], DENSITIES)
    swapped = [pair[::-1] for pair in PAIRS]
    found = measured("llama", circuits, PAIRS, swap=True)
    torch.testing.assert_close(found, expected("llama", circuits, swapped), **NEAR)
