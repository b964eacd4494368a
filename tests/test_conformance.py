"""The kit can fail: each kind of wrong adapter or model is found by the check that should find it.

A seed is one thing wrong, with the checks that must fail for it and words of what they must say.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.adapters import PartOfHead, consecutive
from nnpatch_core.conformance import make_subject, why_skipped
from nnpatch_core.errors import AdapterError, LayerError, PatchingError, UnknownNameError
from nnpatch_core.testing import CHECKS, CheckError, parametrize_with_checks, run_checks, tiny_model
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3

from .counted import calling

pytest_plugins = ["pytester"]

#: nnsight says so of BERT's modules called `output`, which is of no use to anybody here.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")

#: Checks of what is said, not of what a forward gives.
WITHOUT_A_FORWARD = {"check_model_type", "check_undeclared"}
NUMBERS = [name for name in CHECKS if name not in WITHOUT_A_FORWARD]

GPT2 = DecoderAPI(
    "GPT2",
    ("gpt2",),
    decoder_components(attn="attn", heads=fused_projections("attn.c_attn", "attn.c_proj", Fused)),
    "transformer.h",
)
NEOX = DecoderAPI(
    "NeoX",
    ("gpt_neox",),
    decoder_components(
        attn="attention",
        heads=fused_projections("attention.query_key_value", "attention.dense", Interleaved),
    ),
    "gpt_neox.layers",
)
MIXTRAL = DecoderAPI("Mixtral", ("mixtral",), decoder_components())
GRANITE = DecoderAPI("Granite", ("granite",), decoder_components(), residual="scaled")
#: A norm follows each sum, so that there is no sum to check.
BERT = DecoderAPI(
    "Bert",
    ("bert",),
    decoder_components(
        attn="attention.output.dense",
        mlp="output.dense",
        heads=separate_projections(
            "attention", q="self.query", k="self.key", v="self.value", o="output.dense"
        ),
    ),
    "bert.encoder.layer",
    residual=None,
)
GATED = separate_projections()
GATED["q"] = attrs.evolve(GATED["q"], columns=PartOfHead(0, parts=2))
#: Attention with a gate in one layer, and none in the others.
QWEN3_NEXT = DecoderAPI(
    "Qwen3Next",
    ("qwen3_next",),
    decoder_components(attn="linear_attn", heads={}),
    kinds={"self_attn": decoder_components(heads=GATED)},
    cone=False,
)


@functools.cache
def shared(family: str, **settings: Any) -> Any:
    """A model of two layers that nobody changes."""
    return tiny_model(family, **{"num_hidden_layers": 2, **settings})


def model_of(family: str, **settings: Any) -> Callable[[], Any]:
    return functools.partial(shared, family, **settings)


LLAMA = model_of("llama")
#: As many key/value heads as query heads, so that the three projections have one shape.
UNGROUPED = model_of("llama", num_key_value_heads=4)
#: The MLP is as wide inside as the residual stream.
SQUARE = model_of("llama", intermediate_size=32)
GEMMA2 = model_of("gemma2")
HALVED = model_of("granite", residual_multiplier=0.5)

RIGHT: dict[str, tuple[DecoderAPI, Callable[[], Any]]] = {
    "llama": (Llama3, LLAMA),
    "llama, ungrouped": (Llama3, UNGROUPED),
    "gemma2": (Gemma2, GEMMA2),
    "gemma2, o wider than the residual stream": (Gemma2, model_of("gemma2", hidden_size=20)),
    "gpt2": (GPT2, model_of("gpt2")),
    "gpt_neox": (NEOX, model_of("gpt_neox")),
    "mixtral": (MIXTRAL, model_of("mixtral")),
    "granite": (GRANITE, HALVED),
    "bert": (BERT, model_of("bert")),
    "qwen3_next": (QWEN3_NEXT, functools.partial(tiny_model, "qwen3_next")),
}


def failures(results: list[Any]) -> dict[str, str]:
    return {result.check: result.reason for result in results if result.status == "failed"}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_fails_for_an_adapter_that_is_right(name: str) -> None:
    api, model = RIGHT[name]
    assert failures(run_checks(api, model())) == {}


# What may be wrong with an adapter.


def changed(api: DecoderAPI, **rows: Component) -> DecoderAPI:
    """The adapter with other rows, at the same places of its table."""
    return attrs.evolve(api, components={**api.components, **rows})


def arranged(api: DecoderAPI, names: str, **rows: Component) -> DecoderAPI:
    """The adapter with these components in this order, some of them with other rows."""
    table = {**api.components, **rows}
    return attrs.evolve(api, components={name: table[name] for name in names.split()})


def at(name: str, module: str) -> Component:
    """Llama's row of a component, at another module."""
    return attrs.evolve(Llama3.components[name], module=module)


def columns(api: DecoderAPI, name: str, edit: Callable[[Tensor], Tensor]) -> DecoderAPI:
    """The adapter with a component's columns `[heads, dim]` edited."""
    row = api.components[name]

    def layout(width: int, heads: Any) -> Tensor:
        return edit(consecutive(width, heads.count(row.heads)))

    return changed(api, **{name: attrs.evolve(row, columns=layout)})


def heads(api: DecoderAPI, name: str, *order: int) -> DecoderAPI:
    """The adapter with the heads of a component in another order."""
    return columns(api, name, lambda found: found[list(order)])


def rolled(found: Tensor) -> Tensor:
    """Each column is taken for the one before it."""
    return found.flatten().roll(-1).view_as(found)


def narrow(found: Tensor) -> Tensor:
    """Each head is taken to be one column narrower than it is."""
    count, dim = found.shape
    return torch.arange(count * (dim - 1)).view(count, dim - 1)


