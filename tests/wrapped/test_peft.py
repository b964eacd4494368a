"""Models that PEFT has wrapped give the numbers of the adapted model, or are refused."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import NNsight, TransformersModel
from torch import nn

import nnpatch_core
from nnpatch_core import (
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    cache_average,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core.errors import AdapterError, TokensError
from nnpatch_core.testing import run_checks, tiny_model, tiny_tokenizer
from nnpatch_llama import Llama3
from tests.helpers.oracle import COMPONENTS, Oracle, Place
from tests.helpers.samples import LONGER

peft = pytest.importorskip("peft")

#: What PEFT and transformers say of their own doings, on each end of the ranges.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

SITES = Sites(COMPONENTS, seq_pos_type="custom", seq_pos=[-1, -3])
SOURCE, TARGET, ANSWERS = LONGER
INSIDE = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
#: Rounding of float32: what is merged is added up in another order.
ROUNDING = 1e-5

LORA = {"r": 4, "target_modules": INSIDE}
ADAPTERS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(**LORA, task_type="CAUSAL_LM"),
    "LoRA, no task": lambda: peft.LoraConfig(**LORA),
    "LoRA on embedding and head": lambda: peft.LoraConfig(
        r=4, target_modules=[*INSIDE, "embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    ),
    "LoRA and a head that is trained": lambda: peft.LoraConfig(
        **LORA, modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    ),
    "LoRA and some tokens": lambda: peft.LoraConfig(
        **LORA, trainable_token_indices=[5, 16], task_type="CAUSAL_LM"
    ),
    "DoRA": lambda: peft.LoraConfig(**LORA, use_dora=True, task_type="CAUSAL_LM"),
    "IA3": lambda: peft.IA3Config(
        target_modules=INSIDE, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LoHa": lambda: peft.LoHaConfig(**LORA),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        target_modules=INSIDE, total_step=10, task_type="CAUSAL_LM"
    ),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
}
VIRTUAL: dict[str, Any] = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


def adapted(config: Any, family: str = "llama", **settings: Any) -> Any:
    """A model with an adapter that is not the identity, as a fresh one is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny_model(family, **settings), config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.copy_(torch.randn(weight.shape) * 0.2)
    return model.eval()


def merged(model: Any) -> nn.Module:
    return copy.deepcopy(model).merge_and_unload()


