"""Groups of prompts: each is the sweep of its own prompts alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nnpatch_core import Outcome, PromptPairs, Sites, ablation_patching, activation_patching
from nnpatch_core.errors import OutcomeError, UnknownNameError
from nnpatch_core.testing import tiny_model, tiny_tokenizer

WORDS = " Mary Sue Anne John Lee went to the shop and"
TOKENIZER = tiny_tokenizer([WORDS, "Mary", "Sue", "Anne", "John", "Lee"])
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))
SITES = Sites(["resid", "q"], layers=[0, 2], seq_pos_type="lastk", seq_pos=3)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    names = ["Mary", "Sue", "Anne", "John"]
    return PromptPairs.from_texts(
        [f"{name} went to the shop" for name in names],
        [f"{name} went to the shop" for name in reversed(names)],
        [f" {name}" for name in names],
        [f" {name}" for name in reversed(names)],
        TOKENIZER,
        extra={"kind": ["a", "b", "a", None], "size": [1, 2, math.nan, (3, 4)]},
    )


@pytest.fixture(scope="module")
def out(pairs: PromptPairs) -> Outcome:
    return activation_patching(
        MODEL, None, SITES, pairs, metric=["logit_difference", "kl_divergence"], progress=False
    )


def alone(pairs: PromptPairs, metric: str = "logit_difference") -> Outcome:
    return activation_patching(MODEL, None, SITES, pairs, metric=metric, progress=False)


@pytest.mark.parametrize("metric", ["logit_difference", "kl_divergence"])
def test_a_group_is_its_prompts_swept_alone(pairs: PromptPairs, out: Outcome, metric: str) -> None:
    groups = out.for_metric(metric).by_group("kind")
    assert list(groups) == ["a", "b", None]
    for value, prompts in pairs.groups("kind").items():
        single, group = alone(prompts, metric), groups[value]
        for name in single:
            torch.testing.assert_close(group[name], single[name], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                group.per_prompt(name),
                single.per_prompt(name),
                rtol=1e-3,
                atol=1e-3,
                equal_nan=True,
            )
            assert torch.equal(group.elided(name), single.elided(name))
        assert len(group.to_dataframe(per_prompt=True)) == len(single.to_dataframe(per_prompt=True))
        assert group.prompts.text(0) == single.prompts.text(0)


def test_values_do_where_the_prompts_came_as_tensors(pairs: PromptPairs, out: Outcome) -> None:
    plain = activation_patching(MODEL, None, SITES, **pairs.arguments(), progress=False)
    with pytest.raises(OutcomeError, match=r"the outcome has none, .* out\.by_group\(pairs\.col"):
        plain.by_group("kind")
    one, other = plain.by_group(pairs.columns["kind"])["a"], out.by_group("kind")["a"]
    torch.testing.assert_close(one["resid"], other["resid"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("column", "got"), [(["a"], "1"), (3, "3"), (b"abcd", "b'abcd'")])
def test_what_is_no_column_is_refused(out: Outcome, column: Any, got: str) -> None:
    with pytest.raises(OutcomeError, match=f"one value for each of 4 prompts, got {got}"):
        out.by_group(column)


def test_an_unknown_column_is_refused(out: Outcome) -> None:
    with pytest.raises(UnknownNameError, match=r"no column 'kinds' \(did you mean kind\?\)"):
        out.by_group("kinds")


def test_a_group_whose_runs_are_equal_has_no_values() -> None:
    pairs = PromptPairs.from_texts(
        ["Mary went to", "Sue went to"],
        ["Mary went to", "Anne went to"],
        [" Mary", " Sue"],
        [" Lee", " Anne"],
        TOKENIZER,
        extra={"kind": ["same", "other"]},
    )
    out = activation_patching(MODEL, None, SITES, pairs, progress=False)
    with pytest.raises(OutcomeError, match=r"the source and the target run of group 'same'"):
        out.by_group("kind")


def test_columns_are_in_the_file(out: Outcome, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    out.save(path)
    loaded = Outcome.load(path)
    # JSON has no word for nan, and none for a tuple.
    assert loaded.prompts.columns == {
        "kind": ("a", "b", "a", None),
        "size": (1, 2, None, "(3, 4)"),
    }
    assert torch.equal(loaded.by_group("kind")["a"]["q"], out.by_group("kind")["a"]["q"])


def test_an_ablation_has_groups(pairs: PromptPairs) -> None:
    out = ablation_patching(MODEL, None, SITES, pairs, progress=False)
    for value, prompts in pairs.groups("kind").items():
        single = ablation_patching(MODEL, None, SITES, prompts, progress=False)
        group = out.by_group("kind")[value]
        torch.testing.assert_close(group["resid"], single["resid"], rtol=1e-4, atol=1e-4)
