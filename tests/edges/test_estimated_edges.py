"""Estimates of edges: slopes of what is measured, in every family, and the laws that follow."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from nnpatch_core import per_prompt, reads_positions
from nnpatch_core.errors import AdapterWarning
from nnpatch_core.testing import tiny_model
from tests.helpers.edge_derivatives import EdgeDerivatives
from tests.helpers.edge_families import REFUSED, SOURCE, TARGET, model_of
from tests.helpers.edge_models import Drawn, tiny, with_others
from tests.helpers.edge_oracle import WIRINGS
from tests.helpers.edge_pairs import EVEN, Pairs, patched, raw

METHODS = ("eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")
ONE = Pairs([SOURCE], [TARGET], ((1,), (2,)))


def estimated(model: Any, api: Any, pairs: Pairs, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        return patched(model, pairs, api, **options)


def difference(logits: Tensor) -> float:
    return float(logits[1] - logits[2])


@functools.cache
def derivatives(name: str) -> EdgeDerivatives:
    return EdgeDerivatives(copy.deepcopy(model_of(name)[0]), name)


@functools.cache
def edges_of(name: str, method: str) -> Any:
    steps = 2 if "-ig-" in method else None
    return estimated(*model_of(name), ONE, method=method, steps=steps)


def changes(edges: Any) -> dict[str, float]:
    """What each edge changes of the metric."""
    found = raw(edges)[:, 0] - edges.baseline.target[0].double()
    return dict(zip(edges, found.tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(set(WIRINGS) - set(REFUSED)))
def test_an_estimate_is_a_slope(name: str, method: str) -> None:
    oracle, found = derivatives(name), changes(edges_of(name, method))
    assert list(found) == oracle.edges()
    # What is measured and rounded are logits of about this size.
    near = 3e-6 * max(1.0, *map(abs, found.values()))
    for edge in random.Random(method).sample(list(found), 8):
        expected = oracle.estimate(SOURCE, TARGET, edge, difference, method, 2)
        assert found[edge] == pytest.approx(expected, abs=near, rel=1e-5), edge


@pytest.mark.parametrize("name", sorted(set(WIRINGS) - set(REFUSED)))
def test_the_edges_of_a_sender_add_up(name: str) -> None:
    """To its change, times the gradient where that is added."""
    oracle, found = derivatives(name), changes(edges_of(name, "eap"))
    for sender in edges_of(name, "eap").nodes.sender_names:
        own = [change for edge, change in found.items() if edge.startswith(f"{sender}->")]
        expected = oracle.added(SOURCE, TARGET, sender, difference)
        near = 1e-6 * sum(map(abs, own))
        assert sum(own) == pytest.approx(expected, rel=1e-5, abs=near + 1e-6), sender


@per_prompt
def bent(logits: Tensor, _: Any) -> Tensor:
    """Not linear, so that the metric's own gradient counts."""
    return (logits[:, 1] - logits[:, 2]).tanh() + 0.1 * logits[:, 3]


def bent_alone(logits: Tensor) -> float:
    return float((logits[1] - logits[2]).tanh() + 0.1 * logits[3])


@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(tiny())
def test_the_edges_of_a_sender_add_up_in_any_model(
    drawn: Drawn,
) -> None:
    model, api, oracle, pairs = drawn
    # So that rounding is no part of it; experts have a fast way for narrower numbers alone, and in
    # float64 eager attention gives what is no number at padding.
    wide = model.config._attn_implementation == "sdpa"
    if wide:
        model.double().set_experts_implementation("eager")
    edges = estimated(model, api, with_others(pairs), method="eap", metric=bent)
    found = raw(edges) - edges.baseline.target.double()
    senders = edges.outcome.cells["edge"].index[:, 0]
    for number, sender in enumerate(edges.nodes.sender_names):
        for row, (source, target) in enumerate(zip(pairs.sources, pairs.targets, strict=True)):
            own = found[senders == number, row]
            expected = oracle.added(tuple(source), tuple(target), sender, bent_alone)
            near = (1e-6 if wide else 2e-5) * (float(own.abs().sum()) + 1)
            assert float(own.sum()) == pytest.approx(expected, rel=1e-5, abs=near), sender


# Where all is linear, an estimate is what is measured.


class Scaled(nn.Module):
    """A norm whose scale is held."""

    def forward(self, rows: Tensor) -> Tensor:
        return 0.4 * rows


