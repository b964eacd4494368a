"""What `edge_patching` gives: a mapping, its tables, files, screens, metrics and words."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    EdgeOutcome,
    Outcome,
    PromptPairs,
    edge_patching,
    per_prompt,
    reads_activations,
)
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import (
    ConfidenceError,
    EdgeError,
    EngineError,
    EngineWarning,
    MetricError,
    NotSweptError,
    OutcomeError,
    StatisticsWarning,
)
from nnpatch_core.site import Site
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers import edge_pairs
from tests.helpers.edge_pairs import EVEN, Pairs, numbers, raw
from tests.helpers.faults import failing_at

pytestmark = [
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
    pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning"),
]

NODES = Nodes((4, 4), (2, 2), (False, False))


@functools.cache
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=2)


def patched(pairs: Pairs = EVEN, **options: Any) -> EdgeOutcome:
    return edge_pairs.patched(model(), pairs, **options)


@functools.cache
def exact() -> EdgeOutcome:
    return patched()


@functools.cache
def estimate() -> EdgeOutcome:
    return patched(method="eap")


# The mapping.


def test_it_is_a_mapping_in_order() -> None:
    edges = exact()
    assert list(edges) == list(NODES) == list(edges.nodes)
    assert edges.nodes == NODES
    assert len(edges) == len(NODES) == 82
    assert dict(edges.items()) == {edge: edges[edge] for edge in edges}
    assert list(edges.values()) == [edges[edge] for edge in edges]
    assert "a0.h1->m1" in edges
    assert edges[" a0.h1 -> m1 "] == edges["a0.h1->m1"]
    for other in ("m1->a0.h1<q>", "a0.h1", "x", 3, None, "a0.h1->m1->m1"):
        assert other not in edges


def test_values_are_normalised() -> None:
    edges = exact()
    before, after = edges.baseline.target.double(), edges.baseline.source.double()
    for number, edge in enumerate(edges):
        expected = (raw(edges)[number] - before).mean() / (after - before).mean()
        assert edges[edge] == pytest.approx(expected.item(), abs=1e-5)
        assert edges.matrix[edges.nodes.place(edge)].item() == pytest.approx(edges[edge])


def test_a_matrix_has_nan_where_there_is_no_edge() -> None:
    assert exact().matrix.shape == (11, 19)
    assert exact().matrix.isnan().equal(~torch.from_numpy(NODES.mask))
    assert exact().exact.equal(torch.from_numpy(NODES.mask))
    # It is a copy.
    exact().matrix.zero_()
    assert exact().matrix.abs().nansum() > 0


@pytest.mark.parametrize("options", [{}, {"method": "eap"}, {"method": "eap-ig-inputs"}])
def test_some_edges_have_the_values_of_all(options: dict[str, Any]) -> None:
    whole = patched(**options)
    some = patched(senders=["m0", "input", "m0"], receivers=["logits", "a1.h1<k>", "m0"], **options)
    assert list(some) == [
        *("input->m0", "input->a1.h1<k>", "input->logits", "m0->a1.h1<k>", "m0->logits"),
    ]
    for edge, value in some.items():
        assert value == pytest.approx(whole[edge], abs=1e-5)
    assert some.matrix.shape == whole.matrix.shape
    assert int((~some.matrix.isnan()).sum()) == 5
    with pytest.raises(EdgeError, match=r"^edge 'm0->m1' was not swept$"):
        some["m0->m1"]
    assert "m0->m1" not in some
    one = patched(senders="a0.h1", receivers="m1", **options)
    assert list(one) == ["a0.h1->m1"]


def test_values_by_position() -> None:
    edges = patched(seq_pos_type="lastk", seq_pos=2, senders=["m0", "input"])
    value = edges["m0->m1"]
    assert value.shape == (6,)
    assert value.isnan().tolist() == [True] * 4 + [False] * 2
    assert edges.matrix.shape == edges.exact.shape == (11, 19, 6)
    assert edges.per_prompt.shape == (11, 19, 6, 3)
    assert len(edges) == 19 + 10
    # It is a copy, too.
    value.zero_()
    assert edges["m0->m1"][-1] != 0


# Tables and words.


def test_repr_and_tables() -> None:
    assert repr(exact()) == "EdgeOutcome(edge, logit_difference: 82 edges, all measured)"
    assert repr(estimate()) == ("EdgeOutcome(edge (eap), logit_difference: 82 edges, 0 measured)")
    top = max(exact(), key=lambda edge: abs(exact()[edge]))
    sender, receiver = top.split("->")
    assert exact().top(1).rows[0]["sender"] == sender
    assert exact().top(1).rows[0]["receiver"] == receiver
    assert f"edge {top}" in str(exact().outcome.stability(3))
    assert sender in exact()._repr_html_()
    assert exact().interval().low.shape == (11, 19)
    assert exact().outcome.sel(receiver="logits").swept("edge").sum() == 11


def test_a_frame_has_a_row_for_each_edge() -> None:
    pytest.importorskip("pandas")
    frame = exact().to_dataframe()
    assert (frame["sender"] + "->" + frame["receiver"]).tolist() == list(exact())
    assert frame["value"].tolist() == pytest.approx(list(exact().values()))
    some = patched(senders="m0", seq_pos_type="each").to_dataframe()
    assert len(some) == 10 * 6
    assert set(some["sender"]) == {"m0"}


def test_info() -> None:
    info = exact().info
    assert info["engine"] == "cone"
    assert info["adapter"] == "Llama3"
    assert json.loads(info["nodes"]) == [[4, 4], [2, 2], [0, 0]]
    assert "fallback" not in info
    assert patched(engine="full", senders="m0").info["engine"] == "full"
    assert estimate().info["engine"] == "gradient"
    kinds = {
        "edge": {},
        "edge (eap)": {"method": "eap"},
        "edge (eap-ig-inputs, 5 steps)": {"method": "eap-ig-inputs"},
        "edge (eap-ig-activations, 2 steps)": {"method": "eap-ig-activations", "steps": 2},
        "edge (ablation mean)": {"ablation": "mean"},
        "edge (ablation zero, eap)": {"ablation": "zero", "method": "eap"},
        "edge, screened by eap": {"method": "eap", "top_k": 1},
    }
    for kind, options in kinds.items():
        assert patched(senders="m0", **options).outcome.kind == kind


def test_a_dearer_engine_is_told() -> None:
    """Where the fast one cannot run."""
    other = tiny_model("llama", num_hidden_layers=2)

    class NoCache(type(other)):
        def forward(self, input_ids: Any, attention_mask: Any = None, **more: Any) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)

    other.__class__ = NoCache
    with pytest.warns(EngineWarning, match="NoCache .* costs about"):
        edges = edge_pairs.patched(other, EVEN, senders="m0")
    assert (edges.info["engine"], "NoCache" in edges.info["fallback"]) == ("full", True)
    torch.testing.assert_close(raw(edges), raw(patched(senders="m0")), rtol=0, atol=1e-5)
    with pytest.raises(EngineError, match="NoCache does not take keys and values"):
        edge_pairs.patched(other, EVEN, senders="m0", engine="cone")


@pytest.mark.parametrize("call", [1, 2])
def test_what_fails_on_the_way_goes_on_in_the_other_engine(
    monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    failing_at(monkeypatch, call, RuntimeError("no such shape"))
    with pytest.warns(EngineWarning, match="no such shape"):
        edges = patched(memory_budget="2 MiB")
    assert "no such shape" in edges.info["fallback"]
    torch.testing.assert_close(raw(edges), raw(exact()), rtol=0, atol=1e-5)


# Files.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "eap", "top_k": 5},
        {"senders": ["m0"], "seq_pos_type": "each"},
        {"metric": ["logit_difference", "kl_divergence"], "method": "eap-ig-inputs"},
    ],
    ids=str,
)
def test_files(tmp_path: Path, options: dict[str, Any]) -> None:
    edges = patched(**options)
    edges.save(tmp_path / "edges")
    loaded = EdgeOutcome.load(tmp_path / "edges")
    assert repr(loaded) == repr(edges)
    assert loaded.nodes == edges.nodes
    assert list(loaded) == list(edges)
    torch.testing.assert_close(loaded.matrix, edges.matrix, equal_nan=True, rtol=0, atol=0)
    assert loaded.exact.equal(edges.exact)
    assert loaded.outcome.screening == edges.outcome.screening
    assert dict(loaded.info) == dict(edges.info)
    for metric in edges.outcome.metrics:
        assert raw(loaded.for_metric(metric), metric).equal(raw(edges, metric))


@pytest.mark.parametrize(
    "nodes",
    [
        None,
        "x",
        "[]",
        "3",
        "[[4, 4], [2, 2]]",
        "[[4, 4], [4, 4], [0, 0]]",
        "[[4, 4], [2, 2], [0, 0, 0]]",
        "[[4, 4, 4], [2, 2, 2], [0, 0, 0]]",
        "[[1000000000], [1000000000], [0]]",
        '[["a", 4], [2, 2], [0, 0]]',
        "[[4, -4], [2, 2], [0, 0]]",
        "[" * 10_000,
    ],
    ids=lambda given: str(given)[:20],
)
def test_files_that_hold_no_edges(tmp_path: Path, nodes: str | None) -> None:
    import attrs

    info = dict(exact().info)
    info.pop("nodes") if nodes is None else info.update(nodes=nodes)
    attrs.evolve(exact().outcome, info=info).save(tmp_path / "other")
    with pytest.raises(OutcomeError, match="holds no edges of a model"):
        EdgeOutcome.load(tmp_path / "other")


def test_files_of_others(tmp_path: Path) -> None:
    from nnpatch_core import Sites, activation_patching

    given = EVEN.arguments()
    sites = activation_patching(model(), None, Sites("mlp"), **given, progress=False)
    sites.save(tmp_path / "sites")
    with pytest.raises(OutcomeError, match="holds no edges of a model"):
        EdgeOutcome.load(tmp_path / "sites")
    # And edges are an outcome as any other.
    exact().save(tmp_path / "edges")
    assert Outcome.load(tmp_path / "edges").kind == "edge"


# Estimates, and screens.


def test_agreement() -> None:
    found = estimate().agreement(exact(), top_k=10)
    assert 0 < found.recall <= 1
    with pytest.raises(OutcomeError, match="must be the outcome of edge_patching"):
        estimate().agreement(exact().outcome)


@pytest.mark.parametrize("method", ["eap", "clean-corrupted", "eap-ig-inputs"])
@pytest.mark.parametrize(("top_k", "spots"), [(1, 0), (10, None), (10, 4), (70, None), (500, 3)])
def test_a_screened_value_is_never_an_estimate(method: str, top_k: int, spots: int | None) -> None:
    screened = patched(method=method, top_k=top_k, spot_checks=spots, seed=7)
    alone, whole = patched(method=method), exact()
    order = sorted(alone, key=lambda edge: -abs(alone[edge]))
    measured = {edge for edge in screened if screened.exact[screened.nodes.place(edge)]}
    count = min(top_k, 82)
    drawn = min(82 - count, count if spots is None else spots)
    assert len(measured) == count + drawn
    # Those at the end may stand in another order, by rounding.
    assert set(order[: max(count - 1, 1)]) <= measured
    for edge, value in screened.items():
        known = whole if edge in measured else alone
        assert value == pytest.approx(known[edge], abs=2e-5), edge
    told = screened.outcome.screening
    assert told is not None
    assert told.by == (method if "-ig-" not in method else f"{method}, 5 steps")
    assert (told.chosen, told.rest, told.checked) == (count, 82 - count, drawn)
    rest = [abs(whole[edge]) for edge in measured - set(order[:count])]
    assert told.largest == pytest.approx(max(rest, default=0), abs=1e-4)
    # What exceeds the largest of the rest, of those that were not measured.
    missed = sum(abs(whole[edge]) > told.largest for edge in set(whole) - measured)
    assert missed <= told.missed_at_most() or drawn == 0
    assert ("exact" in screened.top(3).rows[0]) == (len(measured) < 82)


def test_a_screen_draws_by_its_seed() -> None:
    marks = [
        patched(method="eap", top_k=5, spot_checks=5, seed=seed).exact for seed in (None, 0, 1)
    ]
    assert marks[0].equal(marks[1])
    assert not marks[0].equal(marks[2])


def test_a_screen_at_positions() -> None:
    screened = patched(method="eap", top_k=12, seq_pos_type="each", senders=["m0", "a0.h1"])
    whole = patched(seq_pos_type="each", senders=["m0", "a0.h1"])
    assert screened.exact.shape == (11, 19, 6)
    marked = screened.exact
    assert int(marked.sum()) >= 24
    torch.testing.assert_close(
        screened.matrix[marked], whole.matrix[marked], rtol=0, atol=2e-5, equal_nan=True
    )


# Metrics.


@per_prompt
def bent(logits: Tensor, context: Any) -> Tensor:
    return (logits[:, 3] - logits[:, 4]).tanh() * context.data["weight"]


def compared(logits: Tensor) -> Tensor:
    return logits[:, 3] - 0.5 * logits[:, 3].mean()


DATA = {"metric_data": {"weight": torch.tensor([1.0, -2.0, 0.5])}}
SEVERAL: dict[str, Any] = {"metric": {"logit_difference": "logit_difference", "bent": bent}, **DATA}


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig-activations"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_several_metrics(method: str, batch_size: int | None) -> None:
    both = patched(method=method, batch_size=batch_size, **SEVERAL)
    assert both.outcome.metrics == ("logit_difference", "bent")
    for metric in SEVERAL["metric"]:
        alone = patched(method=method, metric=SEVERAL["metric"][metric], **DATA)
        gap = raw(both, metric) - raw(alone)
        assert gap.abs().max() < 2e-5, metric
        seen = both.for_metric(metric)
        assert seen["m0->logits"] == pytest.approx(alone["m0->logits"], abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"method": "eap"}, {"method": "eap", "top_k": 5}])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_metrics_that_compare_prompts(options: dict[str, Any], batch_size: int) -> None:
    """They wait for all prompts of a cell, whichever ran together."""
    whole = patched(metric=compared, **options)
    parts = patched(metric=compared, batch_size=batch_size, **options)
    # The numbers of an estimate that chose are those of its own unpatched runs.
    assert (raw(parts) - raw(whole)).abs().max() < 2e-5


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "clean-corrupted"])
def test_metrics_that_compare_prompts_have_no_gradient_elsewhere(method: str) -> None:
    with pytest.raises(MetricError, match=r"not declared so: take method='eap' or 'exact'"):
        patched(metric=compared, method=method)


def test_metrics_that_read_activations() -> None:
    @reads_activations([Site.get_site(tiny_api(), "resid", 1, seq_pos=[-1])])
    @per_prompt
    def size(logits: Tensor, context: Any) -> Tensor:
        (found,) = context.activations.values()
        return found.flatten(1).norm(dim=1)

    edges = patched(metric=size, receivers=["logits", "m1"])
    assert max(map(abs, edges.values())) > 0.01
    with pytest.raises(MetricError, match="reads activations"):
        patched(metric=size, method="eap")


def test_a_model_must_prefer_its_answers() -> None:
    with pytest.raises(ConfidenceError, match="not confident"):
        patched(force_model_confidence=True)
    with pytest.raises(MetricError, match="would divide by 0"):
        edge_patching(
            model(), None, *[torch.tensor([[5, 6]])] * 2, torch.tensor([1]), torch.tensor([2])
        )


# Prompts.

WORDS = ("The capital of France Japan Spain is Paris", "Tokyo Madrid red")


def test_pairs_stand_for_all_arguments() -> None:
    tokenizer = tiny_tokenizer([*(f" {words}" for words in WORDS), "The", "red"])
    large = tiny_model("llama", num_hidden_layers=2, vocab_size=len(tokenizer))
    pairs = PromptPairs.from_texts(
        ["The capital of France is", "red The capital of Spain is"],
        ["The capital of Japan is", "red The capital of France is"],
        [" Paris", " Madrid"],
        [" Tokyo", " Paris"],
        tokenizer,
        spans={"country": [("France", "Japan"), ("Spain", "France")]},
    )
    by_pairs = edge_patching(large, None, pairs, progress=False)
    by_hand = edge_patching(large, None, **pairs.arguments(), progress=False)
    assert raw(by_pairs).equal(raw(by_hand))
    assert by_pairs.outcome.tokens is not None
    spans = edge_patching(
        large,
        None,
        pairs,
        seq_pos_type="spans",
        seq_pos=["country"],
        senders=["input", "m0"],
        progress=False,
    )
    # Nothing differs but the country, so that the input is changed there alone.
    for edge in ("input->m0", "input->a1.h0<v>", "input->logits"):
        assert spans[edge].shape == (1,)
        assert spans[edge].item() == pytest.approx(by_pairs[edge], abs=1e-5)


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig-activations"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_any_number_of_prompts(count: int, method: str) -> None:
    """As many as tokens, heads, or the width of one: nothing is taken for something else."""
    sources = [(5, 6 + row, 7, 8) for row in range(count)]
    targets = [(5, 20 + row, 7, 8 + row % 2) for row in range(count)]
    pairs = Pairs(sources, targets, ([1] * count, [2] * count))
    together = patched(pairs, method=method, senders=["a0.h1", "m0"])
    for row in {0, count - 1}:
        alone = patched(pairs.some(row), method=method, senders=["a0.h1", "m0"])
        gap = raw(together)[:, row] - raw(alone)[:, 0]
        assert gap.abs().max() < 2e-5


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig-inputs", "clean-corrupted"])
def test_prompts_of_one_token(method: str) -> None:
    pairs = Pairs([(5,), (7,), (9,)], [(6,), (7,), (3,)], ((1, 1, 1), (2, 2, 2)))
    edges = patched(pairs, method=method)
    for edge, value in numbers(edges).items():
        # Of the pair whose prompts are one: not a bit.
        assert value[1] == edges.baseline.target[1].double()
        if edge.endswith(("<q>", "<k>")):
            # There is one token to attend to.
            assert abs(edges[edge]) < 1e-4
    assert abs(edges["input->logits"]) > 1e-3


def test_where_nothing_differs_nothing_runs() -> None:
    pairs = Pairs([(5, 6, 7), (5, 6, 7)], [(5, 6, 7), (5, 9, 7)], ((1, 1), (2, 2)))
    edges = patched(pairs)
    elided = edges.outcome.elided("edge")
    assert edges.outcome.raw["logit_difference"]["edge"][:, 0].eq(edges.baseline.target[0]).all()
    assert not elided[edges.exact].all()
    by_place = patched(pairs, seq_pos_type="each", senders=["input"])
    # Before they part, too.
    assert by_place.outcome.elided("edge")[0, 0].tolist() == [True, False, True]


def test_names_that_an_outcome_does_not_have() -> None:
    with pytest.raises(NotSweptError):
        exact().outcome["mlp"]
    with pytest.raises(OutcomeError):
        exact().for_metric("kl_divergence")
    with pytest.warns(StatisticsWarning):
        patched(EVEN.some(0)).interval()
