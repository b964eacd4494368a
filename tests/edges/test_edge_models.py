"""Edges of models as users have them: with hooks, adapters, in narrow numbers, and broken off.

Those that are quantised, or lie elsewhere, are in the files of such models.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core.errors import EngineError
from nnpatch_core.testing import tiny_model
from tests.helpers import edge_pairs
from tests.helpers.counted import calling
from tests.helpers.edge_derivatives import EdgeDerivatives
from tests.helpers.edge_oracle import EdgeOracle
from tests.helpers.edge_pairs import Pairs, from_oracle, numbers, raw
from tests.helpers.families import FAMILIES
from tests.helpers.undisturbed import check_state, state_of

pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: As long as each other, so that a hook sees the same places in a batch and alone.
EQUAL = Pairs(
    [(5, 6, 7, 8, 9), (9, 27, 6, 4, 3), (9, 4, 3, 12, 3)],
    [(5, 9, 7, 8, 9), (9, 7, 16, 4, 5), (9, 4, 13, 12, 6)],
    ((1, 2, 3), (5, 6, 7)),
)
SOME = {"senders": ["input", "a0.h1", "m0", "a1.h2", "m1"]}


def llama(**settings: Any) -> Any:
    return tiny_model("llama", **settings)


def patched(model: Any, pairs: Pairs = EQUAL, **options: Any) -> Any:
    if options.get("method", "exact") == "exact":
        # As hooks ask for it.
        options.setdefault("engine", "full")
    return edge_pairs.patched(model, pairs, **{**SOME, **options})


# Hooks.


def hooked(model: Any, path: str, edit: Callable[[Tensor], Any]) -> Any:
    def hook(_: nn.Module, args: Any, output: Any) -> Any:
        several = isinstance(output, tuple)
        found = (output[0] if several else output).clone()
        edit(found)
        return (found, *output[1:]) if several else found

    model.get_submodule(path).register_forward_hook(hook)
    return model


def of_row(row: int) -> Callable[[Tensor], None]:
    def edit(found: Tensor) -> None:
        if -len(found) <= row < len(found):
            found[row] += 0.5

    return edit


def everywhere(found: Tensor) -> None:
    found += 0.5


#: There rows stand in their order, whoever calls the module: a hook comes after what is put.
IN_ORDER = (
    *("model.embed_tokens", "model.layers.2", "model.norm", "lm_head"),
    *(f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"),
)
#: These are called with rows that stand in no order.
BY_THEMSELVES = (
    *("model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"),
    *("model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj"),
)


@pytest.mark.parametrize("method", ["exact", "eap"])
@pytest.mark.parametrize("path", [*IN_ORDER, *BY_THEMSELVES])
def test_a_hook_that_treats_all_rows_alike(path: str, method: str) -> None:
    model = hooked(llama(), path, everywhere)
    edges = patched(model, method=method)
    oracle = EdgeDerivatives(copy.deepcopy(model), "llama")
    found, before = numbers(edges), edges.baseline.target
    for edge in list(found)[::9]:
        for row in range(3):
            if method == "exact":
                expected = from_oracle(oracle, EQUAL, edge, row)
            else:
                pair = EQUAL.sources[row], EQUAL.targets[row]
                metric = functools.partial(EQUAL.difference, row=row)
                expected = before[row].item() + oracle.estimate(*pair, edge, metric)
            assert found[edge][row].item() == pytest.approx(expected, abs=3e-5), edge


@pytest.mark.parametrize(("prompts", "row"), [(1, 0), (3, 1), (5, 0), (5, -1)])
@pytest.mark.parametrize("path", BY_THEMSELVES)
def test_a_hook_on_one_row_is_found_out(path: str, prompts: int, row: int) -> None:
    """As many prompts as tokens among them, for which a row more is run."""
    pairs = EQUAL.some(*[each % 3 for each in range(prompts)])
    model = hooked(llama(), path, of_row(row))
    for method in ("exact", "eap"):
        with pytest.raises(EngineError, match=r"`hook` on 'model.* must treat all rows alike"):
            patched(model, pairs, method=method)


@pytest.mark.parametrize("path", IN_ORDER)
def test_a_hook_on_one_row_in_order(path: str) -> None:
    edges = numbers(patched(hooked(llama(), path, of_row(1))))
    own = EdgeOracle(hooked(llama(), path, of_row(0)), "llama"), EdgeOracle(llama(), "llama")
    for edge in list(edges)[::7]:
        expected = [from_oracle(own[row != 1], EQUAL, edge, row) for row in range(3)]
        assert edges[edge].tolist() == pytest.approx(expected, abs=3e-5), edge


@pytest.mark.parametrize("edit", [everywhere, of_row(1)])
def test_a_hook_between_layers(edit: Callable[[Tensor], None]) -> None:
    """It would meet what a receiver puts there once more, and a sender's change never."""
    for method in ("exact", "eap"):
        with pytest.raises(EngineError, match=r"layer 2 gets .* 1 gives, .* 'model.layers.1'"):
            patched(hooked(llama(), "model.layers.1", edit), method=method)


