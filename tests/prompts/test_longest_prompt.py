"""Prompts of more tokens than the model has positions for are refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core import (
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core._models import most_tokens
from nnpatch_core.errors import TokensError
from nnpatch_core.testing import tiny_model

ANSWERS = torch.tensor([1]), torch.tensor([4])
SITES = Sites("mlp", layers=[2], seq_pos_type="last")
LEARNED = ("gpt2", "opt", "gpt_neo", "biogpt", "gpt_bigcode", "gptj", "codegen", "ctrl")
#: Positions are computed as they run: there is no last one.
COMPUTED = ("llama", "gemma2", "mistral", "xglm", "bloom")
ENTRIES: dict[str, Any] = {
    "cone": lambda model, runs, **given: activation_patching(
        model, None, SITES, *runs, engine="cone", progress=False, **given
    ),
    "full": lambda model, runs, **given: activation_patching(
        model, None, SITES, *runs, engine="full", progress=False, **given
    ),
    "attribution": lambda model, runs, **given: attribution_patching(
        model, None, SITES, *runs, progress=False, **given
    ),
    "estimated ablation": lambda model, runs, **given: attribution_patching(
        model, None, SITES, None, *runs[1:], ablation="zero", progress=False, **given
    ),
    "plan": lambda model, runs, **given: plan_sweep(model, None, SITES, *runs[:2], **given),
    "ablation": lambda model, runs, **given: ablation_patching(
        model, None, SITES, *runs[1:], progress=False, **given
    ),
    "reference": lambda model, runs, **given: ablation_patching(
        model,
        None,
        SITES,
        runs[1][:, :4],
        *ANSWERS,
        method="mean",
        reference=[runs[1]],
        progress=False,
    ),
}


def runs_of(length: int) -> tuple[torch.Tensor, ...]:
    numbers = torch.arange(2 * length).reshape(2, 1, length) % 50 + 3
    return numbers[0], numbers[1] + 1, *ANSWERS


def fails(model: Any, length: int) -> bool:
    """Whether torch itself refuses a prompt of that length."""
    try:
        with torch.no_grad():
            model(input_ids=torch.ones(1, length, dtype=torch.int64))
    except (IndexError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("family", LEARNED)
def test_limit_is_where_the_model_itself_fails(family: str) -> None:
    model = tiny_model(family)
    limit = most_tokens(model)
    assert limit == 128
    assert (fails(model, limit), fails(model, limit + 1)) == (False, True)


@pytest.mark.parametrize("family", COMPUTED)
def test_no_limit_where_positions_are_computed(family: str) -> None:
    model = tiny_model(family)
    assert most_tokens(model) is None
    assert not fails(model, 200)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.AdapterWarning")
def test_prompt_that_is_too_long(entry: str) -> None:
    with pytest.raises(TokensError, match=r"a prompt of 200 tokens, .* has positions for 128"):
        ENTRIES[entry](tiny_model("gpt2"), runs_of(200))


def test_width_is_not_length() -> None:
    """Padding has no position: prompts of 100 tokens in rows of 150 run as they are."""
    model, runs = tiny_model("gpt2"), runs_of(150)
    mask = (torch.arange(150) >= 50).long()[None]
    api = infer_adapter(model)
    padded = activation_patching(model, api, SITES, *runs, attention_mask=mask, progress=False)
    short = activation_patching(
        model, api, SITES, *(run[:, 50:] for run in runs[:2]), *ANSWERS, progress=False
    )
    assert torch.allclose(padded["mlp"], short["mlp"], atol=1e-4)


def test_rotary_models_run_beyond_what_they_were_trained_for() -> None:
    out = activation_patching(tiny_model("llama"), None, SITES, *runs_of(200), progress=False)
    assert out["mlp"].isfinite().all()
