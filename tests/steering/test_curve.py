"""Curves of answer probabilities over steering values, against plain hooks and plain formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from nnpatch_core import Add, PromptPairs, Site
from nnpatch_core.errors import (
    AnswerError,
    AnswerWarning,
    PatchingError,
    PositionError,
    SteeringError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.spaces import Subspace
from nnpatch_core.steering.curve import mean_interval, share_interval
from nnpatch_core.subspace import SteeringCurve, sweep_steering
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.family_oracle import LAYOUTS
from tests.helpers.oracle import lay_out, random_prompts
from tests.helpers.steering_oracle import Steered, SteeringOracle, in_span

API, MODEL = tiny_api(), tiny_model("llama")
ORACLE = SteeringOracle(MODEL, LAYOUTS["qwen3"])
SPACE = Subspace(Subspace.random(32, seed=3).basis, mean=torch.linspace(-1, 1, 32))
PROMPTS = random_prompts((4, 6, 3), seed=5)
TOKENS, MASK = lay_out(PROMPTS, "mixed", seed=1)
SOURCE, TARGET = torch.tensor([7, 12, 40]), torch.tensor([9, 11, 3])
VALUES = [-20.0, 0.0, 15]


def site(seq_pos: Any = (-1,), **options: Any) -> Site:
    positions = None if seq_pos is None else list(seq_pos)
    return Site.get_site(API, "resid", 1, seq_pos=positions, **{"subspace": SPACE, **options})


def swept(where: Any = None, values: Any = VALUES, **options: Any) -> SteeringCurve:
    options = {"attention_mask": MASK, "progress": False, **options}
    return sweep_steering(
        MODEL, site() if where is None else where, values, TOKENS, SOURCE, TARGET, **options
    )


def expected(row: int, backs: Any, new: Any) -> Tensor:
    """`[vocab]`: probabilities after a prompt that runs alone."""
    steered = [Steered("resid", 1, None, backs, in_span(SPACE.basis, SPACE.mean, new))]
    prompt = PROMPTS[row]
    logits = ORACLE.logits(prompt, len(prompt), steered if new else [])
    return logits[-1].double().softmax(-1)


@pytest.mark.parametrize("backs", [(1,), None, (1, 3), "each"])
@pytest.mark.parametrize("how", ["set", "add", "scale"])
@pytest.mark.parametrize("size", [None, 2])
def test_a_curve_is_right(backs: Any, how: str, size: Any) -> None:
    own = [[2, 1], [6, 3], [1, 3]] if backs == "each" else [backs] * 3
    flipped: Any = None if backs is None else [[-b for b in each] for each in own]
    flipped = flipped[0] if flipped and backs != "each" else flipped
    curve = swept(site(flipped), how=how, batch_size=size)
    change = {
        "set": lambda old, v: torch.full_like(old, v),
        "add": lambda old, v: old + v,
        "scale": lambda old, v: old * v,
    }[how]
    for row in range(3):
        for number, value in enumerate(VALUES):
            known = expected(row, own[row], lambda old, value=value: change(old, value))
            for answers, ids in ((curve.source, SOURCE), (curve.target, TARGET)):
                found = answers.probability[number, row]
                torch.testing.assert_close(found, known[ids[row]], atol=1e-6, rtol=1e-4)
                assert bool(answers.first[number, row]) == (int(known.argmax()) == int(ids[row]))
        plain = expected(row, own[row], None)
        torch.testing.assert_close(
            curve.unsteered_source.probability[row], plain[SOURCE[row]], atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(
            curve.unsteered_target.probability[row], plain[TARGET[row]], atol=1e-6, rtol=1e-4
        )


def pairs(**options: Any) -> PromptPairs:
    prompts = ["The capital of France is", "So Japan has the capital"]
    others = ["The capital of Italy is", "Once Spain has the capital"]
    words = tiny_tokenizer([*prompts, *others, " Paris Tokyo Rome Madrid"])
    answers: Any = options.pop("answers", ([" Paris", " Tokyo"], [" Rome", " Madrid"]))
    return PromptPairs.from_texts(prompts, others, *answers, words, **options)


@pytest.mark.parametrize("run", ["target", "source"])
def test_pairs_stand_for_prompts_and_answers(run: Any) -> None:
    given_pairs = pairs()
    found = sweep_steering(MODEL, site(), VALUES, given_pairs, run=run, progress=False)
    known = sweep_steering(
        MODEL,
        site(),
        VALUES,
        getattr(given_pairs, f"{run}_tokens"),
        given_pairs.source_answer_index,
        given_pairs.target_answer_index,
        attention_mask=getattr(given_pairs, f"{run}_attention_mask"),
        progress=False,
    )
    for one, other in ((found.source, known.source), (found.target, known.target)):
        assert torch.equal(one.probability, other.probability)


def test_a_set_of_answers_counts_as_one() -> None:
    several = pairs(answers=([[" Paris", " Rome"], [" Tokyo"]], [" Madrid", " Madrid"]))
    found = sweep_steering(MODEL, site(), VALUES, several, progress=False)
    ids = several.source_answer_sets
    assert ids is not None
    alone = [
        sweep_steering(
            MODEL, site(), VALUES, several.target_tokens, column.clamp(min=0), column.clamp(min=0),
            attention_mask=several.target_attention_mask, progress=False,
        ).source
        for column in ids.T
    ]  # fmt: skip
    both = alone[0].probability[:, 0] + alone[1].probability[:, 0]
    torch.testing.assert_close(found.source.probability[:, 0], both)
    torch.testing.assert_close(found.source.probability[:, 1], alone[0].probability[:, 1])


def test_more_tokens_than_the_first_are_told() -> None:
    long = pairs(answers=([" Paris Tokyo", " Tokyo"], [" Rome", " Madrid"]), multi_token="all")
    with pytest.warns(AnswerWarning, match="answers have up to 2 tokens, and the curve is of the"):
        sweep_steering(MODEL, site(), VALUES, long, progress=False)


# Intervals.


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.floats(0.3, 0.7), min_size=2, max_size=30).filter(lambda each: len({*each}) > 1),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_the_interval_of_a_mean_is_students(values: list[float], level: float) -> None:
    found = mean_interval(np.array(values), level)
    known = stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(found, np.clip(known, 0, 1), atol=1e-12)


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(2, 60), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_interval_of_a_share_is_wilsons(count: int, share: float, level: float) -> None:
    hits = round(count * share)
    values = np.array([1.0] * hits + [0.0] * (count - hits))
    known = stats.binomtest(hits, count).proportion_ci(level, "wilson")
    np.testing.assert_allclose(share_interval(values, level), [known.low, known.high], atol=1e-12)


def test_of_one_prompt_there_is_no_interval() -> None:
    curve = sweep_steering(
        MODEL, site(), VALUES, TOKENS[:1], SOURCE[:1], TARGET[:1], progress=False
    )
    frame = curve.to_dataframe()
    assert frame["probability_low"].isna().all()
    assert frame["share_high"].isna().all()
    assert not frame["probability"].isna().any()
    curve.plot()


# Tables and pictures.


def test_the_tables() -> None:
    curve = swept()
    frame = curve.to_dataframe()
    assert len(frame) == 8
    unsteered = frame[frame["value"].isna()]
    assert unsteered["answer"].tolist() == ["source", "target"]
    row = frame[(frame["value"] == 15) & (frame["answer"] == "target")].iloc[0]
    values = curve.target.probability[2].numpy()
    assert row["probability"] == values.mean()
    assert (row["probability_low"], row["probability_high"]) == mean_interval(values, 0.95)
    assert row["share"] == curve.target.first[2].double().mean()
    each = curve.to_dataframe(per_prompt=True)
    assert len(each) == 24
    own = each[(each["value"] == 15) & (each["answer"] == "target")]
    assert own["probability"].tolist() == values.tolist()
    assert own["prompt"].tolist() == [0, 1, 2]
    assert repr(curve) == (
        "SteeringCurve(3 values from -20 to 15, 3 prompts, set at resid L1 [-1] in rank 1)"
    )


def test_the_picture_has_the_numbers() -> None:
    curve = swept(values=[15, -20, 0])
    panel, shares = curve.plot().axes
    lines = {line.get_label(): line for line in panel.lines}
    x, y = (np.asarray(each) for each in lines["source answer"].get_data())
    assert x.tolist() == [-20, 0, 15]
    np.testing.assert_allclose(y, curve.source.probability.mean(1)[[1, 2, 0]])
    level = lines["target answer, unsteered"].get_ydata()[0]
    assert level == curve.unsteered_target.probability.mean()
    y = np.asarray(shares.lines[2].get_ydata())
    np.testing.assert_allclose(y, curve.target.first.double().mean(1)[[1, 2, 0]])


# What is refused.


def test_what_is_refused() -> None:
    def refused(kind: type[Exception], words: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            swept(*args, **options)

    refused(SteeringError, "has no subspace, and values are", site(subspace=None))
    refused(SteeringError, "rank 1: name one", site(subspace=Subspace.random(32, 2)))
    refused(SteeringError, "finite number, got nan", site(), [1.0, float("nan")])
    refused(SteeringError, "finite number, got Add", site(), [Add(1.0)])
    refused(SteeringError, "values must be a list of numbers", site(), [])
    refused(SteeringError, "values must be a list of numbers", site(), 3.0)
    refused(SteeringError, "values must be a list of numbers", site(), "12")
    refused(UnknownNameError, "unknown how 'put'; there are set, add, scale", how="put")
    refused(UnknownNameError, "unknown run 'both'; there are target, source", run="both")
    refused(PatchingError, "run= is for a PromptPairs", run="source")
    refused(PatchingError, "level must be a number between 0 and 1", level=95)
    refused(TokensError, "batch_size", batch_size=0)
    refused(PositionError, "positions of 2 prompts, and there are 3", site([[-1], [-2]]))
    with pytest.raises(AnswerError, match="target_answer_index must be given"):
        sweep_steering(MODEL, site(), VALUES, TOKENS, SOURCE, progress=False)
    with pytest.raises(TokensError, match="leave out source_answer_index, attention_mask"):
        sweep_steering(MODEL, site(), VALUES, pairs(), SOURCE, attention_mask=MASK, progress=False)