def fused(api: DecoderAPI, layout: Callable[[Any], Any]) -> DecoderAPI:
    """The adapter with another layout of its fused projection."""
    table = api.components
    rows = fused_projections(table["q"].module, table["o"].module, layout)
    return changed(api, **rows)


#: The parts of a fused projection under each other's names.
ROTATED: Mapping[Any, Any] = {"q": "k", "k": "v", "v": "q"}


def last_layer(**rows: Component) -> DecoderAPI:
    """Right in all layers but the last, which has a mark."""
    return attrs.evolve(Llama3, kinds={"mark": {**Llama3.components, **rows}})


@attrs.frozen(eq=False)
class OwnCounts:
    """Wrong about the heads of one layer, and no `DecoderAPI`."""

    name = "OwnCounts"
    model_types = ("llama",)
    layers = "model.layers"
    components = Llama3.components

    def n_heads(self, config: Any, kind: str, layer: int) -> int:
        return 4 if kind == "query" or layer == 1 else 2


class AnyName(dict):
    """A table with a row for every name."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Component:
        return dict.get(self, name, Component("mlp"))


class AnswersToAnyName(OwnCounts):
    components = AnyName(Llama3.components)

    def n_heads(self, config: Any, kind: str, layer: int) -> int:
        return Llama3.n_heads(config, kind, layer)


# What may be wrong with a model.


class Wrapped(nn.Module):
    """A module with another one inside, which does something to what that gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        if isinstance(found, tuple):
            return (self.after(found[0]), *found[1:])
        return self.after(found)

    def after(self, found: Tensor) -> Tensor:
        return found


class Detached(Wrapped):
    def after(self, found: Tensor) -> Tensor:
        return found.detach()


class Even(Wrapped):
    """Nothing after it sees a sign."""

    def after(self, found: Tensor) -> Tensor:
        return found.abs()


class Noisy(Wrapped):
    """Far below rounding, but never the same twice."""

    def after(self, found: Tensor) -> Tensor:
        return found + 1e-6 * torch.randn_like(found)


class WithNoise(Wrapped):
    """Another column, which is never the same twice."""

    def after(self, found: Tensor) -> Tensor:
        return torch.cat([found, 1e-6 * torch.rand_like(found[..., :1])], -1)


class Narrowed(Wrapped):
    """Without the last column."""

    def after(self, found: Tensor) -> Tensor:
        return found[..., :-1]


class Twice(Wrapped):
    """Runs what is inside a second time, for nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        self.inner(*args, **kwargs)
        return found


class Bypass(Wrapped):
    """Adds what did not come through the residual stream."""

    def __init__(self, inner: nn.Module, source: nn.Module) -> None:
        super().__init__(inner)
        self.seen = torch.zeros(1)
        source.register_forward_hook(self.see)

    def see(self, _: nn.Module, args: Any, output: Tensor) -> None:
        self.seen = output

    def after(self, found: Tensor) -> Tensor:
        return found + self.seen


class Shifted(Wrapped):
    """Each token with the one before it: more of it than keys and values tell."""

    def after(self, found: Tensor) -> Tensor:
        return found + nn.functional.pad(found, (0, 0, 1, 0))[:, :-1]


def fresh(edit: Callable[[Any], object], family: str = "llama", **settings: Any) -> Callable:
    """Makes a model of its own, with something wrong about it."""

    def make() -> Any:
        model = tiny_model(family, **{"num_hidden_layers": 2, **settings})
        edit(model)
        return model

    return make


def in_each_layer(path: str, wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for layer in model.model.layers:
            layer.set_submodule(path, wrap(layer.get_submodule(path)))

    return edit


def another_list(name: str, pick: Callable[[list[nn.Module]], list[nn.Module]]) -> Callable:
    def edit(model: Any) -> None:
        setattr(model.model, name, nn.ModuleList(pick(list(model.model.layers))))

    return fresh(edit)


def mark_last(model: Any) -> None:
    model.model.layers[-1].mark = nn.Identity()


def scale_between_layers(model: Any) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))


def count_too_many(model: Any) -> None:
    model.config.num_hidden_layers = 5


def share_a_module(model: Any) -> None:
    first, second = (layer.self_attn for layer in model.model.layers)
    second.k_proj = first.k_proj


def add_an_idle_module(model: Any) -> None:
    for layer in model.model.layers:
        layer.idle = nn.Linear(32, 32)


def never_given(*names: str) -> Callable[[Any], object]:
    """The model inside never gets some of its arguments."""

    def drop(_: Any, args: tuple, kwargs: dict) -> tuple:
        return args, {**kwargs, **dict.fromkeys(names)}

    return lambda model: model.base_model.register_forward_pre_hook(drop, with_kwargs=True)


def noise_in_the_logits(model: Any) -> None:
    model.lm_head = Noisy(model.lm_head)


def show_tokens_to_the_last_mlp(model: Any) -> None:
    last = model.model.layers[-1]
    last.mlp = Bypass(last.mlp, model.model.embed_tokens)


def prune_a_head(model: Any) -> None:
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 8:16] = 0


def predict_more_tokens(model: Any) -> None:
    """The likeliest tokens are none that a prompt could hold."""
    torch.manual_seed(0)
    model.lm_head = nn.Linear(32, 128, bias=False)
    with torch.no_grad():
        model.lm_head.weight[64:] *= 10


# The seeds.


@attrs.frozen(eq=False)
class Seed:
    """One thing wrong.

    Args:
        api: the adapter.
        model: gives the model.
        fails: the checks that must fail, each with words of its reason.
        alone: whether no other check may.
    """

    api: Any
    model: Callable[[], Any]
    fails: Mapping[str, str]
    alone: bool = False


def seed(api: Any, model: Callable[[], Any], **fails: str) -> Seed:
    return Seed(api, model, {f"check_{name}": words for name, words in fails.items()})


def alone(api: Any, model: Callable[[], Any], **fails: str) -> Seed:
    return attrs.evolve(seed(api, model, **fails), alone=True)


def table(*names: str, **rows: Component) -> DecoderAPI:
    """A part of Llama's table, with other rows."""
    return DecoderAPI("Part", ("llama",), {name: Llama3.components[name] for name in names} | rows)


