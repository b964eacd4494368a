"""Hooks of the user's own on the model: whole forwards by default, and never another number."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from torch import Tensor, nn

from nnpatch_core import (
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    plan_sweep,
)
from nnpatch_core.errors import EngineError, EngineWarning, GradientError
from nnpatch_core.memory import needs as memory
from nnpatch_core.testing import tiny_model, tiny_tokenizer
from nnpatch_core.tracing import backward_hooks, forward_hooks
from nnpatch_llama import Llama3

#: That it is said is a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 9, 4], [9, 8, 7, 6, 5, 4]])
TARGET = torch.tensor([[5, 9, 7, 8, 9, 4], [5, 6, 7, 3, 9, 4], [9, 8, 7, 6, 4, 3]])
ANSWERS = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])
SITES = Sites(["q", "mlp", "resid"], seq_pos_type="each")
ROUNDING = 1e-4


def sweep(model: Any, prompts: int = 3, sites: Any = SITES, **options: Any) -> Any:
    runs = [each[:prompts] for each in (SOURCE, TARGET, *ANSWERS)]
    return activation_patching(model, Llama3, sites, *runs, progress=False, **options)


def steered(row: int, size: float = 0.5) -> Callable[..., Any]:
    """Adds something to one prompt, as people steer."""

    def steer(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row] += size
        return output

    return steer


def everywhere(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.5


def not_while_decoding(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    return output + 0.5 if output.shape[1] > 1 else None


# What hooks there are.


def on_all_modules(model: nn.Module, request: pytest.FixtureRequest) -> None:
    inner, steer = model.model.layers[1].mlp, steered(0)

    def steer_one(module: nn.Module, args: Any, output: Any) -> Any:
        return steer(module, args, output) if module is inner else None

    hook = torch.nn.modules.module.register_module_forward_hook(steer_one)
    request.addfinalizer(hook.remove)


def on_the_way_in(model: nn.Module, request: pytest.FixtureRequest) -> None:
    def steer_input(module: nn.Module, args: Any) -> Any:
        return (steered(0)(module, args, args[0]), *args[1:])

    model.model.layers[1].mlp.register_forward_pre_hook(steer_input)


def on_the_way_in_with_keywords(model: nn.Module, request: pytest.FixtureRequest) -> None:
    def steer_keywords(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = steered(0)(module, args, kwargs["hidden_states"])
        return args, {**kwargs, "hidden_states": hidden}

    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(steer_keywords, with_kwargs=True)


def in_place_of_forward(model: nn.Module, request: pytest.FixtureRequest) -> None:
    mlp = model.model.layers[1].mlp
    forward = mlp.forward

    @functools.wraps(forward)
    def steering(hidden: Tensor) -> Tensor:
        return steered(0)(mlp, (), forward(hidden))

    mlp.forward = steering


def as_a_method_in_place_of_forward(model: nn.Module, request: pytest.FixtureRequest) -> None:
    def method(self: nn.Module, hidden: Tensor) -> Tensor:
        return steered(0)(self, (), type(self).forward(self, hidden))

    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(method, mlp)


def on_the_way_out(model: nn.Module, request: pytest.FixtureRequest) -> None:
    model.model.layers[1].mlp.register_forward_hook(steered(0))


def without_gradients(model: nn.Module, request: pytest.FixtureRequest) -> None:
    model.model.layers[1].mlp.register_forward_hook(torch.no_grad()(steered(0)))


#: And the words for each.
PUT: dict[Callable[..., None], str] = {
    on_the_way_out: "forward hook `steer` on 'model.layers.1.mlp'",
    on_the_way_in: "forward pre-hook `steer_input` on 'model.layers.1.mlp'",
    on_the_way_in_with_keywords: "pre-hook `steer_keywords` on 'model.layers.1.self_attn'",
    on_all_modules: "forward hook `steer_one` on all modules",
    in_place_of_forward: "put in place of 'model.layers.1.mlp'",
    as_a_method_in_place_of_forward: "forward `method` put in place of 'model.layers.1.mlp'",
    without_gradients: "forward hook `steer` on 'model.layers.1.mlp'",
}


def whole_forwards(model: nn.Module, prompts: int, layer: int, position: int) -> Tensor:
    """`[batch]`: the metric with the source's residual stream after a layer, by plain hooks."""
    source, target, right, wrong = (each[:prompts] for each in (SOURCE, TARGET, *ANSWERS))
    kept: list[Tensor] = []
    place = model.model.layers[layer]

    def overwrite(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        patched = output.clone()
        patched[:, position] = kept[0][:, position]
        return patched

    with torch.no_grad():
        # Before whatever else hangs there, as a site is what its module itself gives.
        with place.register_forward_hook(lambda *seen: kept.append(seen[-1]), prepend=True):
            model(source)
        with place.register_forward_hook(overwrite, prepend=True):
            logits = model(target).logits[:, -1]
    rows = torch.arange(prompts)
    return logits[rows, right] - logits[rows, wrong]


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_hook_on_one_prompt_runs_in_whole_forwards(
    put: Callable[..., None], prompts: int, request: pytest.FixtureRequest
) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    for each in (model, plain):
        put(each, request)
    expected = {
        (layer, position): whole_forwards(plain, prompts, layer, position)
        for layer in (0, 1, 2)
        for position in (0, 3, 5)
    }
    for _ in range(2):  # and again, now that the model is wrapped
        out = sweep(model, prompts)
        assert out.info["engine"] == "full"
        assert PUT[put] in out.info["fallback"]
        for (layer, position), value in expected.items():
            found = out.patched("resid")[layer, position]
            torch.testing.assert_close(found, value, atol=ROUNDING, rtol=0)


def test_a_hook_on_what_is_patched_comes_after_the_patch() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    for each in (model, plain):
        each.model.layers[1].register_forward_hook(steered(0))
    out = sweep(model)
    found = out.patched("resid")[1, 3]
    torch.testing.assert_close(found, whole_forwards(plain, 3, 1, 3), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_ablation_too(method: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    given = (TARGET, *ANSWERS)
    options = {"method": method, "progress": False}
    out = ablation_patching(model, Llama3, SITES, *given, **options)
    assert out.info["engine"] == "full"
    assert "`steer`" in out.info["fallback"]


def test_a_screened_sweep_too() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    out = sweep(model, screen="attribution", top_k=5)
    assert "full" in out.info["engine"]
    whole = sweep(model)
    for name in out:
        exact = out.exact(name)
        torch.testing.assert_close(out[name][exact], whole[name][exact], atol=ROUNDING, rtol=0)


def test_several_hooks_are_counted() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(steered(0))
    assert "'model.layers.0.mlp' (and 2 more)" in sweep(model).info["fallback"]


# The cone engine, where it is asked for.


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("budget", [None, 120_000])
def test_a_hook_on_one_row_is_found_out(
    layer: int, prompts: int, row: int, budget: int | None
) -> None:
    model = tiny_model("llama")
    model.model.layers[layer].mlp.register_forward_hook(steered(row))
    with pytest.raises(EngineError, match="gives other logits than run as a whole"):
        sweep(model, prompts, Sites("resid_pre", seq_pos_type="each"), engine="cone")


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("wide", [True, False])
def test_a_hook_that_skips_single_tokens_is_found_out(
    layer: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the last position makes a trace of its own.
    monkeypatch.setitem(memory._OVERHEAD, "cpu", 0.0)
    model = tiny_model("llama")
    model.model.layers[layer].mlp.register_forward_hook(not_while_decoding)
    sites = Sites("resid_pre", seq_pos_type="each" if wide else "last")
    with pytest.raises(EngineError, match="gives other logits than run as a whole"):
        sweep(model, sites=sites, engine="cone")


@pytest.mark.parametrize("budget", [None, 120_000])
@pytest.mark.parametrize("at", ["model.layers.1.mlp", "model.layers.1", "lm_head", "model"])
def test_a_hook_that_treats_all_alike_may_run_in_the_cone(at: str, budget: int | None) -> None:
    model = tiny_model("llama")

    def steer(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output * 1.5
        output.last_hidden_state = output.last_hidden_state * 1.5
        return output

    model.get_submodule(at).register_forward_hook(steer)
    prompts = 3 if budget is None else 1
    expected = sweep(model, prompts)
    assert expected.info["engine"] == "full"
    out = sweep(model, prompts, engine="cone", memory_budget=budget)
    for name in out:
        torch.testing.assert_close(out[name], expected[name], atol=ROUNDING, rtol=0)
    plain = sweep(tiny_model("llama"), prompts)
    assert (out.patched("resid") - plain.patched("resid")).abs().max() > 0.1


def test_a_hook_on_the_head_sees_the_whole_vocabulary() -> None:
    model = tiny_model("llama")

    def capped(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output - output.mean(-1, keepdim=True) * (output.shape[-1] / 64)

    model.lm_head.register_forward_hook(capped)
    out, expected = sweep(model, engine="cone"), sweep(model)
    for name in out:
        torch.testing.assert_close(out[name], expected[name], atol=ROUNDING, rtol=0)


def test_a_plan_says_that_it_is_not_what_the_default_does() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    with pytest.warns(EngineWarning, match="plan of engine='cone'.*`steer`"):
        plan_sweep(model, Llama3, SITES, SOURCE, TARGET)


# Prompts in several parts.


@pytest.mark.parametrize("engine", ["auto", "full"])
def test_prompts_in_several_parts_meet_the_hook_as_other_rows(engine: str) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    match = "`steer` on 'model.layers.1.mlp', and the prompts run in several parts"
    with pytest.warns(EngineWarning, match=match):
        out = sweep(model, batch_size=1, engine=engine)
    alone = sweep(model, 1)
    torch.testing.assert_close(
        out.patched("resid")[..., 0], alone.patched("resid")[..., 0], atol=ROUNDING, rtol=0
    )
    with pytest.warns(EngineWarning, match=match):
        ablation_patching(
            model, Llama3, SITES, TARGET, *ANSWERS, batch_size=2, progress=False, engine=engine
        )
    with pytest.warns(EngineWarning, match=match):
        attribution_patching(
            model, Llama3, SITES, SOURCE, TARGET, *ANSWERS, batch_size=2, progress=False
        )


# Gradients.


def estimate(model: Any, prompts: int = 3, sites: Any = SITES, **options: Any) -> Any:
    runs = [each[:prompts] for each in (SOURCE, TARGET, *ANSWERS)]
    return attribution_patching(model, Llama3, sites, *runs, progress=False, **options)


def test_an_estimate_goes_through_the_hook() -> None:
    """By plain hooks: the gradient at what a layer gives, times what would be put there."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    for each in (model, plain):
        each.model.layers[2].mlp.register_forward_hook(steered(0, 1.0))
        each.model.layers[1].register_forward_hook(lambda *seen: seen[-1] ** 3)
    kept: list[Tensor] = []
    with plain.model.layers[1].register_forward_hook(
        lambda *seen: kept.append(seen[-1].detach()), prepend=True
    ):
        plain(SOURCE)
        plain(TARGET)
    leaf = kept[1].clone().requires_grad_()
    with plain.model.layers[1].register_forward_hook(lambda *seen: leaf, prepend=True):
        logits = plain(TARGET).logits[:, -1]
    rows = torch.arange(3)
    (logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]).sum().backward()
    change = (leaf.grad * (kept[0] - kept[1])).sum(-1).T
    out = estimate(model)
    found = out.patched("resid")[1] - out.baseline.target
    torch.testing.assert_close(found.float(), change, atol=ROUNDING, rtol=1e-3)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize(
    ("options", "words"),
    [({"steps": 3}, "integrated gradients"), ({"qk_fix": True}, "the QK fix cannot be applied")],
)
def test_what_runs_again_with_other_rows_finds_the_hook_out(
    options: dict[str, Any], words: str, prompts: int
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.v_proj.register_forward_hook(steered(0))
    sites = Sites(["q", "k"], seq_pos_type="each")
    with pytest.raises(GradientError, match=f"{words}.*`steer` on"):
        estimate(model, prompts, sites, **options)


@pytest.mark.parametrize("options", [{"steps": 3}, {"qk_fix": True}])
def test_a_hook_that_treats_all_alike_is_estimated(options: dict[str, Any]) -> None:
    model, built = tiny_model("llama"), tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(everywhere)
    for layer in built.model.layers:
        inner = layer.self_attn.v_proj
        inner.bias = nn.Parameter(torch.full((inner.out_features,), 0.5))
    sites = Sites(["q", "k", "mlp"], seq_pos_type="each")
    found, expected = estimate(model, 3, sites, **options), estimate(built, 3, sites, **options)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=ROUNDING, rtol=0)


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "global", "pre"])
def test_a_hook_on_gradients_is_told(register: str, request: pytest.FixtureRequest) -> None:
    model = tiny_model("llama")
    expected = sweep(model)

    def halve(module: nn.Module, *gradients: Any) -> Any:
        return None

    mlp = model.model.layers[1].mlp
    if register == "global":
        hook = torch.nn.modules.module.register_module_full_backward_hook(halve)
        request.addfinalizer(hook.remove)
    elif register == "pre":
        mlp.register_full_backward_pre_hook(halve)
    else:
        mlp.register_full_backward_hook(halve)
    with pytest.warns(EngineWarning, match=r"backward (pre-)?hook `halve` on .*change gradients"):
        estimate(model)
    # Without gradients it does nothing.
    out = sweep(model)
    assert out.info["engine"] == "cone"
    assert torch.equal(out["resid"], expected["resid"])


# A forward that nnsight does not see.


def test_a_forward_replaced_after_wrapping_where_it_is_patched() -> None:
    model = tiny_model("llama")
    sweep(model)
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    for engine in ("auto", "full", "cone"):
        with pytest.raises(EngineError, match=r"'model.layers.1' was replaced after nnsight"):
            _without_warnings(sweep, model, engine=engine)
    with pytest.raises(EngineError, match=r"'model.layers.1' was replaced after nnsight"):
        _without_warnings(estimate, model)
    del layer.forward


def _without_warnings(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """nnsight warns of it, each time that it wraps the model."""
    with pytest.warns(UserWarning, match="after nnsight wrapped this module"):
        return call(*args, **kwargs)


# What is no hook of the user's own.


def _dispatched(model: nn.Module, folder: Path) -> Any:
    return accelerate.dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)


def _with_lora(model: nn.Module, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model


def _with_outputs(model: nn.Module, folder: Path) -> Any:
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
    assert any(layer._forward_hooks for layer in model.model.layers)
    return model


def _asking_for_gradients(model: nn.Module, folder: Path) -> Any:
    model.enable_input_require_grads()
    return model


def _with_weight_norm(model: nn.Module, folder: Path) -> Any:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.model.layers[0].mlp.up_proj)
    return model


def _sourced(model: nn.Module, folder: Path) -> Any:
    nnmodel = NNsight(model)
    assert nnmodel.model.layers[0].self_attn.source is not None
    with torch.no_grad(), nnmodel.trace(torch.tensor([[5, 6]])):
        nnmodel.model.layers[0].mlp.source.self_down_proj_0.output.save()
    return nnmodel


def _text_model(model: nn.Module, folder: Path) -> Any:
    return TransformersModel(model, tokenizer=tiny_tokenizer(["a b c"]))


DRESSED: list[Callable[[nn.Module, Path], Any]] = [
    lambda model, folder: model,
    lambda model, folder: NNsight(model),
    _text_model,
    _dispatched,
    lambda model, folder: NNsight(_dispatched(model, folder)),
    _with_lora,
    _with_outputs,
    _asking_for_gradients,
    _with_weight_norm,
    _sourced,
]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("dress", DRESSED)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "gemma2", "gemma3_text"])
def test_nothing_falls_back_without_need(dress: Any, family: str, tmp_path: Path) -> None:
    model = dress(tiny_model(family), tmp_path)
    runs = (SOURCE, TARGET, *ANSWERS)
    for _ in range(2):
        out = activation_patching(
            model, None, Sites("resid", layers=[1], seq_pos_type="last"), *runs, progress=False
        )
        assert out.info["engine"] == "cone", out.info.get("fallback")
    module = getattr(model, "_module", model)
    assert forward_hooks(module) == backward_hooks(module) == []


def test_a_site_of_ones_own_trace_is_left_alone() -> None:
    """In the user's own trace all hooks are live, and no engine chooses."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    nnmodel, site = NNsight(model), Site.get_site(Llama3, "resid", 1, seq_pos=[3])
    with torch.no_grad():
        with nnmodel.trace(SOURCE):
            site.cache(nnmodel)
        with nnmodel.trace(TARGET):
            site.patch(nnmodel)
            logits = nnmodel.output.logits[:, -1].save()
    rows = torch.arange(3)
    found = logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]
    torch.testing.assert_close(found, whole_forwards(model, 3, 1, 3), atol=ROUNDING, rtol=0)


def test_whole_forwards_are_said_with_what_they_cost() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.register_forward_hook(steered(0))
    match = r"the forward hook `steer` on 'model.layers.1.mlp', .*costs about \d+\.\d times"
    with pytest.warns(EngineWarning, match=match):
        sweep(model)
