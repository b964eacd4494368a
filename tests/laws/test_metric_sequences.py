"""Metrics of whole answers, against sums over single steps by plain hooks.

An answer's log-probability is the sum over its tokens of log p(token | prompt, answer before it):
one plain forward for each token, of the prompt and what of the answer stands before that token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import (
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    infer_adapter,
)
from nnpatch_core.errors import MetricError, TokensError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer, traces
from tests.helpers.counted import Counted
from tests.helpers.measured import (
    ANSWERS,
    BATCH,
    DATA,
    EVERY,
    METRICS,
    SITES,
    SOURCES,
    TARGETS,
    WIDTH,
    laid,
    oracle,
    patched_rows,
    places_of,
    run,
)
from tests.helpers.oracle import Place, Prompt

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

Answers = Sequence[tuple[int, ...]]
OWN: Answers = [(21, 22, 23), (31,), (41, 42), (17, 18, 19)]
OTHER: Answers = [(24,), (33, 34, 35, 36), (43, 44), (28, 29)]
SEQUENCE, DIFFERENCE = "sequence_log_probability", "sequence_log_probability_difference"
GAP = 5e-5


def filled(answers: Answers, spare: int = 0) -> Tensor:
    """`[batch, n]`, filled with -1."""
    width = max(map(len, answers)) + spare
    return torch.tensor([[*each, *[-1] * (width - len(each))] for each in answers])


TOKENS = {"source_answer_tokens": filled(OWN), "target_answer_tokens": filled(OTHER)}
#: What `ablation_patching` calls them.
NAMES = {"source_answer_tokens": "answer_tokens", "target_answer_tokens": "other_answer_tokens"}


@functools.cache
def step(entry: str, row: int, place: Place | None, before: Prompt) -> Tensor:
    """`[vocab]`, log-probabilities after a patched prompt and the tokens that follow it."""
    target, known = TARGETS[row] + before, oracle()
    if entry == "source":
        return known.logits(SOURCES[row] + before).double().log_softmax(-1)
    if place is None:
        return known.logits(target).double().log_softmax(-1)
    donor = {
        "activation": known.of_prompt(SOURCES[row] + before),
        "zero": known.zeros,
        "mean": known.mean(TARGETS),
    }[entry]
    if len(before) + place.from_end[0] > len(target):
        return known.logits(target).double().log_softmax(-1)
    # Positions count from the prompt's end, which the answer's tokens stand behind.
    moved = place._replace(from_end=tuple(back + len(before) for back in place.from_end))
    return known.replaced(target, [moved], donor).double().log_softmax(-1)


def sums(entry: str, place: Place | None, answers: Answers) -> Tensor:
    """`[batch]`: the log-probability of each answer."""
    return torch.stack(
        [
            torch.stack(
                [step(entry, row, place, answer[:n])[answer[n]] for n in range(len(answer))]
            ).sum()
            for row, answer in enumerate(answers)
        ]
    )


def expected(name: str, entry: str, place: Place | None) -> Tensor:
    own = sums(entry, place, OWN)
    return own if name == SEQUENCE else own - sums(entry, place, OTHER)


def swept(entry: str, **options: Any) -> Any:
    tokens = options.pop("tokens", TOKENS)
    if entry in ("zero", "mean"):
        tokens = {NAMES[name]: value for name, value in tokens.items()}
    return run(entry, **tokens, **options)


def check(out: Any, entry: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in (SEQUENCE, DIFFERENCE):
            for site, number, place in places_of(out):
                plain = METRICS[name][1](patched_rows(entry, place)).float()
                assert (out.raw[name][site][number].float() - plain).abs().max() < GAP
            continue
        baseline = out.for_metric(name).baseline
        assert (baseline.target - expected(name, entry, None)).abs().max() < GAP
        if entry == "activation":
            assert (baseline.source - expected(name, "source", None)).abs().max() < GAP
        for site, number, place in places_of(out):
            gap = out.raw[name][site][number].double() - expected(name, entry, place)
            assert gap.abs().max() < GAP, (name, place, gap)


FEW = Sites(["q", "resid"], layers=[1, 2], seq_pos_type="lastk", seq_pos=3)
CHUNKINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"batch_size": 1},
    "three": {"batch_size": 3},
    "small": {"memory_budget": "1 MiB"},
}


@pytest.mark.parametrize("entry", ["activation", "zero", "mean"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", [SEQUENCE, DIFFERENCE])
def test_the_sum_over_single_steps(engine: str, chunking: str, entry: str, name: str) -> None:
    out = swept(entry, metric=name, engine=engine, sites=FEW, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, entry, [name])


@settings(max_examples=25)
@given(
    names=st.lists(
        st.sampled_from(["loss", "below_mean", "ranked", "weighted", "logit_difference"]),
        max_size=3,
        unique=True,
    ),
    entry=st.sampled_from(["activation", "zero", "screened"]),
    whole=st.sampled_from([[SEQUENCE], [DIFFERENCE], [DIFFERENCE, SEQUENCE]]),
    engine=st.sampled_from(["cone", "full"]),
    batch_size=st.integers(1, 2 * BATCH),
)
def test_beside_other_metrics(
    names: list[str], entry: str, whole: list[str], engine: str, batch_size: int
) -> None:
    """Others see the prompt alone, and each prompt once."""
    if entry == "screened":
        names = [name for name in names if name != "ranked"]
    metrics: dict[str, Any] = {name: EVERY[name] for name in names} | {each: each for each in whole}
    out = swept(entry, metric=metrics, engine=engine, batch_size=batch_size, sites=FEW)
    check(out, "activation" if entry == "screened" else entry, [*metrics])


def test_an_answer_is_no_column_and_is_never_patched() -> None:
    for kind, sites in {
        "all": Sites("resid", seq_pos_type=None),
        "each": Sites("resid", seq_pos_type="each"),
        "last": Sites("resid", seq_pos_type="last"),
    }.items():
        out = swept("activation", metric=[SEQUENCE, "logit_difference"], sites=sites)
        alone = run("activation", metric="logit_difference", sites=sites)
        assert out["resid"].shape == alone["resid"].shape
        gap = out.for_metric("logit_difference")["resid"] - alone["resid"]
        assert gap.abs().max() < GAP, kind
        assert out.prompts.target_tokens.shape == (BATCH, WIDTH)
    assert out["resid"].shape == (3,)


def test_one_token_is_the_answers_log_probability() -> None:
    tokens = {"source_answer_tokens": ANSWERS[0][:, None]}
    model = tiny_model("llama")
    with traces(model) as seen:
        out = swept("activation", metric=SEQUENCE, tokens=tokens, model=model)
    with traces(model) as others:
        alone = run("activation", metric="answer_log_probability", model=model)
    # Nothing has to be appended, and nothing more runs.
    assert seen == others
    for name in out:
        assert (out[name] - alone[name]).abs().max() < GAP
    both = swept(
        "activation",
        metric=DIFFERENCE,
        tokens=tokens | {"target_answer_tokens": ANSWERS[1][:, None]},
    )
    plain = run("activation", metric="logit_difference")
    for name in both:
        assert (both[name] - plain[name]).abs().max() < GAP


def test_fills_change_nothing_but_rounding() -> None:
    out = swept("activation", metric=DIFFERENCE)
    wide = {
        "source_answer_tokens": filled(OWN, 3),
        "target_answer_tokens": filled(OTHER, 1),
    }
    for metric_data in (DATA, DATA | wide):
        given_tokens = {} if metric_data is not DATA else wide
        again = swept("activation", metric=DIFFERENCE, tokens=given_tokens, metric_data=metric_data)
        for name in out:
            assert (out[name] - again[name]).abs().max() < GAP


@pytest.mark.parametrize("steps", [None, 24])
@pytest.mark.parametrize("name", [SEQUENCE, DIFFERENCE])
def test_attribution_adds_up_to_the_whole_difference(name: str, steps: int | None) -> None:
    """Along a path of whole residual streams, the estimates of all tokens add up."""
    sites = Sites("resid", layers=[1], seq_pos_type="each")
    options = {} if steps is None else {"steps": steps}
    out = swept("attribution", metric=name, sites=sites, **options)
    whole = swept("attribution", metric=name, sites=sites, batch_size=3, **options)
    assert (out["resid"] - whole["resid"]).abs().max() < 1e-4
    if steps is not None:
        cell = swept("activation", metric=name, sites=Sites("resid", layers=[1], seq_pos_type=None))
        added = out["resid"][1].sum()
        assert added == pytest.approx(float(cell["resid"][1]), abs=0.02)


def test_attribution_is_the_sum_of_gradients_of_single_steps() -> None:
    """To first order what one more hundredth of the way does, by exact runs."""
    sites = Sites("resid", layers=[2], seq_pos_type="last")
    out = swept("attribution", metric=[SEQUENCE, DIFFERENCE], sites=sites)
    for name in (SEQUENCE, DIFFERENCE):
        place = Place("resid", 2, None, (1,))
        found = []
        for row, prompt in enumerate(TARGETS):
            own, other = (
                torch.autograd.functional.jvp(
                    functools.partial(_first_token, prompt, answers[row]),
                    _there(prompt),
                    _there(SOURCES[row]) - _there(prompt),
                )[1]
                for answers in (OWN, OTHER)
            )
            found.append(own if name == SEQUENCE else own - other)
        change = out.raw[name]["resid"][0].double() - out.for_metric(name).baseline.target.double()
        # After the last layer a token reaches its own logits alone, so the answer's first token.
        assert (change - torch.stack(found)).abs().max() < 1e-4, place


def _there(prompt: Prompt) -> Tensor:
    return oracle().activation(prompt, "resid", 2)[-1].double()


def _first_token(prompt: Prompt, answer: Prompt, state: Tensor) -> Tensor:
    model = oracle().model
    logits = model.lm_head(model.model.norm(state.float()))
    return logits.double().log_softmax(-1)[answer[0]]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "left out": ({}, r"reads metric_data\['source_answer_tokens'\]"),
    "flat": ({"source_answer_tokens": ANSWERS[0]}, r"it is \[4\] of torch.int64"),
    "short": ({"source_answer_tokens": filled(OWN[:2])}, "a row for each of 4 prompts"),
    "no tokens": (
        {"source_answer_tokens": torch.full((4, 2), -1)},
        "has no token for prompt 0",
    ),
    "a hole": (
        {"source_answer_tokens": torch.tensor([[1, -1, 2]] * 4)},
        "behind a fill of -1: fill on the right",
    ),
    "beyond": ({"source_answer_tokens": torch.full((4, 1), 64)}, "the id 64"),
    "twice": (
        {"source_answer_tokens": filled(OWN), "metric_data": {"source_answer_tokens": filled(OWN)}},
        "given twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_answers_that_are_none(case: str) -> None:
    options, told = REFUSED[case]
    model = Counted(tiny_model("llama"))
    with pytest.raises(MetricError, match=told):
        run("activation", metric=SEQUENCE, model=model.model, **options)
    assert not model.forwards


def test_the_second_answer_is_asked_for() -> None:
    with pytest.raises(MetricError, match="target_answer_tokens"):
        swept("activation", metric=DIFFERENCE, tokens={"source_answer_tokens": filled(OWN)})


def test_sizes_of_a_difference_of_runs_are_refused() -> None:
    model = Counted(tiny_model("llama"))
    source, own = laid(SOURCES)
    target, mask = laid(TARGETS)
    arguments = (model.model, tiny_api(), SITES, source, target, *ANSWERS)
    options: dict[str, Any] = {
        **TOKENS,
        "source_attention_mask": own,
        "target_attention_mask": mask,
        "progress": False,
    }
    with pytest.raises(MetricError, match="GradDrop gives sizes without a sign"):
        attribution_patching(*arguments, metric=DIFFERENCE, grad_drop=True, **options)
    with pytest.raises(MetricError, match="screen='attribution'"):
        activation_patching(*arguments, metric=DIFFERENCE, screen="atp*", top_k=2, **options)
    out = attribution_patching(*arguments, metric=SEQUENCE, grad_drop=True, **options)
    assert (out["resid"] >= 0).all()


def test_longer_than_the_model_has_positions() -> None:
    model = tiny_model("gpt2")
    most = model.config.n_positions
    prompt = torch.full((1, most - 1), 7)
    options: dict[str, Any] = {"metric": SEQUENCE, "progress": False}
    site = Sites("resid", layers=[1], seq_pos_type="last")
    arguments = (model, infer_adapter(model), site, prompt, ANSWERS[0][:1])
    ablation_patching(*arguments, answer_tokens=filled([(3, 4)]), **options)
    with pytest.raises(TokensError, match=rf"has {most + 1} tokens.*positions for {most}"):
        ablation_patching(*arguments, answer_tokens=filled([(3, 4, 5)]), **options)


def test_pairs_bring_their_answers() -> None:
    """Sets, and all tokens of each answer, without a word; data of the same name goes before."""
    prompts = ["The capital of France is", "The capital of Spain is"]
    others = ["The capital of Italy is", "The capital of Japan is"]
    answers = [" Paris France", " Madrid"], [" Rome", " Tokyo is Japan"]
    words = tiny_tokenizer([*prompts, *others, *answers[0], *answers[1]])
    model = tiny_model("llama", vocab_size=200)
    pairs = PromptPairs.from_texts(prompts, others, *answers, words, multi_token="all")
    assert pairs.source_answer_tokens is not None
    assert pairs.target_answer_tokens is not None
    sites = Sites("resid", seq_pos_type="last")
    options: dict[str, Any] = {"metric": DIFFERENCE, "progress": False}
    api = tiny_api()
    out = activation_patching(model, api, sites, pairs, **options)
    tokens = {
        "source_answer_tokens": pairs.source_answer_tokens,
        "target_answer_tokens": pairs.target_answer_tokens,
    }
    alone = activation_patching(model, api, sites, **pairs.arguments(), **tokens, **options)
    assert out["resid"].equal(alone["resid"])
    ablated = ablation_patching(model, api, sites, pairs, **options)
    own = {NAMES[name]: value for name, value in tokens.items()}
    plain = ablation_patching(model, api, sites, **pairs.ablation_arguments(), **own, **options)
    assert ablated["resid"].equal(plain["resid"])
    swapped = {
        "source_answer_tokens": pairs.target_answer_tokens,
        "target_answer_tokens": pairs.source_answer_tokens,
    }
    other = activation_patching(model, api, sites, pairs, metric_data=swapped, **options)
    assert other.baseline.source.equal(-out.baseline.source)
    with pytest.raises(TokensError, match="leave out source_answer_tokens"):
        activation_patching(
            model, api, sites, pairs, source_answer_tokens=tokens["source_answer_tokens"], **options
        )
