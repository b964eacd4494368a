"""Prompts of one length whose columns mix other words: that is told, and only that."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from nnpatch_core import PromptBatch, PromptPairs, Sites, activation_patching, plan_sweep
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PromptWarning
from nnpatch_core.sweep import warn_of_columns
from nnpatch_core.testing import tiny_model, tiny_tokenizer

WORDS = ["Mary", "Sue", "Anne", "John", "went", "ran", "to", "from", "the", "shop", "a", "bar"]
TOKENIZER = tiny_tokenizer([" " + " ".join(WORDS), *WORDS])
MODEL = tiny_model("llama", vocab_size=len(TOKENIZER))
EACH = Sites("resid", layers=[0], seq_pos_type="each")


def made(source: list[str], target: list[str]) -> PromptPairs:
    answers = [" Mary"] * len(source), [" Sue"] * len(source)
    return PromptPairs.from_texts(source, target, *answers, TOKENIZER)


def sweep(pairs: Any, sites: Sites = EACH) -> None:
    activation_patching(MODEL, None, sites, pairs, progress=False)


def test_templates_of_one_length_are_told_with_their_words() -> None:
    pairs = made(
        ["Mary went to the shop", "Anne ran from a bar"],
        ["Sue went to the shop", "John ran from a bar"],
    )
    with pytest.warns(PromptWarning, match=r"of 2 templates: position 4 is ' shop' and ' bar'"):
        sweep(pairs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(pairs, Sites("resid", layers=[0], seq_pos_type="last"))
        sweep(pairs[0])


def test_a_plan_tells_them_too() -> None:
    pairs = made(
        ["Mary went to the shop", "Anne ran from a bar"],
        ["Sue went to the shop", "John ran from a bar"],
    )
    for given in ((pairs,), (None, pairs)):
        with pytest.warns(PromptWarning, match=r"of 2 templates: position 4 is ' shop'"):
            plan_sweep(MODEL, None, EACH, *given)


ALIKE = {
    "one template": (
        ["Mary went to the shop", "Anne went to the bar"],
        ["Sue went to the shop", "John went to the bar"],
    ),
    "no word to compare": (["Mary went to", "Anne ran from"], ["Sue ran from", "John went to"]),
    "one pair": (["Mary went to"], ["Sue ran from"]),
}


@pytest.mark.parametrize("case", ALIKE)
def test_one_template_is_not_told(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(made(*ALIKE[case]))


def test_many_prompts_of_no_template_are_compared_with_a_few() -> None:
    """A data set of sentences does not cost its square."""
    count = 5000
    tokens = torch.arange(count * 6).view(count, 6)
    batch = Batch(tokens, torch.ones_like(tokens))
    strings = {0: "a", 1: "b"}
    with pytest.warns(PromptWarning, match="as of 10 or more templates"):
        warn_of_columns(EACH, PromptBatch(batch, batch), strings)