def scaled(api: DecoderAPI) -> DecoderAPI:
    return attrs.evolve(api, residual="scaled")


QUERY, KEY = Llama3.components["q"], Llama3.components["k"]
RUNS = {"components": "already ran past it", "gradients": "already ran past it"}
NO_SUM = "resid_pre + attn + mlp is not resid in layer 0"
GPT2_MODEL, NEOX_MODEL, MIXTRAL_MODEL = (RIGHT[name][1] for name in ("gpt2", "gpt_neox", "mixtral"))

SEEDS = {
    # Heads that are not where they are said to be.
    "q: reversed": alone(heads(Llama3, "q", 3, 2, 1, 0), LLAMA, query_heads="q L0 H0 reaches"),
    "q: the last two swapped": seed(
        heads(Llama3, "q", 0, 1, 3, 2), LLAMA, query_heads="q L0 H2 reaches"
    ),
    "k: swapped": alone(heads(Llama3, "k", 1, 0), LLAMA, key_heads="k L0 H0 reaches"),
    "v: swapped": alone(heads(Llama3, "v", 1, 0), LLAMA, value_heads="v L0 H0 reaches"),
    "o: swapped in a group": seed(heads(Llama3, "o", 1, 0, 2, 3), LLAMA, query_heads="heads [1]"),
    "o: swapped between groups": seed(
        heads(Llama3, "o", 2, 1, 0, 3),
        LLAMA,
        query_heads="q L0 H0 reaches",
        key_heads="k L0 H0 reaches",
        value_heads="v L0 H0 reaches",
    ),
    "q: columns rolled": seed(columns(Llama3, "q", rolled), LLAMA, query_heads="heads [1]"),
    "k: columns rolled": seed(columns(Llama3, "k", rolled), LLAMA, key_heads="heads [2, 3]"),
    "v: columns rolled": seed(columns(Llama3, "v", rolled), LLAMA, value_heads="heads [2, 3]"),
    "o: columns rolled": seed(
        columns(Llama3, "o", rolled), LLAMA, query_heads="reaches", value_heads="reaches"
    ),
    "q: one column too narrow": seed(
        columns(Llama3, "q", narrow), LLAMA, components="head of q has 7", query_heads="reaches"
    ),
    "k: one column too narrow": seed(
        columns(Llama3, "k", narrow), LLAMA, components="one of k 7", key_heads="reaches"
    ),
    "v: one column too narrow": seed(
        columns(Llama3, "v", narrow), LLAMA, components="head of v has 7", value_heads="not reach"
    ),
    "o: one column too narrow": seed(
        columns(Llama3, "o", narrow), LLAMA, components="one of o 7", value_heads="reaches"
    ),
    "q: without its first column": alone(
        columns(Llama3, "q", lambda found: found[:, 1:]), LLAMA, components="head of q has 7"
    ),
    "v of mixtral: swapped": seed(heads(MIXTRAL, "v", 1, 0), MIXTRAL_MODEL, value_heads="reaches"),
    "k of gemma2: swapped": seed(heads(Gemma2, "k", 1, 0), GEMMA2, key_heads="reaches"),
    # Another number of heads.
    "half the query heads": seed(
        attrs.evolve(Llama3, query_heads=2),
        LLAMA,
        components="head of q has 16",
        query_heads="half of q L0 H0 does not reach",
    ),
    "half of all heads": seed(
        attrs.evolve(Llama3, query_heads=2, key_value_heads=1),
        LLAMA,
        query_heads="half of q L0 H0 does not reach",
        key_heads="half of k L0 H0 does not reach",
    ),
    "twice as many heads": seed(
        attrs.evolve(Llama3, query_heads=8, key_value_heads=4),
        LLAMA,
        query_heads="reaches",
        key_heads="reaches",
        value_heads="reaches",
    ),
    "as many key/value heads as query heads": seed(
        attrs.evolve(Llama3, key_value_heads="num_attention_heads"),
        LLAMA,
        components="head of q has 8 columns in layer 0, one of k 4",
        key_heads="reaches",
        value_heads="reaches",
    ),
    "one key/value head": seed(
        attrs.evolve(Llama3, key_value_heads=1),
        LLAMA,
        components="one of k 16",
        key_heads="half of k L0 H0 does not reach",
    ),
    "more heads in one layer": seed(
        OwnCounts(), LLAMA, components="in layer 1", key_heads="k L1", value_heads="v L1"
    ),
    # One projection under another's name.
    "q and k swapped": seed(
        arranged(
            Llama3,
            "resid_pre k q v o attn mlp resid",
            q=at("q", "self_attn.k_proj"),
            k=at("k", "self_attn.q_proj"),
        ),
        UNGROUPED,
        query_heads="q L0 H0 reaches",
        key_heads="does not reach",
    ),
    "k and v swapped": seed(
        arranged(
            Llama3,
            "resid_pre q v k o attn mlp resid",
            k=at("k", "self_attn.v_proj"),
            v=at("v", "self_attn.k_proj"),
        ),
        LLAMA,
        key_heads="half of k L0 H0 does not reach",
        value_heads="does not turn the heads [0, 1]",
    ),
    "q and v swapped": seed(
        arranged(
            Llama3,
            "resid_pre v k q o attn mlp resid",
            q=at("q", "self_attn.v_proj"),
            v=at("v", "self_attn.q_proj"),
        ),
        UNGROUPED,
        query_heads="q L0 H0 reaches",
        value_heads="does not turn the heads [0]",
    ),
    "q: the projection's input": seed(
        changed(Llama3, q=Component("self_attn.q_proj", "input", heads="query")),
        LLAMA,
        query_heads="reaches",
    ),
    "o: the projection's output": seed(
        changed(Llama3, o=Component("self_attn.o_proj", heads="query")),
        LLAMA,
        query_heads="reaches",
        key_heads="reaches",
        value_heads="reaches",
    ),
    "o: the values": alone(
        table(o=Component("self_attn.v_proj", heads="query"), attn=Component("self_attn")),
        UNGROUPED,
        output_heads="o L0 H0 [2] reaches attn at the positions [2, 3, 4, 5, 6, 7]",
    ),
    "k: the same columns as v": seed(
        changed(GPT2, k=attrs.evolve(GPT2.components["k"], columns=Fused("v"))),
        GPT2_MODEL,
        components="v of layer 0 shares columns",
        key_heads="does not reach",
    ),
    # Fused projections.
    "gpt2: interleaved": seed(
        fused(GPT2, Interleaved),
        GPT2_MODEL,
        query_heads="q L0 H1 reaches",
        key_heads="k L0 H0 reaches",
        value_heads="v L0 H0 reaches",
    ),
    "gpt2: parts rotated": seed(
        fused(GPT2, lambda part: Fused(ROTATED[part])),
        GPT2_MODEL,
        query_heads="q L0 H0 reaches",
        key_heads="half of k L0 H0 does not reach",
        value_heads="does not turn the heads [0]",
    ),
    "gpt2: q, k and v not taken apart": seed(
        fused(GPT2, lambda part: None), GPT2_MODEL, components="head of v has 24"
    ),
    "gpt2: o from the projection's output": seed(
        changed(GPT2, o=Component("attn.c_proj", heads="query")), GPT2_MODEL, value_heads="reaches"
    ),
    "gpt_neox: not interleaved": seed(
        fused(NEOX, Fused),
        NEOX_MODEL,
        query_heads="q L0 H1 reaches",
        key_heads="k L0 H0 reaches",
        value_heads="v L0 H0 reaches",
    ),
    "gpt_neox: parts rotated": seed(
        fused(NEOX, lambda part: Interleaved(ROTATED[part])),
        NEOX_MODEL,
        query_heads="q L0 H0 reaches",
        key_heads="half of k L0 H0 does not reach",
        value_heads="does not turn the heads [0]",
    ),
    "qwen3_next: the gate for q": seed(
        attrs.evolve(
            QWEN3_NEXT,
            kinds={
                "self_attn": decoder_components(
                    heads={**GATED, "q": attrs.evolve(QUERY, columns=PartOfHead(1, parts=2))}
                )
            },
        ),
        RIGHT["qwen3_next"][1],
        query_heads="half of q L1 H0 does not reach",
    ),
    "qwen3_next: the gate as a part of q": seed(
        attrs.evolve(QWEN3_NEXT, kinds={"self_attn": decoder_components()}),
        RIGHT["qwen3_next"][1],
        components="head of q has 16",
    ),
    # The residual stream, and what is added to it.
    "resid: the layer's input": seed(
        arranged(Llama3, "resid resid_pre q k v o attn mlp", resid=Component("", "input")),
        LLAMA,
        residual=NO_SUM,
        sweep="resid of the last layer restores not 1",
    ),
    "resid_pre: after the norm": seed(
        changed(Llama3, resid_pre=Component("input_layernorm")),
        LLAMA,
        residual=NO_SUM,
        residual_is_everything="resid_pre of layer 0, patched at every position",
    ),
    "resid_pre: after attention": seed(
        arranged(
            Llama3,
            "q k v o attn resid_pre mlp resid",
            resid_pre=Component("post_attention_layernorm", "input"),
        ),
        LLAMA,
        residual=NO_SUM,
        residual_is_everything="resid_pre of layer 0, patched at every position",
    ),
    "attn: the block's input": seed(
        arranged(Llama3, "resid_pre attn q k v o mlp resid", attn=Component("self_attn", "input")),
        LLAMA,
        residual=NO_SUM,
        output_heads="reaches attn at the positions []",
    ),
    "attn and mlp swapped": alone(
        arranged(
            Llama3,
            "resid_pre q k v o mlp attn resid",
            attn=Component("mlp"),
            mlp=Component("self_attn"),
        ),
        LLAMA,
        blocks="of layer 0 brings",
    ),
    "attn: a copy of mlp": seed(
        arranged(Llama3, "resid_pre q k v o mlp attn resid", attn=Component("mlp")),
        LLAMA,
        residual=NO_SUM,
    ),
    "mlp: the block's input": seed(
        changed(Llama3, mlp=Component("mlp", "input")), LLAMA, residual=NO_SUM
    ),
    "mlp of mixtral: the block's input": seed(
        changed(MIXTRAL, mlp=Component("mlp", "input")), MIXTRAL_MODEL, residual=NO_SUM
    ),
    "mlp of mixtral: the router": seed(
        changed(MIXTRAL, mlp=Component("mlp.gate")),
        MIXTRAL_MODEL,
        components="mlp of layer 0 is 4 wide",
        patch_reaches_logits="mlp L0 can be turned round",
        gradients="no finite gradient reaches mlp of layer 0",
    ),
    "attn of gemma2: before its norm": seed(
        changed(Gemma2, attn=Component("self_attn")), GEMMA2, residual=NO_SUM
    ),
    "attn of gemma2: before its norm, scaled": seed(
        scaled(changed(Gemma2, attn=Component("self_attn"))), GEMMA2, residual=f"{NO_SUM}, scaled"
    ),
    "mlp of gemma2: before its norm": seed(
        changed(Gemma2, mlp=Component("mlp")), GEMMA2, residual=NO_SUM
    ),
    "granite: a sum that is scaled": alone(
        attrs.evolve(GRANITE, residual="sum"), HALVED, residual=NO_SUM
    ),
    # Which layers there are.
    "layers: a list that does not run": seed(
        attrs.evolve(Llama3, layers="model.idle"),
        another_list("idle", copy.deepcopy),
        layers="the layers run in the order []",
        execution_order="'the layer' of layer 0 runs 0 times",
        **RUNS,
    ),
    "layers: a part of them": seed(
        attrs.evolve(Llama3, layers="model.some"),
        another_list("some", lambda layers: layers[:1]),
        layers="'model.some' has 1 layers, the config says {2}",
        sweep="resid of the last layer restores not 1",
    ),
    "layers: in reverse": seed(
        attrs.evolve(Llama3, layers="model.reversed"),
        another_list("reversed", lambda layers: layers[::-1]),
        layers="the layers run in the order [1, 0]",
        **RUNS,
    ),
    "layers: none there": seed(
        attrs.evolve(Llama3, layers="model.blocks"),
        LLAMA,
        layers="no list of layers at 'model.blocks'",
        components="no list of layers at 'model.blocks'",
    ),
    "layers: something happens between them": seed(
        Llama3, fresh(scale_between_layers), layers="what layer 0 gives is not what layer 1 gets"
    ),
    "layers: fewer than the config says": alone(
        Llama3, fresh(count_too_many), layers="has 2 layers, the config says {5}"
    ),
    # One layer is not like the others.
    "last layer: q swapped": seed(
        last_layer(q=heads(Llama3, "q", 0, 1, 3, 2).components["q"]),
        fresh(mark_last),
        query_heads="q L1 H2 reaches",
    ),
    "last layer: k swapped": seed(
        last_layer(k=heads(Llama3, "k", 1, 0).components["k"]),
        fresh(mark_last),
        key_heads="k L1 H0 reaches",
    ),
    "last layer: v swapped": seed(
        last_layer(v=heads(Llama3, "v", 1, 0).components["v"]),
        fresh(mark_last),
        value_heads="v L1 H0 reaches",
    ),
    "last layer: the input for mlp": seed(
        last_layer(mlp=Component("mlp", "input")), fresh(mark_last), residual="layer 1"
    ),
    "last layer: the norm for resid_pre": seed(
        last_layer(resid_pre=Component("input_layernorm")),
        fresh(mark_last),
        residual_is_everything="resid_pre of layer 1",
    ),
    "kinds: the table of another kind": seed(
        attrs.evolve(QWEN3_NEXT, kinds={"mlp": QWEN3_NEXT.kinds["self_attn"]}),
        RIGHT["qwen3_next"][1],
        components="self_attn",
        sweep="component 'q' is at 'self_attn.q_proj', and layer 0",
    ),
    # The order of a forward, and modules that do not run once.
    "order: mlp before attn": seed(
        arranged(Llama3, "resid_pre q k v o mlp attn resid"),
        LLAMA,
        execution_order="the output of 'mlp' comes next in layer 0, but the output of 'self_attn'",
        **RUNS,
    ),
    "order: k before q": seed(
        arranged(Llama3, "resid_pre k q v o attn mlp resid"),
        LLAMA,
        execution_order="the output of 'self_attn.k_proj' comes next in layer 0",
        **RUNS,
    ),
    "a module that runs twice": alone(
        changed(Llama3, mlp=Component("mlp.inner")),
        fresh(in_each_layer("mlp", Twice)),
        execution_order="'mlp.inner' of layer 0 runs 2 times",
    ),
    "a module that two layers share": seed(
        Llama3, fresh(share_a_module), execution_order="'self_attn.k_proj' of layer 0 runs 2 times"
    ),
    "a module that never runs": seed(
        changed(Llama3, mlp=Component("idle")),
        fresh(add_an_idle_module),
        execution_order="'idle' of layer 0 runs 0 times",
        **RUNS,
    ),
    "a module that is not there": seed(
        changed(Llama3, mlp=Component("ffn")), LLAMA, components="ffn", sweep="is at 'ffn'"
    ),
    "an item that is not there": seed(
        changed(Llama3, attn=Component("self_attn", item=5)), LLAMA, components="item 5 is not"
    ),
    "an item that is no activation": seed(
        changed(Llama3, attn=Component("self_attn", item=1)), LLAMA, components="is NoneType"
    ),
    # What the model does not do.
    "padding is seen": alone(
        Llama3,
        fresh(never_given("attention_mask", "position_ids")),
        padding="padding on the left changes",
    ),
    "padding moves positions": seed(
        GPT2, fresh(never_given("position_ids"), "gpt2"), padding="changes resid_pre of layer 0"
    ),
    "an encoder": seed(
        BERT,
        model_of("bert", is_decoder=False),
        causal="changing the last token changes resid of layer 0 at the positions [0, 1,",
        key_heads="reaches o at earlier positions",
    ),
    "an encoder, without heads": alone(
        attrs.evolve(
            BERT,
            components={name: row for name, row in BERT.components.items() if row.heads is None},
            cone=False,
        ),
        model_of("bert", is_decoder=False),
        causal="changing the last token changes resid of layer 0 at the positions [0, 1,",
    ),
    "attention without gradient": seed(
        Llama3,
        fresh(in_each_layer("self_attn.o_proj", Detached)),
        gradients="attn of layer 0 has no gradient",
    ),
    "no gradient behind a component": alone(
        changed(Llama3, mlp=Component("mlp.inner")),
        fresh(in_each_layer("mlp", Detached)),
        gradients="no finite gradient reaches mlp of layer 0",
    ),
    "other logits in each run": alone(
        Llama3, fresh(noise_in_the_logits), identity_patch="an identity patch of resid_pre"
    ),
    "other activations in each run": seed(
        Llama3,
        fresh(in_each_layer("mlp", Noisy)),
        identity_patch="an identity patch of resid_pre",
        edits_stay="an edit of mlp L0 [2] changes more",
    ),
    "other activations in each run, of no effect": alone(
        table(mlp=Component("mlp.inner")),
        fresh(in_each_layer("mlp", lambda inner: Narrowed(WithNoise(inner)))),
        edits_stay="an edit of mlp L0 [2] changes more",
    ),
    "an effect that does not depend on the sign": alone(
        table(mlp=Component("mlp.inner")),
        fresh(in_each_layer("mlp", Even)),
        patch_reaches_logits="mlp L0 can be turned round without any effect",
    ),
    "a head that was pruned": seed(
        Llama3,
        fresh(prune_a_head),
        patch_reaches_logits="H1 can be turned round without any effect",
        output_heads="o L0 H1 [2] reaches attn at the positions []",
    ),
    "attention that sees the token before": alone(
        attrs.evolve(Llama3, padding=False),
        fresh(in_each_layer("input_layernorm", Shifted)),
        cone_equals_full="gives other logits than run as a whole",
    ),
    "tokens past the residual stream": alone(
        attrs.evolve(Llama3, cone=False),
        fresh(show_tokens_to_the_last_mlp),
        residual_is_everything="resid_pre of layer 0, patched at every position",
    ),
    "logits for tokens that are not in the vocabulary": alone(
        Llama3, fresh(predict_more_tokens), sweep="the model's vocabulary is 0 to 63"
    ),
    "attn and mlp swapped, where they are parallel": seed(
        arranged(
            NEOX,
            "resid_pre q k v o mlp attn resid",
            mlp=Component("attention"),
            attn=Component("mlp"),
        ),
        model_of("gpt_neox"),
        blocks="attn of layer 0 brings nothing from earlier tokens",
    ),
    # What an adapter claims.
    "another model_type": alone(
        attrs.evolve(Llama3, model_types=("llama4", "llama5")),
        LLAMA,
        model_type="model_type 'llama' is not among ('llama4', 'llama5')",
    ),
    "a table with a row for any name": alone(
        AnswersToAnyName(), LLAMA, undeclared="component 'no such component' is not refused"
    ),
}
for _path in ("gate_proj", "up_proj"):
    _row = Component(f"mlp.{_path}")
    SEEDS[f"mlp: {_path}"] = seed(changed(Llama3, mlp=_row), LLAMA, components="48 wide")
    SEEDS[f"mlp: {_path}, as wide"] = seed(changed(Llama3, mlp=_row), SQUARE, residual=NO_SUM)
    SEEDS[f"mlp: {_path}, as wide, scaled"] = seed(
        scaled(changed(Llama3, mlp=_row)), SQUARE, residual=f"{NO_SUM}, scaled"
    )
