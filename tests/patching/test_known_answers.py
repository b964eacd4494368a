"""Sets of answers and whole answers come along with the pairs, and are not silently cut."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    compares_answers,
    per_prompt,
)
from nnpatch_core.errors import AnswerWarning, ConfidenceError, MetricError
from nnpatch_core.metrics import answer_sets
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer, traces

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
TOKENIZER = tiny_tokenizer([FRANCE, JAPAN, " Paris Lyon Nice Tokyo Kyoto Phnom Penh"])
SITES = Sites(["attn", "resid"], layers=[0, 1], seq_pos_type="lastk", seq_pos=2)
DIFFERENCE = "sequence_log_probability_difference"

ENTRIES: dict[str, Any] = {
    "activation": activation_patching,
    "screen": functools.partial(activation_patching, screen="attribution", top_k=3),
    "attribution": attribution_patching,
    "ablation": ablation_patching,
    "estimated ablation": functools.partial(attribution_patching, ablation="zero"),
}
entries = pytest.mark.parametrize("entry", ENTRIES)


@functools.cache
def sets() -> PromptPairs:
    source, target = [[" Paris", " Lyon"], [" Nice"]], [[" Tokyo"], [" Kyoto", " Tokyo", " Phnom"]]
    return PromptPairs.from_texts([FRANCE] * 2, [JAPAN] * 2, source, target, TOKENIZER)


@functools.cache
def whole() -> PromptPairs:
    source, target = [" Paris", " Phnom Penh"], [" Tokyo Kyoto Tokyo", " Nice"]
    texts = [FRANCE] * 2, [JAPAN] * 2
    return PromptPairs.from_texts(*texts, source, target, TOKENIZER, multi_token="all")


def sweep(entry: str, pairs: PromptPairs, metric: Any = "logit_difference", **options: Any) -> Any:
    patch = ENTRIES[entry]
    return patch(tiny_model(), tiny_api(), SITES, pairs, metric=metric, progress=False, **options)


def by_arguments(entry: str, pairs: PromptPairs, metric: Any, data: Mapping[str, Tensor]) -> Any:
    """The same, from the arguments taken apart, with data of one's own."""
    if entry == "ablation":
        given: dict[str, Any] = {**pairs.ablation_arguments()}
    else:
        given = {**pairs.arguments()}
    if entry == "estimated ablation":
        given["target_tokens"] = given["source_tokens"]
        given["target_attention_mask"] = given.pop("source_attention_mask")
        given["source_tokens"] = None
    return ENTRIES[entry](
        tiny_model(), tiny_api(), SITES, **given, metric=metric, metric_data=data, progress=False
    )


def assert_same(found: Any, expected: Any) -> None:
    assert torch.equal(found.baseline.target, expected.baseline.target)
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert found[name].abs().max() > 0


METRICS: dict[str, tuple[Any, Any, tuple[str, str]]] = {
    "sets": (sets, "answer_set_difference", ("source_answers", "target_answers")),
    "mean of sets": (sets, answer_sets("mean"), ("source_answers", "target_answers")),
    "whole": (whole, DIFFERENCE, ("source_answer_tokens", "target_answer_tokens")),
    "one": (
        whole,
        "sequence_log_probability",
        ("source_answer_tokens", "target_answer_tokens"),
    ),
}


@entries
@pytest.mark.parametrize("kind", METRICS)
def test_metrics_take_answers_from_the_pairs(entry: str, kind: str) -> None:
    make, metric, names = METRICS[kind]
    pairs: PromptPairs = make()
    fields = ("source_answer_sets", "target_answer_sets") if make is sets else names
    data = {name: getattr(pairs, field) for name, field in zip(names, fields, strict=True)}
    assert list(pairs.metric_data) == list(names)
    assert_same(sweep(entry, pairs, metric), by_arguments(entry, pairs, metric, data))
    assert_same(sweep(entry, pairs, metric), by_arguments(entry, pairs, metric, pairs.metric_data))


def test_numbers_are_those_of_plain_logits() -> None:
    pairs, model = sets(), tiny_model()
    out = sweep("activation", pairs, "answer_set_difference")
    with torch.no_grad():
        logits = model(pairs.source_tokens).logits[:, -1]
    expected = [
        row[right].logsumexp(0) - row[wrong].logsumexp(0)
        for row, right, wrong in zip(
            logits,
            [[token(" Paris"), token(" Lyon")], [token(" Nice")]],
            [[token(" Tokyo")], [token(" Kyoto"), token(" Tokyo"), token(" Phnom")]],
            strict=True,
        )
    ]
    torch.testing.assert_close(out.baseline.source, torch.stack(expected), atol=1e-5, rtol=0)


def token(word: str) -> int:
    found: int = TOKENIZER(word, add_special_tokens=False)["input_ids"][0]
    return found


