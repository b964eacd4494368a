"""The kit can fail: each kind of wrong adapter or model is found by the check that should find it.

A seed is one thing wrong, with the checks that must fail for it and words of what they must say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    decoder_components,
    fused_projections,
)
from nnpatch_core.adapters import PartOfHead
from nnpatch_core.testing import CHECKS, run_checks
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3
from tests.helpers.kit import (
    BERT,
    GATED,
    GEMMA2,
    GPT2,
    GRANITE,
    HALVED,
    LLAMA,
    MIXTRAL,
    NEOX,
    QWEN3_NEXT,
    RIGHT,
    SQUARE,
    UNGROUPED,
    OwnCounts,
    Wrapped,
    arranged,
    changed,
    columns,
    failures,
    fresh,
    heads,
    in_each_layer,
    last_layer,
    mark_last,
    model_of,
    scaled,
    table,
)

#: nnsight says so of BERT's modules called `output`, which is of no use to anybody here.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named:UserWarning")


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_fails_for_an_adapter_that_is_right(name: str) -> None:
    api, model = RIGHT[name]
    assert failures(run_checks(api, model())) == {}


def at(name: str, module: str) -> Component:
    """Llama's row of a component, at another module."""
    return attrs.evolve(Llama3.components[name], module=module)


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


def another_list(name: str, pick: Callable[[list[nn.Module]], list[nn.Module]]) -> Callable:
    def edit(model: Any) -> None:
        setattr(model.model, name, nn.ModuleList(pick(list(model.model.layers))))

    return fresh(edit)


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