_INSIDE = changed(Llama3, mlp=Component("mlp.down_proj", "input"))
SEEDS["mlp: inside"] = seed(_INSIDE, SQUARE, residual=NO_SUM)
SEEDS["mlp: inside, scaled"] = seed(scaled(_INSIDE), SQUARE, residual=f"{NO_SUM}, scaled")


@pytest.mark.parametrize("name", SEEDS)
def test_the_check_that_should_find_it_does(name: str) -> None:
    wrong = SEEDS[name]
    only = None if wrong.alone else list(wrong.fails)
    found = failures(run_checks(wrong.api, wrong.model(), only=only))
    assert set(found) == set(wrong.fails), found
    for check, words in wrong.fails.items():
        assert words in found[check]


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_finds_something_that_no_other_finds(check: str) -> None:
    assert [name for name, wrong in SEEDS.items() if wrong.alone and set(wrong.fails) == {check}]


# A check that could pass without running the model would be no check.


class BrokenError(RuntimeError):
    pass


def break_forward(model: Any) -> None:
    def refuse(*_: Any) -> None:
        raise BrokenError

    model.lm_head.register_forward_pre_hook(refuse)


def test_each_check_of_numbers_runs_the_model() -> None:
    forwards: list[str] = []
    model = fresh(lambda model: calling(model, lambda: forwards.append("")))
    subject = make_subject(Llama3, model())
    for name, check in CHECKS.items():
        before = len(forwards)
        check(subject)
        assert (len(forwards) > before) is (name in NUMBERS), name


