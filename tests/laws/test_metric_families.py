"""Positions and sequences on other families: capped logits, fused projections, odd unembeddings."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Site,
    Sites,
    activation_patching,
    attribution_patching,
    infer_adapter,
    per_prompt,
    reads_activations,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.engine.cone import execution
from nnpatch_core.testing import tiny_model
from tests.helpers.oracle import lay_out, random_prompts

FAMILIES = ("llama", "gemma2", "gemma3_text", "mistral", "gpt2", "gpt_neox", "qwen2", "cohere")
SOURCES, TARGETS = random_prompts((6, 4, 5), 3), random_prompts((6, 4, 5), 4)
OWN = torch.tensor([[3, 8, -1], [4, -1, -1], [5, 6, 7]])
ANSWERS = torch.tensor([3, 4, 5]), torch.tensor([9, 10, 11])


@per_prompt
@reads_positions([-3, -2])
@reads_tokens(lambda context: torch.tensor([[7, 9, 30]]))
def few(logits: Tensor) -> Tensor:
    return (logits[..., 7] - logits[..., 9]).sum(1) + logits[:, 0, 30].tanh()


@reads_positions([-4, -1])
def spread(logits: Tensor, context: MetricContext) -> Tensor:
    own = (logits - context.target_logits).square().mean((1, 2)) + logits[:, 0, 5]
    return own - own.mean() / 2


METRICS: dict[str, Any] = {
    "few": few,
    "spread": spread,
    "loss": "loss",
    "sequence": "sequence_log_probability",
}
WARNED = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")


def written(api: Any) -> Any:
    """What a head and a block write, and what comes into a layer."""
    places = [("o", 0), ("attn", None), ("resid_pre", None), ("q", 1)]
    sites = [Site.get_site(api, name, 1, head, [-2, -1]) for name, head in places]

    @per_prompt
    @reads_activations(sites)
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        return torch.stack([context.activations[each].tanh().mean((1, 2)) for each in sites]).sum(0)

    return mine


@functools.cache
def family_of(name: str) -> tuple[Any, Any]:
    """A model, and the adapter that is inferred for it, which takes hundreds of runs."""
    model = tiny_model(name)
    return model, infer_adapter(model)


def swept(family: str, **options: Any) -> Any:
    (source, mask), (target, _) = lay_out(SOURCES, "left"), lay_out(TARGETS, "left", seed=1)
    estimated = options.pop("estimated", False)
    patch = attribution_patching if estimated else activation_patching
    model, api = family_of(family)
    return patch(
        model,
        api,
        Sites(["resid", "mlp"], layers=[0, 1], seq_pos_type="lastk", seq_pos=4),
        source,
        target,
        *ANSWERS,
        attention_mask=mask,
        metric={**METRICS, "written": written(api)},
        source_answer_tokens=OWN,
        progress=False,
        **options,
    )


@WARNED
@pytest.mark.parametrize("family", FAMILIES)
def test_both_engines_agree_and_parts_change_nothing(family: str) -> None:
    full = swept(family, engine="full")
    for options in ({"engine": "cone"}, {"engine": "cone", "batch_size": 2}):
        out = swept(family, **options)
        assert "fallback" not in out.info
        for name in out.metrics:
            for site in out:
                gap = (out.raw[name][site] - full.raw[name][site]).abs().max()
                assert gap < 1e-4, (name, site, gap)
    one, parts = (swept(family, estimated=True, batch_size=size) for size in (None, 2))
    for name in one.metrics:
        for site in one:
            assert (one.raw[name][site] - parts.raw[name][site]).abs().max() < 1e-4


@WARNED
def test_an_unembedding_that_is_no_plain_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the model itself projects, at the positions that some prompt reads."""
    plain = swept("gemma2", engine="cone")
    monkeypatch.setattr(execution, "find_unembedding", lambda model: None)
    out = swept("gemma2", engine="cone")
    assert "fallback" not in out.info
    for name in out.metrics:
        for site in out:
            assert (out.raw[name][site] - plain.raw[name][site]).abs().max() < 1e-5


@WARNED
def test_unpatched_logits_are_the_models_own() -> None:
    for family in FAMILIES:
        model, _ = family_of(family)
        out = swept(family, engine="full")
        for row, prompt in enumerate(TARGETS):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt])).logits[0].float()
            log_probabilities = logits.log_softmax(-1)
            own = torch.tensor(prompt[1:])
            loss = -log_probabilities[:-1].gather(1, own[:, None]).mean()
            found = out.for_metric("loss").baseline.target[row]
            torch.testing.assert_close(found, loss, atol=2e-5, rtol=0, msg=family)
