"""A subspace is learned of one model, however it is wrapped or where its weights are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from nnsight import NNsight, TransformersModel

from nnpatch_core import Site
from nnpatch_core.subspace import Subspace, Trained, evaluate_subspace
from nnpatch_core.testing import tiny_model
from tests.helpers.families import FAMILIES
from tests.helpers.lessons import last, learned, some_pairs, tokenizer

peft = pytest.importorskip("peft")

#: What PEFT, accelerate and transformers say of their own doings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:accelerate"),
]


def not_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return TransformersModel(str(folder), task="text-generation", tokenizer=tokenizer())


def adapted(model: Any, _: Path) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


WRAPPED: dict[str, Callable[[Any, Path], Any]] = {
    "nnsight": lambda model, _: NNsight(model),
    "transformers model": lambda model, _: TransformersModel(model, tokenizer=tokenizer()),
    "not loaded": not_loaded,
    "compiled": lambda model, _: torch.compile(model),
    "PEFT": adapted,
    "in host memory": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "on disk": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
}


@functools.cache
def expected(engine: str) -> Trained:
    return learned(tiny_model("llama"), engine=engine, random_model=engine == "cone")


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", WRAPPED)
def test_it_is_the_same_model(name: str, engine: str, tmp_path: Path) -> None:
    wanted = expected(engine)
    nnmodel = WRAPPED[name](tiny_model("llama"), tmp_path)
    module = getattr(nnmodel, "_module", nnmodel)
    asked = {path: weight.requires_grad for path, weight in module.named_parameters()}
    found = learned(nnmodel, engine=engine, random_model=engine == "cone")
    assert found.evaluation.engine == engine
    torch.testing.assert_close(found.subspace.basis, wanted.subspace.basis, atol=1e-4, rtol=0)
    for one, other in zip(found.history, wanted.history, strict=True):
        assert one.held_out_loss == pytest.approx(other.held_out_loss, abs=1e-5)
    if engine == "cone":
        # PEFT has no say in a model that is made anew.
        model = found.evaluation["random model"]
        assert model == wanted.evaluation["random model"]
    measured = evaluate_subspace(nnmodel, None, last(), some_pairs(), Subspace.random(32))
    plain = evaluate_subspace(tiny_model("llama"), None, last(), some_pairs(), Subspace.random(32))
    assert measured.rows == plain.rows
    module = getattr(nnmodel, "_module", nnmodel)
    assert {path: weight.requires_grad for path, weight in module.named_parameters()} == asked
    assert all(weight.grad is None for weight in module.parameters())
    assert not any(module.training for module in module.modules())


def test_weights_that_come_late_ask_for_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnpatch_core.subspace import learning

    nnmodel, real, seen = not_loaded(tiny_model("llama"), tmp_path), learning.Learner.gradient, []

    def spy(self: Any, *arguments: Any) -> Any:
        seen.append(any(weight.requires_grad for weight in nnmodel._module.parameters()))
        return real(self, *arguments)

    monkeypatch.setattr(learning.Learner, "gradient", spy)
    learned(nnmodel)
    assert seen
    assert not any(seen)


def test_tied_weights_stay_tied() -> None:
    model, api = tiny_model("gpt2"), FAMILIES["gpt2"].api
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.lm_head.weight.clone()
    found = [
        learned(model, api=api, site=Site.get_site(api, "q", 1, 2, seq_pos=[-1]), engine=engine)
        for engine in ("cone", "full")
    ]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, before)
    losses = [each.history[-1].held_out_loss for each in found]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