def test_no_check_of_numbers_passes_on_a_model_that_does_not_run() -> None:
    results = run_checks(Llama3, fresh(break_forward)())
    assert set(failures(results)) == set(NUMBERS)
    assert all("BrokenError" in reason for reason in failures(results).values())


NO_HEADS = {name: attrs.evolve(Llama3.components[name], heads=None) for name in "qkv"}


@pytest.mark.parametrize(
    ("api", "model", "layers", "checks"),
    [
        pytest.param(changed(Llama3, **NO_HEADS), LLAMA, None, "query key value", id="no heads"),
        pytest.param(table("o"), LLAMA, None, "output", id="nothing that o could reach"),
        pytest.param(
            QWEN3_NEXT,
            RIGHT["qwen3_next"][1],
            [0],
            "query key value output",
            id="no such layer among those to look at",
        ),
    ],
)
def test_what_has_nothing_to_look_at_does_not_pass(
    api: Any, model: Callable[[], Any], layers: list[int] | None, checks: str
) -> None:
    names = [f"check_{part}_heads" for part in checks.split()]
    results = run_checks(api, model(), only=names, layers=layers)
    # What an adapter declares is known; what the layers have is a matter of the model.
    expected = "skipped" if layers is None else "failed"
    assert [result.status for result in results] == [expected] * len(names)
    assert all(result.reason for result in results)
    if layers is not None:
        assert all("no layer that is looked at has" in result.reason for result in results)