def test_what_is_passed_comes_before_what_the_pairs_bring() -> None:
    pairs = sets()
    own = {"source_answers": pairs.source_answer_index[:, None]}
    metric = "answer_set_difference"
    found = sweep("activation", pairs, metric, metric_data=own)
    data = {**pairs.metric_data, **own}
    assert_same(found, by_arguments("activation", pairs, metric, data))
    assert not torch.equal(found["resid"], sweep("activation", pairs, metric)["resid"])


SHORT: dict[str, tuple[Any, Any, str]] = {
    "sets": (
        sets,
        "logit_difference",
        "metric 'logit_difference' sees the first answer of each set alone, and these pairs have "
        "sets of up to 3 answers: pass metric='answer_set_difference' to measure them whole",
    ),
    "whole": (
        whole,
        ["kl_divergence", "logit_difference"],
        "metric 'logit_difference' sees the first token of each answer alone, and these pairs have "
        "answers of up to 3 tokens: pass metric='sequence_log_probability_difference' to measure "
        "them whole",
    ),
    "probabilities": (
        whole,
        {"p": "answer_probability", "log p": "answer_log_probability"},
        "metrics 'p', 'log p' see the first token of each answer alone, and these pairs have "
        "answers of up to 3 tokens: pass metric='sequence_log_probability' to measure them whole",
    ),
}


@entries
@pytest.mark.parametrize("case", SHORT)
def test_a_metric_of_first_tokens_says_so(entry: str, case: str) -> None:
    make, metric, told = SHORT[case]
    if entry == "estimated ablation" and "kl_divergence" in metric:
        metric = "logit_difference"  # The other has no gradient there.
    with pytest.warns(AnswerWarning) as caught:
        sweep(entry, make(), metric)
    assert [str(each.message) for each in caught] == [told]
    assert caught[0].filename == __file__


def test_a_comparing_metric_of_ones_own_says_so() -> None:
    @compares_answers
    @per_prompt
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        return logits.gather(1, context.source_answer_index[:, None])[:, 0]

    with pytest.warns(AnswerWarning, match="'mine' sees the first answer of each set"):
        sweep("activation", sets(), mine)


def test_confidence_is_judged_by_first_tokens_and_says_so() -> None:
    pairs = whole()
    logits = tiny_model()(pairs.source_tokens[:1]).logits[0, -1]
    known = logits[: len(TOKENIZER)]
    best, worst = int(known.argmax()), int(known.argmin())
    pairs = PromptPairs.from_texts([FRANCE], [JAPAN], [[best, 3]], [[worst]], TOKENIZER)
    metric, options = "answer_set_difference", {"force_model_confidence": True}
    with (
        pytest.warns(AnswerWarning, match="force_model_confidence=True sees the first answer"),
        pytest.raises(ConfidenceError),
    ):
        sweep("activation", pairs.swapped(), metric, **options)


@entries
def test_nothing_is_said_where_nothing_is_left_out(entry: str) -> None:
    """Warnings are errors here."""
    one = PromptPairs.from_texts([FRANCE], [JAPAN], [[" Paris"]], [[" Tokyo"]], TOKENIZER)
    sweep(entry, one)
    texts = [FRANCE], [JAPAN], [" Paris"], [" Tokyo"]
    sweep(entry, PromptPairs.from_texts(*texts, TOKENIZER, multi_token="all"))
    # The logit difference beside what measures the answers whole is meant so.
    sweep(entry, sets(), ["logit_difference", "answer_set_difference"])
    sweep(entry, whole(), [DIFFERENCE, "answer_probability"])


def test_a_metric_of_no_answers_needs_no_word() -> None:
    sweep("activation", sets(), ["kl_divergence", "loss"])


def test_the_warning_comes_before_a_run() -> None:
    model = NNsight(tiny_model())
    with traces(model) as ran, pytest.raises(AnswerWarning):
        activation_patching(model, tiny_api(), SITES, sets(), progress=False)
    assert not ran


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("answer_set_difference", "a PromptPairs brings it that has lists of answers"),
        (DIFFERENCE, "a PromptPairs brings it that was made with multi_token='all'"),
    ],
)
def test_pairs_that_bring_nothing(metric: str, told: str) -> None:
    pairs = PromptPairs.from_texts([FRANCE], [JAPAN], [" Paris"], [" Tokyo"], TOKENIZER)
    assert pairs.metric_data == {}
    with pytest.raises(MetricError, match=told):
        sweep("activation", pairs, metric)


def test_some_of_the_pairs_bring_their_own() -> None:
    found = sets()[[1]].metric_data
    assert found["source_answers"].tolist() == [[token(" Nice")]]
    assert found["target_answers"].shape == (1, 3)
    assert torch.equal(sets().swapped().metric_data["source_answers"], sets().target_answer_sets)