def test_a_hook_on_what_a_layer_is_given() -> None:
    model = llama()

    def more(_: nn.Module, args: tuple, kwargs: dict) -> Any:
        if args:
            return (1.1 * args[0], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": 1.1 * kwargs["hidden_states"]}

    model.model.layers[1].register_forward_pre_hook(more, with_kwargs=True)
    with pytest.raises(EngineError, match=r"layer 1"):
        patched(model)


def test_edits_that_stay() -> None:
    """nnsight makes them in each trace, and in a trace of one layer they do not come true."""
    nnmodel = NNsight(llama())
    with nnmodel.edit(inplace=True):
        nnmodel.model.layers[0].mlp.output = 1.5 * nnmodel.model.layers[0].mlp.output
    with pytest.raises(EngineError, match="cannot be called by itself"):
        patched(nnmodel)


# Types of numbers.


@pytest.mark.parametrize("method", ["exact", "eap", "eap-ig-inputs"])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("mixtral", torch.float16),
        ("cohere", torch.float16),
    ],
)
def test_narrow_numbers(family: str, dtype: torch.dtype, method: str) -> None:
    """They are those of float32, as far as such numbers can tell."""
    model = tiny_model(family, num_hidden_layers=2)
    api = FAMILIES[family].api if family in FAMILIES else None
    options = {"method": method, "api": api, **({"steps": 2} if "-ig-" in method else {})}
    wide = patched(model, **options)
    narrow = patched(copy.deepcopy(model).to(dtype), **options)
    assert narrow.info["dtype"] == str(dtype)
    size = max(1.0, float(raw(wide).abs().max()))
    near = {torch.bfloat16: 0.05, torch.float16: 0.006}[dtype] * size
    assert (raw(narrow) - raw(wide)).abs().max() < near
    if method == "exact":
        assert narrow.info["engine"] == "full"


# Models in wrappers.


def merged(model: Any) -> Any:
    """The same, with its adapter in the weights."""
    return copy.deepcopy(model).merge_and_unload()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("method", ["exact", "eap", "clean-corrupted"])
def test_peft(method: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], init_lora_weights=False
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(llama(), config).eval()
    found, expected = (raw(patched(each, method=method)) for each in (model, merged(model)))
    assert (found - expected).abs().max() < 2e-5
    assert (found - raw(patched(llama(), method=method))).abs().max() > 0.01
    with model.disable_adapter():
        assert (raw(patched(model)) - raw(patched(llama()))).abs().max() < 2e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [NNsight, torch.compile])
def test_wrapped(wrap: Callable[[Any], Any]) -> None:
    assert raw(patched(wrap(llama()))).equal(raw(patched(llama())))


# A model is left as it was.


# With "eap" the last MLP runs five times.
@pytest.mark.parametrize(
    ("method", "stop"),
    [
        *product(["exact", "eap-ig-activations"], [1, 3, 4, 6]),
        *product(["eap"], [1, 2, 3, 4, 5]),
    ],
)
def test_whatever_breaks_off_leaves_a_model_as_it_was(method: str, stop: int) -> None:
    model = llama()
    model.model.layers[1].train()
    before, calls = state_of(model), [0]

    def count() -> None:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt

    mlp = model.model.layers[2].mlp
    kind = type(mlp)
    calling(mlp, count)
    try:
        with pytest.raises(KeyboardInterrupt):
            patched(model, method=method)
    finally:
        mlp.__class__ = kind
    check_state(before, state_of(model))
    # And it may be used again.
    assert raw(patched(model, method=method)).equal(raw(patched(model, method=method)))