def sweep(nnmodel: Any, api: Any = None, sites: Sites = SITES, **options: Any) -> Any:
    return activation_patching(
        nnmodel, api, sites, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


def assert_same(out: Any, expected: Any) -> None:
    for name in COMPONENTS:
        # What was not swept is nan in both.
        torch.testing.assert_close(
            out.patched(name), expected.patched(name), atol=ROUNDING, rtol=0, equal_nan=True
        )
    moved = (expected.patched("resid") - expected.baseline.target).nan_to_num()
    assert moved.abs().max() > 100 * ROUNDING


@functools.cache
def unadapted() -> Any:
    return sweep(tiny_model("llama"))


WRAPPERS: dict[str, Any] = {
    "plain": lambda model: model,
    "NNsight": NNsight,
    "TransformersModel": lambda model: TransformersModel(
        model, tokenizer=tiny_tokenizer(["a b c"]), task="text-generation"
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_numbers_are_those_of_the_merged_model(adapter: str) -> None:
    model = adapted(ADAPTERS[adapter]())
    expected = sweep(merged(model))
    assert (expected.baseline.target - unadapted().baseline.target).abs().max() > 1e-3
    for engine in ("cone", "full") if adapter == "LoRA" else ("cone",):
        out = sweep(model, engine=engine)
        assert out.info["engine"] == engine
        assert_same(out, expected)
    # Columns of heads, where a projection is an adapter's own module.
    assert out["q"].shape == (3, 6, 4)
    assert out["k"].shape == (3, 6, 2)


def test_numbers_are_those_of_plain_hooks_on_the_merged_model() -> None:
    model = adapted(ADAPTERS["LoRA"]())
    oracle = Oracle(merged(model), "llama")
    out = sweep(model)
    source, target = (tuple(each[0].tolist()) for each in (SOURCE, TARGET))
    for name in COMPONENTS:
        for head in oracle.heads(name):
            place = Place(name, 1, head, (1,))
            logits = oracle.patched(target, source, place)
            found = out.patched(name)[(1, 5) if head is None else (1, 5, head)][0]
            expected = logits[ANSWERS[0]] - logits[ANSWERS[1]]
            torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("api", [None, "Llama3", Llama3])
def test_however_it_is_wrapped_and_its_adapter_named(wrapper: str, api: Any) -> None:
    model = adapted(ADAPTERS["LoRA"]())
    out = sweep(WRAPPERS[wrapper](model), api)
    assert out.info["engine"] == "cone"
    assert_same(out, sweep(merged(model)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_entry_point(wrapper: str) -> None:
    model = adapted(ADAPTERS["LoRA"]())
    nnmodel, expected = WRAPPERS[wrapper](model), merged(model)
    options = {"progress": False}
    repairs = {"qk_fix": True, "grad_drop": True, **options}
    entries = (
        lambda it: ablation_patching(it, None, SITES, TARGET, *ANSWERS, method="mean", **options),
        lambda it: attribution_patching(it, None, SITES, SOURCE, TARGET, *ANSWERS, **repairs),
        lambda it: attribution_patching(
            it, None, SITES, SOURCE, TARGET, *ANSWERS, steps=2, **options
        ),
        lambda it: sweep(it, screen="atp*", top_k=7),
    )
    for entry in entries:
        found, wanted = entry(nnmodel), entry(expected)
        for name in COMPONENTS:
            assert wanted[name].abs().max() > 1e-3
            torch.testing.assert_close(found[name], wanted[name], atol=1e-4, rtol=1e-4)
    plans = [plan_sweep(it, None, SITES, SOURCE, TARGET) for it in (nnmodel, expected)]
    assert plans[0].token_layers == plans[1].token_layers
    sites = [Site.get_site("Llama3", "q", layer=1, head=2, seq_pos=[-1]) for _ in range(2)]
    for site, it in zip(sites, (nnmodel, expected), strict=True):
        cache_average(it, [site], torch.cat([SOURCE, TARGET]))
    torch.testing.assert_close(sites[0].value, sites[1].value, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("wrapper", ["NNsight", "TransformersModel"])
def test_in_ones_own_trace(wrapper: str) -> None:
    """Of the wrapped model, and of the model inside."""
    model = adapted(ADAPTERS["LoRA"]())
    expected = sweep(merged(model))
    nnmodel = WRAPPERS[wrapper](model)
    for traced in (nnmodel, nnmodel.base_model.model):
        site = Site.get_site(Llama3, "q", layer=1, head=2, seq_pos=[-1])
        with torch.no_grad():
            with traced.trace(input_ids=SOURCE):
                site.cache(traced)
            with traced.trace(input_ids=TARGET):
                site.patch(traced)
                logits = traced.output.logits[0, -1].save()
        found = logits[ANSWERS[0]] - logits[ANSWERS[1]]
        torch.testing.assert_close(found, expected.patched("q")[1, 5, 2], atol=ROUNDING, rtol=0)


def test_what_a_wrapped_model_knows_besides_is_kept() -> None:
    """The tokenizer, and edits that the user has made to stay."""
    model = adapted(ADAPTERS["LoRA"]())
    nnmodel = WRAPPERS["TransformersModel"](model)
    assert sweep(nnmodel).tokens is not None
    with nnmodel.edit(inplace=True):
        nnmodel.base_model.model.model.layers[0].mlp.output[:] = 0
    inside = NNsight(merged(model))
    with inside.edit(inplace=True):
        inside.model.layers[0].mlp.output[:] = 0
    expected = sweep(inside, engine="full")
    assert_same(sweep(nnmodel, engine="full"), expected)
    assert (expected.baseline.target - sweep(model).baseline.target).abs().max() > 1e-3


def test_adapters_that_are_off_switched_and_merged() -> None:
    model = adapted(ADAPTERS["LoRA"]())
    with model.disable_adapter():
        assert_same(sweep(model), unadapted())
    one = sweep(model)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".other." in name:
                weight.fill_(0.1)
    assert_same(sweep(model), one)
    model.set_adapter("other")
    other = sweep(model)
    assert_same(other, sweep(merged(model)))
    assert (other.baseline.target - one.baseline.target).abs().max() > 1e-3
    model.set_adapter("default")
    model.merge_adapter()
    assert_same(sweep(model), one)


def test_adapters_of_several_kinds_at_once() -> None:
    model = peft.get_peft_model(tiny_model("llama"), ADAPTERS["LoRA"](), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=["gate_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "hada_" in name:
                weight.fill_(0.05)
    model.set_adapter(["default", "other"])
    expected = sweep(model.base_model.model, engine="full")
    with torch.no_grad():
        logits = model(input_ids=TARGET).logits[0, -1]
    torch.testing.assert_close(expected.baseline.target[0], logits[20] - logits[30])
    assert_same(sweep(model), expected)


def test_adapters_that_were_put_in_without_a_wrapper() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), tiny_model("llama"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.fill_(0.05)
    expected = sweep(model, engine="full")
    assert (expected.baseline.target - unadapted().baseline.target).abs().max() > 1e-3
    assert_same(sweep(model), expected)


@pytest.mark.parametrize("adapter", ["LoRA", "LoRA on embedding and head", "IA3"])
def test_the_kit_and_inference(adapter: str) -> None:
    model = adapted(ADAPTERS[adapter]())
    # The kit's check of gradients wants weights that ask for one.
    model.requires_grad_(True)
    assert {result.status for result in run_checks(Llama3, model)} == {"passed"}
    found = infer_adapter(model)
    assert (found.layers, dict(found.components)) == (Llama3.layers, dict(Llama3.components))


def test_another_family() -> None:
    config = peft.LoraConfig(r=4, target_modules=INSIDE, task_type="CAUSAL_LM")
    model = adapted(config, "gemma3_text")
    assert_same(sweep(model), sweep(merged(model)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused(kind: str, wrapper: str) -> None:
    nnmodel = WRAPPERS[wrapper](adapted(VIRTUAL[kind]()))
    message = rf"PEFT's {kind} .*virtual tokens.*get_base_model.*disable_adapter"
    entries = (
        lambda: sweep(nnmodel),
        lambda: sweep(nnmodel, "Llama3"),
        lambda: ablation_patching(nnmodel, None, SITES, TARGET, *ANSWERS, progress=False),
        lambda: attribution_patching(
            nnmodel, None, SITES, SOURCE, TARGET, *ANSWERS, progress=False
        ),
        lambda: plan_sweep(nnmodel, None, SITES, SOURCE, TARGET),
        lambda: cache_average(nnmodel, [Site.get_site(Llama3, "mlp", 1)], SOURCE),
        lambda: infer_adapter(nnmodel),
    )
    for entry in entries:
        with pytest.raises(AdapterError, match=message):
            entry()


@pytest.mark.parametrize("kind", VIRTUAL)
def test_what_the_refusal_advises_works(kind: str) -> None:
    model = adapted(VIRTUAL[kind]())
    assert_same(sweep(model.get_base_model()), unadapted())
    with model.disable_adapter():
        assert_same(sweep(model), unadapted())


def test_adapters_that_look_at_each_call_are_refused() -> None:
    """An activated LoRA is off until its words come; a mixture weighs its experts by the prompt."""
    by_token = peft.LoraConfig(**LORA, alora_invocation_tokens=[7], task_type="CAUSAL_LM")
    poly = peft.PolyConfig(target_modules=INSIDE, n_tasks=2, r=2, task_type="CAUSAL_LM")
    for config in (by_token, poly):
        model = adapted(config)
        with pytest.raises(AdapterError, match="looks at each call"):
            sweep(model)


def test_an_adapted_embedding_still_says_its_vocabulary() -> None:
    model = adapted(ADAPTERS["LoRA on embedding and head"]())
    with pytest.raises(TokensError, match="63"):
        activation_patching(model, None, SITES, SOURCE + 60, TARGET, *ANSWERS, progress=False)


def test_peft_is_not_imported() -> None:
    sources = Path(nnpatch_core.__file__).parent.rglob("*.py")
    assert not [
        path for path in sources if re.search(r"^\s*(import|from) peft", path.read_text(), re.M)
    ]
