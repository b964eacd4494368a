"""Hooks on the whole model, on what is looked through, and prompts that are treated apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from nnsight import NNsight
from torch import nn

from nnpatch_core import Sites, activation_patching, attribution_patching, infer_adapter, per_prompt
from nnpatch_core.errors import AdapterError, CheckpointError, EngineWarning, MetricError
from nnpatch_core.metrics import logit_difference
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 4], [9, 6, 7, 8, 2, 4], [5, 1, 7, 3, 9, 4]])
TARGET = torch.tensor([[5, 6, 3, 8, 9, 4], [9, 11, 7, 8, 2, 4], [5, 1, 7, 3, 20, 4]])
ANSWERS = torch.tensor([20, 21, 22]), torch.tensor([30, 31, 32])
SITES = Sites("resid", seq_pos_type="each")
#: What PEFT calls in transformers, in some releases.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

SHIFT = 2 * torch.randn(32, generator=torch.Generator().manual_seed(1))
FULL = pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")


def sweep(model: Any, patch: Any = activation_patching, **options: Any) -> Any:
    runs = (SOURCE, TARGET, *ANSWERS)
    return patch(model, Llama3, SITES, *runs, progress=False, **options)


def scaled(module: nn.Module, inputs: Any, output: Any) -> Any:
    output.logits = output.logits.clone()
    output.logits[:, :, 20] += 5 * output.logits[:, :, 3]
    return output


def difference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(tokens).logits[:, -1]
    rows = torch.arange(len(tokens))
    return logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]


@FULL
@pytest.mark.parametrize("wrap", [lambda model: model, NNsight])
@pytest.mark.parametrize("options", [{}, {"engine": "full"}, {"patch": attribution_patching}])
def test_a_hook_on_the_whole_model_is_part_of_it(wrap: Any, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    plain = difference(model, TARGET)
    model.register_forward_hook(scaled)
    expected = difference(model, TARGET)
    assert (expected - plain).abs().max() > 0.1
    out = sweep(wrap(model), **options)
    found = out.baseline
    assert out.info["hooks"] == "the forward hook `scaled` on the model itself"
    assert "hooks" not in sweep(tiny_model("llama")).info
    torch.testing.assert_close(found.target, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.source, difference(model, SOURCE), atol=1e-4, rtol=0)


def lora() -> Any:
    return peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    "make", [lora, lambda: torch.compile(tiny_model("llama"), backend="eager")]
)
def test_a_hook_on_what_is_looked_through_is_refused(make: Any) -> None:
    model = make()
    model.register_forward_hook(scaled)
    with pytest.raises(AdapterError, match=r"`scaled` as a hook .* put it on that model"):
        sweep(model)


def test_a_forward_of_what_is_looked_through_is_refused() -> None:
    model = lora()
    inner = model.forward
    model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(AdapterError, match="a forward of its own"):
        sweep(model)


class Steered(nn.Module):
    """A module that treats one row of a batch in a way of its own, without a hook."""

    def __init__(self, inner: nn.Module, row: int) -> None:
        super().__init__()
        self.inner, self.row = inner, row

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        found = self.inner(hidden).clone()
        if len(found) > self.row:
            found[self.row] += SHIFT
        return found


@pytest.mark.parametrize("row", [0, 1, 2])
def test_any_prompt_that_is_treated_apart_is_found_out(row: int) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = Steered(model.model.layers[1].mlp, row)
    with pytest.warns(EngineWarning, match="gives other logits than run as a whole"):
        out = sweep(model)
    full = sweep(model, engine="full")
    torch.testing.assert_close(out["resid"], full["resid"], atol=1e-4, rtol=0)


@FULL
def test_a_checkpoint_knows_hooks_that_the_unpatched_runs_never_reach(tmp_path: Path) -> None:
    def clamp(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.clamp(-1e6, 1e6)

    def wider(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.clamp(-2e6, 2e6)

    def run(hook: Any) -> None:
        model = tiny_model("llama")
        if hook is not None:
            model.model.layers[2].mlp.register_forward_hook(hook)
        sweep(model, checkpoint=tmp_path / "c", engine="full")

    run(clamp)
    run(clamp)
    for other in (None, wider):
        with pytest.raises(CheckpointError, match="hooks: "):
            run(other)


def test_a_false_per_prompt_is_found_at_any_prompt() -> None:
    random = torch.Generator().manual_seed(0)
    source, target = (torch.randint(1, 60, (12, 4), generator=random) for _ in range(2))
    answers = [torch.randint(1, 60, (12,), generator=random) for _ in range(2)]
    sign = torch.ones(12)
    sign[9] = -1

    @per_prompt
    def by_place(logits: torch.Tensor, context: Any) -> torch.Tensor:
        return sign[: len(logits)] * logit_difference(logits, context)

    with pytest.raises(MetricError, match=r"'by_place' is declared with per_prompt, but gives"):
        activation_patching(
            tiny_model("llama"),
            Llama3,
            SITES,
            source,
            target,
            *answers,
            metric=by_place,
            progress=False,
        )


def test_inference_names_the_hook_that_its_checks_see() -> None:
    model = tiny_model("gpt2")
    shift = SHIFT[: model.config.n_embd]
    model.transformer.h[1].mlp.register_forward_hook(lambda m, i, out: 1.7 * out + shift)
    with pytest.raises(AdapterError, match=r"The model has the forward hook .* infer .* without"):
        infer_adapter(model)