def test_the_projections_output_for_o_without_q_k_and_v() -> None:
    api = table("attn", "mlp", o=Component("self_attn.o_proj", heads="query"))
    assert failures(run_checks(arranged(api, "o attn mlp"), LLAMA()))


# What is right, but unlike the tiny models.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precision(dtype: torch.dtype) -> None:
    assert failures(run_checks(Llama3, fresh(lambda model: model.to(dtype))())) == {}


def test_double_precision() -> None:
    assert failures(run_checks(Llama3, fresh(lambda model: model.double())())) == {}


def test_large_activations() -> None:
    def enlarge(model: Any) -> None:
        with torch.no_grad():
            model.model.embed_tokens.weight *= 1000
        model.to(torch.bfloat16)

    found = failures(run_checks(Llama3, fresh(enlarge)(), only=["check_edits_stay"]))
    assert found == {}


def test_frozen_parameters() -> None:
    model = fresh(lambda model: model.requires_grad_(False))()
    assert failures(run_checks(Llama3, model)) == {}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_left_of_the_checks() -> None:
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    # Dropout is off: with it, no two runs would be alike.
    assert failures(run_checks(Llama3, model)) == {}
    assert failures(run_checks(Llama3, fresh(break_forward)())) != {}
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    hooks = [
        [*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks]
        for module in model.modules()
    ]
    assert not any(hooks)


