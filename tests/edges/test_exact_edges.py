"""Edges of many families, measured, against plain hooks that share no code with nnpatch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpatch_core import edge_patching, reads_tokens
from nnpatch_core.errors import AdapterWarning
from tests.helpers.edge_families import REFUSED, SOURCE, TARGET, model_of
from tests.helpers.edge_models import Drawn, tiny, with_others
from tests.helpers.edge_oracle import WIRINGS, EdgeOracle, oracle_of
from tests.helpers.edge_pairs import from_oracle, numbers, patched

#: Of each family so many edges, drawn at random.
DRAWN = 200
NEAR = {"rtol": 0, "atol": 2e-5}
sizes = st.sampled_from([None, 1, 2])


def _logit(token: int) -> Any:
    @reads_tokens(lambda context: torch.tensor([token]))
    def metric(logits: torch.Tensor, _: Any) -> torch.Tensor:
        return logits[:, token]

    return metric


def _sampled(oracle: EdgeOracle, count: int) -> list[str]:
    edges, draw = oracle.edges(), torch.Generator().manual_seed(0)
    order = torch.randperm(len(edges), generator=draw)[:count]
    return [edges[number] for number in order.tolist()]


@pytest.mark.parametrize("name", sorted(set(WIRINGS) - set(REFUSED)))
@pytest.mark.parametrize("padded", [False, True])
def test_edges_equal_plain_hooks(name: str, padded: bool) -> None:
    model, api = model_of(name)
    oracle = oracle_of(model, name)
    tokens = [torch.tensor([each]) for each in (SOURCE, TARGET)]
    masks: dict[str, Any] = {}
    if padded:
        # A second, longer pair beside it: the first one gets padding on its left.
        longer = ((7, 7, 12, 3, 9, 40, 2, 11), (7, 7, 12, 3, 8, 40, 6, 11))
        tokens = [
            torch.tensor([[0, 0, *short], long])
            for short, long in zip((SOURCE, TARGET), longer, strict=True)
        ]
        masks = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])}
    answers = torch.tensor([1] * len(tokens[0])), torch.tensor([2] * len(tokens[0]))
    metrics = {f"logit {token}": _logit(token) for token in (1, 2, 14)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        edges = edge_patching(
            model, api, *tokens, *answers, metric=metrics, progress=False, **masks
        )
    assert list(edges) == oracle.edges()
    measured = {
        metric: edges.outcome.for_metric(metric).raw[metric]["edge"][:, 0] for metric in metrics
    }
    numbers = {edge: number for number, edge in enumerate(edges)}
    for edge in _sampled(oracle, 40 if padded else DRAWN):
        expected = oracle.edge(SOURCE, TARGET, *edge.split("->"))
        found = torch.stack([measured[f"logit {token}"][numbers[edge]] for token in (1, 2, 14)])
        torch.testing.assert_close(found, expected[[1, 2, 14]].float(), **NEAR, msg=edge)


@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(tiny(), st.data())
def test_edges_of_any_model(drawn: Drawn, data: Any) -> None:
    """With any numbers of layers, heads, prompts and tokens; some that are one prompt twice."""
    model, api, oracle, pairs = drawn
    engine = data.draw(st.sampled_from(["cone", "full"]))
    edges = patched(model, with_others(pairs), api, engine=engine, batch_size=data.draw(sizes))
    assert list(edges) == oracle.edges()
    assert edges.info["engine"] == engine
    found = numbers(edges)
    for edge in data.draw(st.lists(st.sampled_from(list(edges)), min_size=8, max_size=8)):
        expected = [from_oracle(oracle, pairs, edge, row) for row in range(len(pairs.targets))]
        assert found[edge].tolist()[:-1] == pytest.approx(expected, abs=3e-5), edge
