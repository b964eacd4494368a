"""Gemma 3 with vision: its text model, by plain hooks, and by the same model without vision."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from nnsight import NNsight
from transformers import Gemma3ForConditionalGeneration

from nnpatch_core import (
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import AdapterError, PaddingWarning
from nnpatch_core.infer import read_model
from nnpatch_core.plugins import find_adapter
from nnpatch_core.testing import run_checks, tiny_model
from nnpatch_gemma import Gemma3, Gemma3Vision
from tests.helpers.family_oracle import POST_NORMS, FamilyOracle, Layout
from tests.helpers.oracle import COMPONENTS

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCE = [(5, 6, 7, 8, 9, 10), (21, 22, 23, 24)]
TARGET = [(5, 16, 7, 18, 9, 10), (21, 32, 23, 24)]
ANSWERS = torch.tensor([20, 21]), torch.tensor([30, 31])
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
EVERYTHING = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -2, -4])


def padded(prompts: list[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor([[0] * (6 - len(prompt)) + list(prompt) for prompt in prompts])


TOKENS = padded(SOURCE), padded(TARGET)


@functools.cache
def model_and_oracle() -> tuple[Any, FamilyOracle]:
    model = tiny_model("gemma3")
    return model, FamilyOracle(model, Layout("model.language_model.layers", [POST_NORMS]))


def test_the_model_is_the_one_with_vision() -> None:
    model, _ = model_and_oracle()
    assert isinstance(model, Gemma3ForConditionalGeneration)
    assert len(model.model.vision_tower.encoder.layers) != len(model.model.language_model.layers)
    windows = model.config.get_text_config().layer_types
    assert {"sliding_attention", "full_attention"} == set(windows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_adapter_passes_the_kit(attention: str) -> None:
    model = tiny_model("gemma3", attn_implementation=attention)
    results = run_checks(Gemma3Vision, model)
    assert {result.status for result in results} == {"passed"}, results


def test_it_is_found_by_the_model_and_each_type_has_one_adapter() -> None:
    assert find_adapter(None, model_and_oracle()[0]) is Gemma3Vision
    assert find_adapter(None, tiny_model("gemma3_text")) is Gemma3
    assert not set(Gemma3.model_types) & set(Gemma3Vision.model_types)


@pytest.mark.parametrize("engine", ["auto", "full"])
def test_activation_patching(engine: str) -> None:
    model, oracle = model_and_oracle()
    out = activation_patching(
        model,
        None,
        EVERYTHING,
        *TOKENS,
        *ANSWERS,
        attention_mask=MASK,
        engine=engine,
        progress=False,
    )
    assert out.info["engine"] == {"auto": "cone", "full": "full"}[engine]
    assert (out.info["adapter"], out.info["model_type"]) == ("Gemma3Vision", "gemma3")
    for name in COMPONENTS:
        for layer in range(3):
            for head in oracle.heads(name, layer):
                for back in (1, 2, 4):
                    index = (layer, 6 - back, *(() if head is None else (head,)))
                    for row, (source, target) in enumerate(zip(SOURCE, TARGET, strict=True)):
                        logits = oracle.patched(target, source, [(name, layer, head, back)])
                        expected = logits[ANSWERS[0][row]] - logits[ANSWERS[1][row]]
                        found = out.patched(name)[index][row]
                        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def alone() -> Any:
    """The text model, without what sees."""
    model, _ = model_and_oracle()
    text = tiny_model("gemma3_text")
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    return text


def test_every_sweep_gives_what_the_text_model_gives() -> None:
    model, text = model_and_oracle()[0], alone()
    options = {"attention_mask": MASK, "progress": False}
    sweeps = (
        lambda model: activation_patching(model, None, EVERYTHING, *TOKENS, *ANSWERS, **options),
        lambda model: ablation_patching(
            model, None, EVERYTHING, TOKENS[1], *ANSWERS, method="mean", **options
        ),
        lambda model: attribution_patching(
            model, None, EVERYTHING, *TOKENS, *ANSWERS, qk_fix=True, grad_drop=True, **options
        ),
        lambda model: activation_patching(
            model, None, EVERYTHING, *TOKENS, *ANSWERS, screen="atp*", top_k=9, **options
        ),
    )
    for sweep in sweeps:
        with_vision, without = sweep(model), sweep(text)
        assert with_vision.info["engine"] == without.info["engine"] != "full"
        for name in COMPONENTS:
            assert without[name].abs().max() > 0.01
            torch.testing.assert_close(with_vision[name], without[name], atol=1e-4, rtol=1e-4)


def test_in_ones_own_trace() -> None:
    model, oracle = model_and_oracle()
    site = Site.get_site(Gemma3Vision, "o", layer=1, head=2, seq_pos=[-1])
    nnmodel = NNsight(model)
    with torch.no_grad(), nnmodel.trace(torch.tensor([SOURCE[0]])):
        site.cache(nnmodel)
    expected = oracle.activation(SOURCE[0], "o", 1)[-1, 16:24]
    torch.testing.assert_close(site.value[0, 0], expected, atol=1e-5, rtol=0)


def test_padding_without_a_mask_is_told() -> None:
    """Its padding token is in the config of its text model."""
    model, _ = model_and_oracle()
    with pytest.warns(PaddingWarning):
        activation_patching(
            model, None, Sites("resid", seq_pos_type="last"), *TOKENS, *ANSWERS, progress=False
        )


def test_the_adapter_of_the_text_models_does_not_fit() -> None:
    model, _ = model_and_oracle()
    sites = Sites("resid", seq_pos_type="last")
    options = {"attention_mask": MASK, "progress": False}
    with pytest.raises(AdapterError, match=r"'Gemma3' .*'model\.layers'; .*gemma3_text.* api=None"):
        activation_patching(model, "Gemma3", sites, *TOKENS, *ANSWERS, **options)


def test_it_can_be_inferred() -> None:
    """It is alike in all that the kit looks at, so that it passes the kit as well."""
    found = read_model(model_and_oracle()[0]).adapter
    for name in ("layers", "query_heads", "key_value_heads", "residual", "padding", "cone"):
        assert getattr(found, name) == getattr(Gemma3Vision, name), name
    for name in ("components", "kinds"):
        assert dict(getattr(found, name)) == dict(getattr(Gemma3Vision, name)), name
