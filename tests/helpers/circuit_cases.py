"""Circuits of tiny models of many families, drawn, run and measured."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core import reads_tokens
from nnpatch_core.circuits import Circuit, evaluate_circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import AdapterWarning, PromptWarning
from tests.helpers.edge_families import model_of
from tests.helpers.edge_oracle import EdgeOracle, oracle_of

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