# Running the kit.


def test_results_come_in_the_order_of_the_kit() -> None:
    results = run_checks(Llama3, LLAMA())
    assert [result.check for result in results] == list(CHECKS)
    assert {result.status for result in results} == {"passed"}
    assert all(result.ok and result.reason == "" for result in results)


def test_only_some_checks_run() -> None:
    wanted = ["check_padding", "check_layers"]
    for given in (wanted, tuple(wanted), iter(wanted)):
        results = run_checks(Llama3, LLAMA(), only=given)
        assert [result.check for result in results] == wanted
    assert run_checks(Llama3, LLAMA(), only=[]) == []


def test_only_some_layers_are_looked_at() -> None:
    wrong = last_layer(q=heads(Llama3, "q", 0, 1, 3, 2).components["q"])
    model = fresh(mark_last)()
    run = functools.partial(run_checks, wrong, model)
    assert failures(run(layers=[0])) == {}
    assert set(failures(run(layers=[1]))) == {"check_query_heads"}
    for layers in ([1, 0], (0, 1, 1), iter([1])):
        (result,) = run(layers=layers, only=["check_query_heads"])
        assert result.status == "failed"


@pytest.mark.parametrize("layers", [[2], [-1], [0.5], ["0"], [True]])
def test_layers_that_are_not_there(layers: list[Any]) -> None:
    with pytest.raises(LayerError, match="layer"):
        run_checks(Llama3, LLAMA(), layers=layers)


def test_known_failures() -> None:
    wrong = attrs.evolve(GRANITE, residual="sum", padding=False)
    known = {
        "check_residual": "scaled",
        "check_layers": "no longer true",
        "check_padding": "does not apply",
    }
    only = ["check_residual", "check_layers", "check_padding", "check_causal"]
    results = run_checks(wrong, HALVED(), known_failures=known, only=only)
    found = {result.check: result for result in results}
    assert [result.status for result in results] == ["known failure", "fixed", "skipped", "passed"]
    assert [result.ok for result in results] == [True, False, True, True]
    assert found["check_residual"].reason.startswith("scaled (resid_pre + attn + mlp is not resid")
    assert found["check_layers"].reason == "no longer true"
    assert found["check_padding"].reason == "the adapter declares padding=False"
    # A check that is not run is no failure, known or not.
    assert run_checks(wrong, HALVED(), known_failures=known, only=["check_causal"])[0].ok


def test_a_reason_names_an_error_that_is_not_the_checks_own() -> None:
    wrong = attrs.evolve(Llama3, layers="model.blocks")
    (result,) = run_checks(wrong, LLAMA(), only=["check_layers"])
    assert result.reason.startswith("AdapterError: adapter 'Llama3' does not fit LlamaForCausalLM")
    (result,) = run_checks(attrs.evolve(GRANITE, residual="sum"), HALVED(), only=["check_residual"])
    assert result.reason.startswith("resid_pre + attn + mlp is not resid")


@pytest.mark.parametrize("where", ["only", "known_failures"])
def test_a_name_that_is_no_check(where: str) -> None:
    given = {"only": ["check_heads"], "known_failures": {"check_heads": "new"}}[where]
    with pytest.raises(UnknownNameError) as error:
        run_checks(Llama3, LLAMA(), **{where: given})
    assert "'check_heads'" in str(error.value)
    assert all(name in str(error.value) for name in CHECKS)


@pytest.mark.parametrize("model", [None, "llama", nn.Linear(2, 2)])
def test_no_model(model: Any) -> None:
    with pytest.raises(AdapterError):
        run_checks(Llama3, model)


def test_a_wrapped_model() -> None:
    assert failures(run_checks(Llama3, NNsight(tiny_model(num_hidden_layers=2)))) == {}


