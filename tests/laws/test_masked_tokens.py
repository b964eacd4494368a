"""What is masked is never looked at: it may be any number, and no other number depends on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    plan_sweep,
)
from nnpatch_core.errors import TokensError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

SOURCE = torch.tensor([[5, 6, 7, 8], [0, 11, 12, 13]])
TARGET = torch.tensor([[5, 9, 7, 8], [0, 11, 14, 13]])
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
ANSWERS = torch.tensor([1, 2]), torch.tensor([3, 4])
#: `[PAD]` added to the tokenizer, the embedding not resized; what losses ignore; what overflows.
FOREIGN = [64, -100, 2**31 - 1]
API = tiny_api()
LAST = Sites(["resid", "o"], seq_pos_type="last")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def masked(tokens: torch.Tensor, number: int) -> torch.Tensor:
    return tokens.masked_fill(MASK == 0, number)


def activation(model: Any, number: int, **options: Any) -> Outcome:
    tokens = masked(SOURCE, number), masked(TARGET, number)
    return activation_patching(
        model, None, LAST, *tokens, *ANSWERS, attention_mask=MASK, progress=False, **options
    )


def attribution(model: Any, number: int, **options: Any) -> Outcome:
    tokens = masked(SOURCE, number), masked(TARGET, number)
    return attribution_patching(
        model, None, LAST, *tokens, *ANSWERS, attention_mask=MASK, progress=False, **options
    )


def ablation(model: Any, number: int, **options: Any) -> Any:
    return ablation_patching(
        model, None, LAST, masked(TARGET, number), *ANSWERS, attention_mask=MASK, progress=False,
        **options,
    )  # fmt: skip


def referenced(model: Any, number: int, method: str = "mean", **options: Any) -> Any:
    return ablation(model, 0, method=method, reference=(masked(SOURCE, number), MASK), **options)


def resampled(model: Any, number: int) -> Any:
    return referenced(model, number, method="resample")


def listed(model: Any, number: int) -> Any:
    data = [{"input_ids": masked(SOURCE, number), "attention_mask": MASK}]
    return ablation(model, 0, method="mean", reference=iter(data))


def estimated_ablation(model: Any, number: int) -> Any:
    return attribution_patching(
        model, None, LAST, None, masked(TARGET, number), *ANSWERS, attention_mask=MASK,
        ablation="mean", reference=(masked(SOURCE, number), MASK), progress=False,
    )  # fmt: skip


def screened(model: Any, number: int) -> Outcome:
    return activation(model, number, screen="attribution", top_k=3)


def one_at_a_time(model: Any, number: int) -> Any:
    return activation(model, number, batch_size=1)


def full(model: Any, number: int) -> Outcome:
    return activation(model, number, engine="full")


@pytest.mark.parametrize("number", FOREIGN)
@pytest.mark.parametrize(
    "sweep",
    [
        activation,
        full,
        one_at_a_time,
        screened,
        attribution,
        ablation,
        referenced,
        resampled,
        listed,
        estimated_ablation,
    ],
)
def test_no_number_depends_on_what_is_masked(
    model: Any, sweep: Callable[..., Any], number: int
) -> None:
    found, expected = sweep(model, number), sweep(model, 0)
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert torch.equal(found.baseline.target, expected.baseline.target)


@pytest.mark.parametrize("number", FOREIGN)
def test_averages_plans_and_lists_of_sites(model: Any, number: int) -> None:
    sites = [Site.get_site(API, "mlp", layer=1, seq_pos=[-1]) for _ in range(2)]
    for site, tokens in zip(sites, (masked(SOURCE, number), SOURCE), strict=True):
        cache_average(model, [site], (tokens, MASK))
    assert torch.equal(sites[0].value, sites[1].value)
    plans = [
        plan_sweep(model, None, LAST, masked(SOURCE, n), masked(TARGET, n), attention_mask=MASK)
        for n in (number, 0)
    ]
    assert plans[0].token_layers == plans[1].token_layers
    # Only the width is asked for, and no mask is taken.
    for each in (LAST, Sites.from_sites(sites)):
        found = each.get_sites_dict(model, API, masked(SOURCE, number))
        assert found == each.get_sites_dict(model, API, SOURCE)


def test_a_sweep_is_gone_on_with_whatever_is_masked(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "sweep.checkpoint"
    first = activation(model, 0, checkpoint=path)
    again = activation(model, 64, checkpoint=path)
    assert torch.equal(first["resid"], again["resid"])


def test_padding_token_that_the_model_has_no_embedding_for(model: Any) -> None:
    """Added to the tokenizer, as many recipes do, and the embedding not resized."""
    texts = ["The capital of France is", "The old capital of Japan is", " Paris", " Tokyo"]
    tokenizer = tiny_tokenizer(texts, additional_special_tokens=[f"<{n}>" for n in range(64)])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= model.config.vocab_size
    pairs = PromptPairs.from_texts(*[[text] for text in texts], tokenizer)
    assert tokenizer.pad_token_id in pairs.source_tokens
    out = activation_patching(model, None, LAST, **pairs.arguments(), progress=False)
    assert out["resid"][-1] == pytest.approx(1, abs=1e-5)


def test_what_is_not_masked_is_looked_at(model: Any) -> None:
    with pytest.raises(TokensError, match="holds the id 64; the model's vocabulary is 0 to 63"):
        activation_patching(
            model, None, LAST, SOURCE.masked_fill(SOURCE == 13, 64), TARGET, *ANSWERS,
            attention_mask=MASK, progress=False,
        )  # fmt: skip


def test_padding_without_a_mask_is_told_to_have_one() -> None:
    model = tiny_model(pad_token_id=None)
    model.config.pad_token_id = 64
    with pytest.raises(TokensError, match="It is the padding token: pass attention_mask="):
        activation_patching(
            model, None, LAST, masked(SOURCE, 64), masked(TARGET, 64), *ANSWERS, progress=False
        )
