"""`api=None` with a model that no plugin claims: it is inferred, checked, and that is said."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from nnsight import NNsight, TransformersModel
from transformers import AutoConfig, AutoModelForCausalLM

from nnpatch_core import (
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    infer_adapter,
    plan_sweep,
)
from nnpatch_core.errors import AdapterError, AdapterWarning
from nnpatch_core.plugins import find_adapter, load_plugins, package_command
from nnpatch_core.plugins.known import DISTRIBUTIONS
from nnpatch_core.scaffold import package_names
from nnpatch_core.testing import causal_model_types, tiny_model, tiny_tokenizer

SOURCE, TARGET = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 9, 7, 8]])
ANSWERS = torch.tensor([20]), torch.tensor([30])
SITES = Sites(["resid", "q"], seq_pos_type="last")


def activation(model: Any, api: Any, sites: Any = SITES, **options: Any) -> Any:
    return activation_patching(
        model, api, sites, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


def screened(by: str) -> Callable[..., Any]:
    def call(model: Any, api: Any, sites: Any = SITES) -> Any:
        return activation(model, api, sites, screen=by, top_k=1, spot_checks=1)

    return call


def ablation(model: Any, api: Any, sites: Any = SITES) -> Any:
    return ablation_patching(model, api, sites, TARGET, *ANSWERS, progress=False)


def attribution(model: Any, api: Any, sites: Any = SITES) -> Any:
    return attribution_patching(model, api, sites, SOURCE, TARGET, *ANSWERS, progress=False)


def plan(model: Any, api: Any, sites: Any = SITES) -> Any:
    found = plan_sweep(model, api, sites, SOURCE, TARGET)
    return {"cells": found.cells, "token_layers": found.token_layers}


def sites_dict(model: Any, api: Any, sites: Any = SITES) -> Any:
    found = sites.get_sites_dict(model, api, TARGET)
    return {name: [site.label for site in each] for name, each in found.items()}


ENTRIES = {
    "activation": activation,
    "screened": screened("attribution"),
    "screened by AtP*": screened("atp*"),
    "ablation": ablation,
    "attribution": attribution,
    "plan": plan,
    "sites": sites_dict,
}
WRAPPED: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "nnsight": NNsight,
    "transformers model": lambda model: TransformersModel(model, tokenizer=tiny_tokenizer(["a"])),
}


def one_layer(**settings: Any) -> Any:
    """The smallest model that no plugin claims: what is inferred is of each layer by itself."""
    return tiny_model("gpt2", n_layer=1, **settings)


@functools.cache
def inferred() -> Any:
    """The adapter of such a model, asked for by name."""
    return infer_adapter(one_layer())


def numbers(outcome: Any) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value
        for name, value in outcome.items()
    }


@pytest.fixture
def put_to_test(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The adapters that were inferred, by name."""
    from nnpatch_core.infer import adapter as room

    whole, names = room.put_to_test, []

    def noted(adapter: Any, nnmodel: Any) -> Any:
        names.append(adapter.name)
        return whole(adapter, nnmodel)

    monkeypatch.setattr(room, "put_to_test", noted)
    return names


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_infers_once_and_says_so(entry: str, put_to_test: list[str]) -> None:
    model, api = one_layer(), inferred()
    expected = numbers(ENTRIES[entry](model, api))
    put_to_test.clear()
    with pytest.warns(AdapterWarning) as caught:
        found = ENTRIES[entry](model, None)
    (warning,) = caught
    # At the line of whoever called.
    assert warning.filename == __file__
    assert put_to_test == ["Gpt2"]
    assert numbers(found) == expected


@pytest.mark.parametrize("wrap", WRAPPED)
def test_however_the_model_is_wrapped(wrap: str) -> None:
    model = one_layer()
    expected = numbers(activation(model, inferred()))
    with pytest.warns(AdapterWarning):
        found = activation(WRAPPED[wrap](model), None)
    assert numbers(found) == expected
    assert found.info["adapter"] == "Gpt2"


def test_the_warning_says_what_was_found_and_how_to_keep_it() -> None:
    with pytest.warns(AdapterWarning) as caught:
        find_adapter(None, tiny_model("deepseek_v3"))
    message = str(caught[0].message)
    for part in (
        "no plugin claims model_type 'deepseek_v3'",
        "adapter 'DeepseekV3' was inferred",
        "passes its checks",
        "layers 0 to 2 at model.layers",
        "resid_pre, q (4 heads), o (4 heads), attn, mlp, resid",
        "Not read off: k: none of ",
        "infer_adapter(model)",
        "api=",
        "nnpatch new-adapter deepseek-v3 --model-type deepseek_v3",
    ):
        assert part in message
    # Nobody has a plugin for it.
    assert "pip install" not in message


def test_what_the_models_cannot_do_is_said() -> None:
    with pytest.warns(AdapterWarning, match="It declares cone=False"):
        find_adapter(None, tiny_model("bloom", n_layer=1))


def test_a_model_with_a_plugin_is_not_inferred(put_to_test: list[str]) -> None:
    assert activation(tiny_model("llama"), None).info["adapter"] == "Llama3"
    assert put_to_test == []


def test_own_sites_keep_their_adapter(put_to_test: list[str]) -> None:
    model, own = tiny_model("gpt2", n_layer=2), attrs.evolve(inferred(), name="Own")
    put_to_test.clear()
    sites = Sites.from_sites([Site.get_site(own, "mlp", layer=1, seq_pos=[-1])])
    for call in (activation, ablation, attribution, screened("attribution")):
        assert call(model, None, sites)["mlp"].shape == (1,)
    assert put_to_test == []


