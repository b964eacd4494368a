"""Texts as people write them, cut by a real byte-level tokenizer and read by a real model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core.errors import AnswerError, AnswerWarning, PromptWarning
from tests.models.real import Real, smollm2_135m

SOURCE = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome"}
TARGET = {"Japan": "Tokyo", "Greece": "Athens", "Russia": "Moscow"}


@pytest.fixture(scope="module")
def known() -> Real:
    return smollm2_135m()


def texts(before: str = "", after: str = "") -> list[list[str]]:
    prompts = [[f"{before}The capital of {name} is{after}" for name in x] for x in (SOURCE, TARGET)]
    return [*prompts, [*SOURCE.values()], [*TARGET.values()]]


def spaced(columns: list[list[str]]) -> list[list[str]]:
    return [*columns[:2], *([f" {answer}" for answer in column] for column in columns[2:])]


def differences(known: Real, pairs: PromptPairs) -> Any:
    """The logit difference of each source prompt."""
    sites = Sites("resid", layers=[0], seq_pos_type="last")
    out = activation_patching(known.model, None, sites, **pairs.arguments(), progress=False)
    return out.baseline.source


def test_answers_as_people_write_them(known: Real) -> None:
    with pytest.warns(AnswerWarning, match="source_answer of pairs 0 to 2 and target_answer of"):
        found = PromptPairs.from_texts(*texts(), known.tokenizer)
    expected = PromptPairs.from_texts(*spaced(texts()), known.tokenizer)
    assert found.source_answer_index.equal(expected.source_answer_index)
    assert found.target_answer_index.equal(expected.target_answer_index)


def test_white_space_at_the_end_of_a_prompt(known: Real) -> None:
    with pytest.raises(AnswerError, match="take the white space off the end"):
        PromptPairs.from_texts(*texts(after=" "), known.tokenizer)


def test_an_end_token_changes_no_number(known: Real) -> None:
    ending = copy.deepcopy(known.tokenizer)
    end = ending.convert_tokens_to_ids("<|endoftext|>")
    ending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", end)]
    )
    assert ending("a").input_ids[-1] == end
    plain = differences(known, PromptPairs.from_texts(*spaced(texts()), known.tokenizer))
    with pytest.warns(PromptWarning, match=r"'<\|endoftext\|>', which was left out"):
        pairs = PromptPairs.from_texts(*spaced(texts()), ending)
    assert torch.equal(differences(known, pairs), plain)
    assert (plain > 5).all()


def test_a_rendered_chat_is_the_chat(known: Real) -> None:
    asked = [[{"role": "user", "content": text} for text in column] for column in texts()[:2]]
    rendered = [
        [
            known.tokenizer.apply_chat_template([each], tokenize=False, add_generation_prompt=True)
            for each in column
        ]
        for column in asked
    ]
    answers = [["Yes"] * 3, ["No"] * 3]
    found = [
        PromptPairs.from_texts(*columns, *answers, known.tokenizer)
        for columns in (rendered, [[[each] for each in column] for column in asked])
    ]
    assert found[0].source_tokens.equal(found[1].source_tokens)
    assert found[0].target_answer_index.equal(found[1].target_answer_index)