def linear_model() -> Any:
    """Without norms, with attention that looks everywhere alike, and MLPs that are matrices."""
    model = tiny_model("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.input_layernorm = Scaled()
        layer.post_attention_layernorm = nn.Identity()
        layer.mlp = nn.Linear(32, 32).requires_grad_()
        with torch.no_grad():
            layer.self_attn.q_proj.weight.zero_()
            for weight in (layer.mlp.weight, layer.mlp.bias):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    model.model.norm = Scaled()
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_where_all_is_linear_an_estimate_is_exact(method: str) -> None:
    model = linear_model()
    exact, estimate = (patched(model, EVEN, method=each) for each in ("exact", method))
    gap = (raw(exact) - raw(estimate)).abs().max()
    assert gap < 1e-4 * (raw(exact) - exact.baseline.target).abs().max()
    # Not because nothing would move: all but what queries and keys read.
    still = [edge for edge, value in exact.items() if abs(value) < 1e-6]
    assert all(edge.endswith(("<q>", "<k>")) for edge in still)
    assert len(still) < len(exact) / 2 + 10


def test_into_values_estimates_are_exact_without_norms() -> None:
    """In the last layer, where attention's pattern is the target run's, and no MLP follows."""
    model = tiny_model("llama", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.input_layernorm = nn.Identity()
    last = model.model.layers[1]
    last.mlp = nn.Linear(32, 32, bias=False).requires_grad_()
    last.post_attention_layernorm, model.model.norm = nn.Identity(), nn.Identity()
    receivers = [f"a1.h{head}<v>" for head in range(2)]
    exact, estimate = (
        patched(model.eval(), EVEN, method=method, receivers=receivers)
        for method in ("exact", "eap")
    )
    effects = (raw(exact) - exact.baseline.target).abs().max()
    assert (raw(exact) - raw(estimate)).abs().max() < 1e-4 * effects
    # With the norm they are not.
    bent_model = tiny_model("llama", num_hidden_layers=2)
    exact, estimate = (
        patched(bent_model, EVEN, method=method, receivers=receivers) for method in ("exact", "eap")
    )
    effects = (raw(exact) - exact.baseline.target).abs().max()
    assert (raw(exact) - raw(estimate)).abs().max() > 0.01 * effects


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite", "mixtral"])
def test_direct_effects_add_up(family: str) -> None:
    """Where heads are added as they are, and the last norm's scale is held."""
    model, api = model_of(family)
    model = copy.deepcopy(model)
    (model.gpt_neox if family == "gpt_neox" else model.model).__setattr__(
        "final_layer_norm" if family == "gpt_neox" else "norm", Scaled()
    )
    edges = estimated(model, api, EVEN, receivers="logits")
    changed = raw(edges) - edges.baseline.target
    whole = edges.baseline.source - edges.baseline.target
    torch.testing.assert_close(changed.sum(0), whole.double(), rtol=1e-4, atol=1e-4)
    assert sum(edges.values()) == pytest.approx(1, abs=1e-4)


def test_with_norms_after_attention_they_need_not() -> None:
    model, api = model_of("gemma2")
    model = copy.deepcopy(model)
    model.model.norm = Scaled()
    model.config.final_logit_softcapping = None
    edges = estimated(model, api, EVEN, receivers="logits")
    assert abs(sum(edges.values()) - 1) > 1e-3


# Metrics.


def test_a_metric_reads_other_positions() -> None:
    """The logits behind any token are those of the prompt that ends there."""

    @reads_positions([-2])
    @per_prompt
    def before(logits: Tensor, _: Any) -> Tensor:
        flat = logits.reshape(len(logits), -1)
        return flat[:, 1] - flat[:, 2]

    model, api = model_of("gemma2")
    oracle = derivatives("gemma2")
    for method in ("exact", *METHODS):
        steps = 2 if "-ig-" in method else None
        edges = estimated(model, api, EVEN, method=method, metric=before, steps=steps)
        found = raw(edges)
        for number, edge in enumerate(edges):
            if number % 9:
                continue
            for row in range(3):
                source, target = EVEN.sources[row][:-1], EVEN.targets[row][:-1]
                if method == "exact":
                    expected = difference(oracle.edge(source, target, *edge.split("->")))
                else:
                    slope = oracle.estimate(source, target, edge, difference, method, 2)
                    expected = slope + edges.baseline.target[row].item()
                assert found[number, row].item() == pytest.approx(expected, abs=3e-5), edge


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "cohere", "gpt2", "falcon"])
def test_metrics_of_several_tokens_see_the_last_layer_whole(name: str, engine: str) -> None:
    """In it the MLP may run for the last token alone, unless a metric reads others."""

    @reads_positions([-4, -3, -1])
    @per_prompt
    def several(logits: Tensor, _: Any) -> Tensor:
        return logits[:, 0, 1] - 2 * logits[:, 1, 2] + logits[:, 2, 3]

    model, api = model_of(name)
    edges = estimated(model, api, EVEN, metric=several, engine=engine)
    assert edges.info["engine"] == engine
    oracle = derivatives(name)
    for number, edge in enumerate(edges):
        if number % 11:
            continue
        for row in range(3):
            source, target = EVEN.sources[row], EVEN.targets[row]
            ends = (len(target) - 3, len(target) - 2, len(target))
            parts = [oracle.edge(source[:end], target[:end], *edge.split("->")) for end in ends]
            expected = parts[0][1] - 2 * parts[1][2] + parts[2][3]
            assert raw(edges)[number, row].item() == pytest.approx(float(expected), abs=5e-5), edge