def test_without_any_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inferring is there whatever plugins are limited to, and finds what the plugin knows."""
    model = tiny_model("llama", num_hidden_layers=1)
    expected = numbers(activation(model, "Llama3"))
    monkeypatch.setenv("NNPATCH_PLUGINS", "")
    with pytest.warns(AdapterWarning, match="NNPATCH_PLUGINS=''"):
        assert numbers(activation(model, None)) == expected


def test_model_and_random_numbers_are_left_as_they_were() -> None:
    model = tiny_model("gpt2", n_layer=2, resid_pdrop=0.5)
    model.transformer.h[1].train()
    model.transformer.wpe.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    training = [module.training for module in model.modules()]
    asking = [weight.requires_grad for weight in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    with pytest.warns(AdapterWarning):
        find_adapter(None, model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), repr(np.random.get_state())) == states[1:]  # noqa: NPY002
    assert [module.training for module in model.modules()] == training
    assert [weight.requires_grad for weight in model.parameters()] == asking
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(
        [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        for module in model.modules()
    )


def test_weights_that_are_swapped_are_read_anew(put_to_test: list[str]) -> None:
    """Nothing is kept from one call to the next: what is inferred is of this model, as it is."""
    model = one_layer()
    for _ in range(2):
        with pytest.warns(AdapterWarning):
            find_adapter(None, model)
    assert put_to_test == ["Gpt2", "Gpt2"]


# Refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")
def test_a_check_that_fails_is_named(entry: str) -> None:
    encoder = tiny_model("bert", is_decoder=False, num_hidden_layers=1)
    with pytest.raises(AdapterError) as caught:
        ENTRIES[entry](encoder, None)
    message = str(caught.value)
    for part in ("no plugin claims model_type 'bert'", "check_causal: ", "causal language model"):
        assert part in message
    assert message.endswith("pass an adapter as api=")


@pytest.mark.parametrize("entry", ["activation", "plan"])
def test_a_model_without_weights(entry: str) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match=r"'gpt2'.* has no weights.*dispatch=True.* api="):
        ENTRIES[entry](model, None)
    # The advice works: an adapter of a model with weights will do for a plan.
    if entry == "plan":
        assert plan(model, inferred())["cells"] == 10


def test_a_model_that_nnsight_has_not_loaded_yet(tmp_path: Path) -> None:
    one_layer().save_pretrained(tmp_path)
    named = {"task": "text-generation", "tokenizer": tiny_tokenizer(["a"])}
    with pytest.raises(AdapterError, match=r"load it with them \(in nnsight by dispatch=True\)"):
        activation(TransformersModel(str(tmp_path), **named), None)
    # The advice works.
    model = TransformersModel(str(tmp_path), **named, dispatch=True)
    with pytest.warns(AdapterWarning):
        assert activation(model, None).info["adapter"] == "Gpt2"


def test_a_model_without_a_type() -> None:
    model = tiny_model("gpt2")
    del model.config
    with pytest.raises(AdapterError, match=r"config\.model_type.* name an adapter"):
        activation(model, None)


def test_a_site_without_a_model() -> None:
    with pytest.raises(AdapterError, match=r"there is none here: pass an adapter"):
        Site.get_site(None, "resid", layer=0)


# What is told of plugins -------------------------------------------------------------------------


def test_known_distributions_are_those_that_there_are() -> None:
    claimed: dict[str, set[str]] = {}
    for found in load_plugins().adapters:
        if found.plugin.distribution in DISTRIBUTIONS:
            claimed.setdefault(found.plugin.distribution, set()).update(found.value.model_types)
    # The models of Gemma 3 that see, too.
    claimed["nnpatch-gemma"].add("gemma3")
    assert {name: set(types) for name, types in DISTRIBUTIONS.items()} == claimed


@pytest.mark.parametrize(
    ("model_type", "distribution"),
    [("llama", "nnpatch-llama"), ("mistral", "nnpatch-mistral"), ("gemma2", "nnpatch-gemma")],
)
def test_plugin_of_ours_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, model_type: str, distribution: str
) -> None:
    version, distributions = metadata.version, list(metadata.distributions())

    def without(name: str) -> str:
        if name == distribution:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    left = [each for each in distributions if each.metadata["Name"] != distribution]
    monkeypatch.setattr(metadata, "version", without)
    monkeypatch.setattr(metadata, "distributions", lambda: left)
    with pytest.warns(AdapterWarning, match=f"{distribution} has one: pip install {distribution}"):
        found = find_adapter(None, tiny_model(model_type, num_hidden_layers=1))
    assert model_type in found.model_types


def test_types_without_a_plugin_are_told_to_install_none() -> None:
    one = {"num_layers": 1, "attention_types": [[["global"], 1]]}
    for model_type, settings in (("gpt2", {"n_layer": 1}), ("gpt_neo", one)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            find_adapter(None, tiny_model(model_type, **settings))
        assert not any("pip install" in str(warning.message) for warning in caught)


def test_every_type_makes_a_name_of_a_package() -> None:
    for model_type in causal_model_types():
        assert package_names(model_type.replace("_", "-"))


def test_the_command_is_told_where_there_is_a_tiny_model() -> None:
    assert package_command("gpt2") == "nnpatch new-adapter gpt2 --model-type gpt2"
    assert package_command("martian") is None