@pytest.mark.parametrize(
    ("api", "skipped"),
    [
        (Llama3, {}),
        (
            arranged(Llama3, "resid_pre o attn mlp resid"),
            {"query_heads": "no q", "key_heads": "no k", "value_heads": "no v"},
        ),
        (
            arranged(Llama3, "resid_pre q k v attn mlp resid"),
            dict.fromkeys(("query_heads", "key_heads", "value_heads", "output_heads"), "no o"),
        ),
        (
            arranged(Llama3, "resid_pre q k v o attn mlp"),
            {
                "residual_is_everything": "no resid",
                "causal": "no resid",
                "residual": "lacks the residual stream",
            },
        ),
        (
            arranged(Llama3, "q k v o attn mlp resid"),
            {"residual": "lacks the residual stream", "blocks": "no resid_pre"},
        ),
        (
            arranged(Llama3, "resid_pre q k v o resid"),
            {"residual": "what is added to it", "blocks": "no attn"},
        ),
        (arranged(Llama3, "resid_pre q k v o attn resid"), {}),
        (attrs.evolve(Llama3, padding=False), {"padding": "declares padding=False"}),
        (attrs.evolve(Llama3, residual=None), {"residual": "declares residual=None"}),
        (scaled(Llama3), {}),
        # What some layers have is looked at there.
        (QWEN3_NEXT, {"cone_equals_full": "declares cone=False"}),
        # By default, what is not declared is what DecoderAPI has by default.
        (OwnCounts(), {}),
    ],
)
def test_why_a_check_does_not_apply(api: Any, skipped: dict[str, str]) -> None:
    found = {name: reason for name in CHECKS if (reason := why_skipped(name, api)) is not None}
    assert set(found) == {f"check_{name}" for name in skipped}
    assert all(words in found[f"check_{name}"] for name, words in skipped.items())


# As a plugin's tests run it.


def cases(*args: Any, **options: Any) -> dict[str, Any]:
    """The id of each case to the case."""
    names, found = parametrize_with_checks(*args, **options).args
    assert names == "check"
    return {case.id: case for case in found}


def test_one_case_for_each_check_of_each_adapter_on_each_model() -> None:
    both = DecoderAPI("Both", ("llama", "mistral"), decoder_components())
    assert list(cases(both)) == [
        f"Both-{model}-{check}" for model in ("llama", "mistral") for check in CHECKS
    ]
    assert list(cases([Llama3, GPT2])) == [
        *(f"Llama3-llama-{check}" for check in CHECKS),
        *(f"GPT2-gpt2-{check}" for check in CHECKS),
    ]
    models = {"grouped": LLAMA, "ungrouped": UNGROUPED}
    assert list(cases("Llama3", models)) == [
        f"Llama3-{model}-{check}" for model in models for check in CHECKS
    ]
    assert not any(case.marks for case in cases(both).values())


def test_marks_of_a_case() -> None:
    wrong = attrs.evolve(Llama3, padding=False)
    known = {"check_residual": "one day", "check_padding": "does not apply"}
    found = cases(wrong, known_failures=known)
    marked = {name: case.marks for name, case in found.items() if case.marks}
    assert list(marked) == ["Llama3-llama-check_residual", "Llama3-llama-check_padding"]
    (failing,), (skipped,) = marked.values()
    assert (failing.name, failing.kwargs) == ("xfail", {"reason": "one day", "strict": True})
    assert skipped.name == "skip"
    assert skipped.kwargs == {"reason": "the adapter declares padding=False"}


def test_a_model_is_made_when_it_is_needed_and_once() -> None:
    made = []

    def make() -> Any:
        made.append("")
        return LLAMA()

    found = cases(Llama3, {"tiny": make})
    assert made == []
    for check in ("check_model_type", "check_layers"):
        (bound,) = found[f"Llama3-tiny-{check}"].values
        bound()
    assert len(made) == 1


def test_a_case_fails_as_its_check_does() -> None:
    found = cases(attrs.evolve(GRANITE, residual="sum"), {"halved": HALVED})
    (bound,) = found["Granite-halved-check_residual"].values
    with pytest.raises(CheckError, match="is not resid in layer 0"):
        bound()


def test_a_case_does_not_warn_of_its_own_prompts() -> None:
    """A plugin's tests may make each warning an error, as these do."""
    first = int(make_subject(Llama3, LLAMA()).source.tokens[0, 0])
    model = model_of("llama", pad_token_id=first)
    (bound,) = cases(Llama3, {"tiny": model})["Llama3-tiny-check_sweep"].values
    bound()


def test_a_case_does_not_warn_of_what_is_another_check() -> None:
    other = attrs.evolve(Llama3, model_types=("other",))
    (bound,) = cases(other, {"tiny": LLAMA})["Llama3-tiny-check_sweep"].values
    bound()


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        (([],), {}, PatchingError, "at least one"),
        (("Llama9",), {}, UnknownNameError, "Llama9"),
        ((3,), {}, AdapterError, "adapter"),
        ((None,), {}, AdapterError, "adapter"),
        ((Llama3,), {"known_failures": {"check_heads": ""}}, UnknownNameError, "check_padding"),
    ],
)
def test_arguments_that_are_none(
    args: tuple, options: dict, error: type[PatchingError], words: str
) -> None:
    with pytest.raises(error, match=words):
        parametrize_with_checks(*args, **options)


PLUGINS_TESTS = """
import attrs
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from nnpatch_llama import Llama3

one_layer = {"tiny": lambda: tiny_model("llama", num_hidden_layers=1)}

@parametrize_with_checks(Llama3, one_layer)
def test_right(check):
    check()

wrong = attrs.evolve(Llama3, query_heads=2, key_value_heads=1, padding=False)

@parametrize_with_checks(wrong, one_layer, known_failures={
    "check_query_heads": "counted wrongly", "check_layers": "they were",
})
def test_wrong(check):
    check()
"""


def test_pytest_runs_the_cases(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(PLUGINS_TESTS)
    result = pytester.runpytest_inprocess("-rxsf", "-p", "no:cacheprovider")
    # Of the wrong one: k's heads, and what is said to fail but does not.
    result.assert_outcomes(passed=2 * len(CHECKS) - 4, failed=2, xfailed=1, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "FAILED *test_wrong[[]Llama3-tiny-check_key_heads[]]*",
            "FAILED *test_wrong[[]Llama3-tiny-check_layers[]]*",
            "*CheckError: half of k L0 H0 does not reach*",
            "XFAIL *test_wrong[[]Llama3-tiny-check_query_heads[]] - counted wrongly",
            "SKIPPED * the adapter declares padding=False",
        ]
    )
