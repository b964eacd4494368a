"""A `PromptPairs` stands for the arguments about the prompts, in every function that has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnpatch_core import (
    PromptPairs,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    plan_sweep,
)
from nnpatch_core.errors import AnswerError, PatchingError, TokensError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.timeless import timeless

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

# The prompts differ in length, so that the masks matter.
SOURCE = ["The capital of France is", "The capital city of Egypt is"]
TARGET = ["The capital of Japan is", "The capital city of Spain is"]
ANSWERS = [" Paris", " Cairo"], [" Tokyo", " Madrid"]
TOKENIZER = tiny_tokenizer([*SOURCE, *TARGET, *ANSWERS[0], *ANSWERS[1]])
PAIRS = PromptPairs.from_texts(SOURCE, TARGET, *ANSWERS, TOKENIZER)
SITES = Sites(["resid", "attn", "q"], seq_pos_type="each")
QUIET = {"progress": False}


def ablated_by_gradients() -> dict[str, Any]:
    """The arguments of an ablation, as `attribution_patching` calls them."""
    by_name = PAIRS.ablation_arguments()
    return {
        "source_tokens": None,
        "target_tokens": by_name["tokens"],
        "attention_mask": by_name["attention_mask"],
        "source_answer_index": by_name["answer_index"],
        "target_answer_index": by_name["other_answer_index"],
        "tokenizer": TOKENIZER,
    }


#: Function, what is passed for the arguments about the prompts, those arguments, options.
SWEEPS = [
    (activation_patching, [PAIRS], PAIRS.arguments(), {}),
    (activation_patching, [PAIRS], PAIRS.arguments(), {"engine": "full"}),
    (activation_patching, [PAIRS], PAIRS.arguments(), {"screen": "attribution", "top_k": 3}),
    (activation_patching, [PAIRS.swapped()], PAIRS.swapped().arguments(), {}),
    (attribution_patching, [PAIRS], PAIRS.arguments(), {}),
    (attribution_patching, [PAIRS], ablated_by_gradients(), {"ablation": "zero"}),
    (attribution_patching, [None, PAIRS], ablated_by_gradients(), {"ablation": "mean"}),
    (ablation_patching, [PAIRS], PAIRS.ablation_arguments(), {}),
    (ablation_patching, [PAIRS], PAIRS.ablation_arguments(), {"method": "resample"}),
]


@pytest.mark.parametrize(("sweep", "stands", "arguments", "options"), SWEEPS)
def test_it_stands_for_all_of_them(
    sweep: Callable[..., Any], stands: list[PromptPairs], arguments: dict[str, Any], options: Any
) -> None:
    first = tiny_model(), tiny_api(), SITES
    by_pairs = sweep(*first, *stands, **options, **QUIET)
    by_name = sweep(*first, **arguments, **options, **QUIET)
    for name in by_name:
        assert torch.equal(by_pairs[name], by_name[name])
        assert by_pairs[name].any()
    assert by_pairs.tokens == by_name.tokens
    assert " is" in by_pairs.tokens, "the tokenizer is passed on"
    assert timeless(by_pairs.info) == timeless(by_name.info)
    assert by_pairs.kind == by_name.kind


def test_an_estimated_ablation_is_of_what_ablation_patching_measures() -> None:
    first = tiny_model(), tiny_api(), Sites("attn", seq_pos_type="each")
    estimate = attribution_patching(*first, PAIRS, ablation="zero", **QUIET)
    exact = ablation_patching(*first, PAIRS, **QUIET)
    assert torch.equal(estimate.prompts.target_tokens, exact.prompts.target_tokens)
    assert torch.allclose(estimate.baseline.target, exact.baseline.target, atol=1e-5)


@pytest.mark.parametrize(
    ("stands", "arguments"),
    [([PAIRS], PAIRS.arguments()), ([None, PAIRS], ablated_by_gradients())],
)
def test_a_plan_too(stands: list[PromptPairs | None], arguments: dict[str, Any]) -> None:
    known = inspect.signature(plan_sweep).parameters
    named = {name: value for name, value in arguments.items() if name in known}
    plan = plan_sweep(tiny_model(), tiny_api(), SITES, *stands)
    assert plan.describe() == plan_sweep(tiny_model(), tiny_api(), SITES, **named).describe()


def test_the_width_of_a_list_of_sites() -> None:
    found = SITES.get_sites_dict(tiny_model(), tiny_api(), PAIRS)
    wanted = SITES.get_sites_dict(tiny_model(), tiny_api(), PAIRS.target_tokens)
    assert {name: len(sites) for name, sites in found.items()} == {
        name: len(sites) for name, sites in wanted.items()
    }


def test_another_tokenizer_wins() -> None:
    other: Any = tiny_tokenizer(["a"])
    other.decode = lambda ids: f"<{ids[0]}>"
    for sweep in (activation_patching, attribution_patching, ablation_patching):
        out = sweep(tiny_model(), tiny_api(), Sites("resid"), PAIRS, tokenizer=other, **QUIET)
        assert out.tokens[-1].startswith("<")


ANSWER = torch.tensor([1, 2])
TOKENS, MASK = PAIRS.source_tokens, PAIRS.source_attention_mask
BESIDE = [
    (activation_patching, [PAIRS, TOKENS], {}, ["target_tokens"]),
    (
        activation_patching,
        [PAIRS],
        {"attention_mask": MASK, "target_answer_index": ANSWER},
        ["target_answer_index and attention_mask"],
    ),
    (attribution_patching, [PAIRS], {"source_attention_mask": MASK}, ["source_attention_mask"]),
    (attribution_patching, [PAIRS, PAIRS], {"ablation": "zero"}, ["target_tokens"]),
    (
        attribution_patching,
        [None, PAIRS],
        {"ablation": "zero", "source_answer_index": ANSWER},
        ["target_tokens is a PromptPairs", "source_answer_index"],
    ),
    (ablation_patching, [PAIRS, ANSWER], {}, ["answer_index"]),
    (ablation_patching, [PAIRS], {"attention_mask": MASK}, ["tokens is", "attention_mask"]),
    (plan_sweep, [PAIRS, TOKENS], {}, ["target_tokens"]),
    (plan_sweep, [None, PAIRS], {"attention_mask": MASK}, ["attention_mask"]),
]


@pytest.mark.parametrize(("sweep", "passed", "named", "says"), BESIDE)
def test_what_is_given_besides_is_to_be_left_out(
    sweep: Callable[..., Any],
    passed: list[PromptPairs | torch.Tensor],
    named: dict[Any, Any],
    says: list[str],
) -> None:
    with pytest.raises(
        TokensError, match=r"is a PromptPairs, which stands for all .* leave out"
    ) as found:
        sweep(tiny_model(), tiny_api(), SITES, *passed, **named)
    for words in says:
        assert words in str(found.value)
    left_out = str(found.value).rpartition("leave out ")[2]
    assert set(re.split(" and |, ", left_out)) <= set(inspect.signature(sweep).parameters)


MISSING = [
    (activation_patching, [TOKENS], {}, TokensError, "target_tokens, source_answer_index and "),
    (activation_patching, [TOKENS, TOKENS], {}, AnswerError, "source_answer_index and target_"),
    (
        activation_patching,
        [TOKENS, TOKENS, ANSWER],
        {},
        AnswerError,
        "target_answer_index must be given as a torch tensor, and was left out",
    ),
    (activation_patching, [None, TOKENS, ANSWER, ANSWER], {}, TokensError, "source_tokens must"),
    (attribution_patching, [None, TOKENS, ANSWER, ANSWER], {}, TokensError, "source_tokens must"),
    (attribution_patching, [TOKENS], {}, TokensError, "target_tokens, "),
    (attribution_patching, [None, TOKENS], {"ablation": "zero"}, AnswerError, "source_answer_ind"),
    (attribution_patching, [None], {"ablation": "zero"}, TokensError, "target_tokens and source_"),
    (ablation_patching, [TOKENS], {}, AnswerError, "answer_index must"),
    (ablation_patching, [None], {}, TokensError, "tokens and answer_index must"),
    (plan_sweep, [TOKENS], {}, TokensError, "target_tokens must"),
    (plan_sweep, [None], {}, TokensError, "target_tokens must"),
]


@pytest.mark.parametrize(("sweep", "passed", "named", "kind", "says"), MISSING)
def test_what_is_missing_is_named(
    sweep: Callable[..., Any],
    passed: list[torch.Tensor | None],
    named: dict[Any, Any],
    kind: type[Exception],
    says: str,
) -> None:
    with pytest.raises(kind, match=f"^{says}") as found:
        sweep(tiny_model(), tiny_api(), SITES, *passed, **named)
    first = "tokens" if sweep is ablation_patching else "source_tokens"
    assert f"a PromptPairs, passed as {first}, stands for all" in str(found.value)


@pytest.mark.parametrize(
    ("sweep", "passed", "named", "misplaced", "first"),
    [
        (activation_patching, [TOKENS, PAIRS], {}, "target_tokens", "source_tokens"),
        (attribution_patching, [None, PAIRS], {}, "target_tokens", "source_tokens"),
        (attribution_patching, [TOKENS, PAIRS], {"ablation": "zero"}, "target_", "source_tokens"),
        (ablation_patching, [TOKENS, PAIRS], {}, "answer_index", "tokens"),
        (plan_sweep, [TOKENS, PAIRS], {}, "target_tokens", "source_tokens"),
    ],
)
def test_it_stands_in_one_place(
    sweep: Callable[..., Any], passed: list[Any], named: dict[Any, Any], misplaced: str, first: str
) -> None:
    says = f"{misplaced}.* cannot be a PromptPairs: pass it as {first}, alone"
    with pytest.raises(TokensError, match=says):
        sweep(tiny_model(), tiny_api(), SITES, *passed, **named)


def test_a_data_set_has_one_run() -> None:
    says = "is a PromptPairs, which has two runs: pass .*pairs.source_tokens"
    site = SITES.get_sites_dict(tiny_model(), tiny_api(), PAIRS)["resid"][-1]
    with pytest.raises(TokensError, match=says):
        cache_average(tiny_model(), [site], PAIRS)
    with pytest.raises(PatchingError, match=says):
        ablation_patching(
            tiny_model(), tiny_api(), SITES, PAIRS, method="mean", reference=PAIRS, **QUIET
        )
    both = [
        (PAIRS.source_tokens, PAIRS.source_attention_mask),
        (PAIRS.target_tokens, PAIRS.target_attention_mask),
    ]
    cache_average(tiny_model(), [site], both)
