"""Outcomes know the answers of their prompts, through all that is made of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    edge_patching,
)
from nnpatch_core.errors import OutcomeError
from nnpatch_core.testing import tiny_model, tiny_tokenizer
from tests.helpers.samples import TWO

LAST = Sites("mlp", seq_pos_type="last")
TEXTS = ["the colour red is", "the colour blue is"], ["the colour green is", "the colour pink is"]
TOKENIZER = tiny_tokenizer([*TEXTS[0], *TEXTS[1], " dark"])


def swept(pairs: Any, run: Any = activation_patching, **options: Any) -> Outcome:
    with warnings.catch_warnings(action="ignore"):
        found: Outcome = run(tiny_model(), None, LAST, pairs, progress=False, **options)
    return found


def pairs_of(source: list[Any], target: list[Any], **options: Any) -> PromptPairs:
    return PromptPairs.from_texts(*TEXTS, source, target, TOKENIZER, **options)


PAIRS = pairs_of([" red", " blue"], [" green", " pink"])


def test_of_pairs() -> None:
    expected = {"source": (" red", " blue"), "target": (" green", " pink")}
    assert swept(PAIRS).prompts.answers == expected
    assert swept(PAIRS, ablation_patching, method="zero").prompts.answers == expected
    with warnings.catch_warnings(action="ignore"):
        edges = edge_patching(tiny_model(), None, PAIRS, progress=False)
    assert edges.outcome.prompts.answers == expected


def test_of_sets_and_of_several_tokens() -> None:
    sets = pairs_of([[" red", " blue"], [" blue"]], [[" green"], [" pink"]])
    found = swept(sets, metric="answer_set_difference")
    assert found.prompts.answers["source"] == (" red or  blue", " blue")
    whole = pairs_of([" red dark", " blue"], [" green", " pink"], multi_token="all")
    found = swept(whole, metric="sequence_log_probability")
    assert found.prompts.answers["source"] == (" red dark", " blue")


def test_of_tensors_they_are_numbers() -> None:
    found = activation_patching(
        tiny_model(), None, LAST, TWO.source, TWO.target, *TWO.answers, progress=False
    )
    assert found.prompts.answers == {"source": ("1", "2"), "target": ("4", "5")}


class Fussy:
    """A tokenizer that knows the tokens of the prompts alone."""

    def decode(self, ids: list[int]) -> str:
        if ids[0] in (1, 2):
            raise KeyError(ids[0])
        return f"w{ids[0]}"


def test_answers_that_a_tokenizer_does_not_know_are_numbers() -> None:
    found = activation_patching(
        tiny_model(), None, LAST, TWO.source, TWO.target, *TWO.answers, progress=False,
        tokenizer=Fussy(),
    )  # fmt: skip
    assert found.prompts.answers == {"source": ("1", "2"), "target": ("w4", "w5")}


def test_answers_of_metric_data_that_are_none() -> None:
    """Whatever else a user's metric is told under these names."""
    data = {"source_answers": torch.rand(2, 3), "target_answers": torch.tensor([1, 2])}
    assert swept(PAIRS, metric_data=data).prompts.answers["source"] == (" red", " blue")


def test_they_are_kept(tmp_path: Path) -> None:
    found = swept(PAIRS)
    found.save(tmp_path / "f")
    assert Outcome.load(tmp_path / "f").prompts.answers == found.prompts.answers
    parts = found.by_group(["a", "b"])
    assert parts["b"].prompts.answers == {"source": (" blue",), "target": (" pink",)}
    assert swept(PAIRS, batch_size=1).prompts.answers == found.prompts.answers
    means = swept(PAIRS, keep="means")
    assert means.prompts.answers == {"source": (" red",), "target": (" green",)}


@pytest.mark.parametrize(
    ("answers", "message"),
    [({"source": ("a",)}, "has 1 values, of 2"), ({"other": ("a", "b")}, "answers are of 'other'")],
)
def test_answers_that_do_not_fit_are_not_saved(
    tmp_path: Path, answers: dict[str, Any], message: str
) -> None:
    found = swept(PAIRS)
    broken = attrs.evolve(found, prompts=attrs.evolve(found.prompts, answers=answers))
    with pytest.raises(OutcomeError, match=message):
        broken.save(tmp_path / "f")
