"""Adapters of many families, as a third party would write them: the kit, and plain hooks.

None of them needs a change of nnpatch_core: each is a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any, NamedTuple

import attrs
import pytest
import torch
from nnsight import NNsight
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    MultiSite,
    Site,
    Sites,
    activation_patching,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.adapters import PartOfHead
from nnpatch_core.errors import AdapterError, HeadError, LayerError
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from tests.helpers.family_oracle import LAYOUTS, FamilyOracle, Spot
from tests.helpers.oracle import lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: At most 5e-6 was measured, and the smallest of the largest effects is 2e-3.
ATOL = 1e-5
#: Two lengths, so that one prompt is padded, but at neither of the positions, as counted from the
#: end.
LENGTHS = (6, 4)
LAST, MIDDLE = 1, 3
#: With the usual prompts this model magnifies rounding in one cell: on some processors plain torch
#: alone gives the padded and the bare prompt logits that are 2e-5 apart.
SEEDS = {"qwen3_next": 5}


class Family(NamedTuple):
    """An adapter, and what makes a tiny model for it."""

    api: DecoderAPI
    model: Callable[[], Any]


# Laid out like Llama.

Gemma = DecoderAPI("Gemma", ("gemma",), decoder_components())
Qwen3 = DecoderAPI("Qwen3", ("qwen3",), decoder_components())
Mixtral = DecoderAPI("Mixtral", ("mixtral",), decoder_components())
Starcoder2 = DecoderAPI("Starcoder2", ("starcoder2",), decoder_components())
Cohere = DecoderAPI("Cohere", ("cohere",), decoder_components())

# Nearly so.

POST_NORMS = decoder_components(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")
Gemma2 = DecoderAPI("Gemma2", ("gemma2",), POST_NORMS)
Gemma3 = DecoderAPI("Gemma3", ("gemma3_text",), POST_NORMS)
Olmo2 = DecoderAPI("Olmo2", ("olmo2",), POST_NORMS)
Granite = DecoderAPI("Granite", ("granite",), decoder_components(), residual="scaled")
Phi = DecoderAPI("Phi", ("phi",), decoder_components(heads=separate_projections(o="dense")))
Opt = DecoderAPI(
    "Opt",
    ("opt",),
    decoder_components(mlp="fc2", heads=separate_projections(o="out_proj")),
    "model.decoder.layers",
)
GptJ = DecoderAPI(
    "GptJ",
    ("gptj",),
    decoder_components(attn="attn", heads=separate_projections("attn", o="out_proj")),
    "transformer.h",
)

# With one projection for queries, keys and values.

Gpt2 = DecoderAPI(
    "Gpt2",
    ("gpt2",),
    decoder_components(attn="attn", heads=fused_projections("attn.c_attn", "attn.c_proj", Fused)),
    "transformer.h",
)
GptNeoX = DecoderAPI(
    "GptNeoX",
    ("gpt_neox",),
    decoder_components(
        attn="attention",
        heads=fused_projections("attention.query_key_value", "attention.dense", Interleaved),
    ),
    "gpt_neox.layers",
)
Phi3 = DecoderAPI(
    "Phi3",
    ("phi3",),
    decoder_components(heads=fused_projections("self_attn.qkv_proj", "self_attn.o_proj", Fused)),
)
Mpt = DecoderAPI(
    "Mpt",
    ("mpt",),
    decoder_components(
        attn="attn",
        mlp="ffn.down_proj",
        heads=fused_projections("attn.Wqkv", "attn.out_proj", Fused),
    ),
    "transformer.blocks",
    cone=False,
)
# Attention and MLP of BLOOM add the residual stream themselves, after their last projection.
Bloom = DecoderAPI(
    "Bloom",
    ("bloom",),
    decoder_components(
        attn="self_attention.dense",
        mlp="mlp.dense_4h_to_h",
        heads=fused_projections(
            "self_attention.query_key_value", "self_attention.dense", Interleaved
        ),
    ),
    "transformer.h",
    cone=False,
)


def falcon_groups(config: Any, layer: int) -> int:
    """Multi-query Falcons ignore the number that their config has."""
    if config.multi_query and not config.new_decoder_architecture:
        return 1
    return config.num_kv_heads


Falcon = DecoderAPI(
    "Falcon",
    ("falcon",),
    decoder_components(
        attn="self_attention",
        heads=fused_projections(
            "self_attention.query_key_value", "self_attention.dense", Interleaved
        ),
    ),
    "transformer.h",
    key_value_heads=falcon_groups,
)

# With layers that differ.

Lfm2 = DecoderAPI(
    "Lfm2",
    ("lfm2",),
    {
        "resid_pre": Component("", "input"),
        "mlp": Component("feed_forward"),
        "resid": Component(""),
    },
    kinds={
        "self_attn": decoder_components(
            mlp="feed_forward", heads=separate_projections(o="out_proj")
        )
    },
    # What the convolutions of the other layers add is no component.
    residual=None,
    cone=False,
)
QUERY_AND_GATE = separate_projections()
QUERY_AND_GATE["q"] = attrs.evolve(QUERY_AND_GATE["q"], columns=PartOfHead(0, parts=2))
LINEAR = decoder_components(attn="linear_attn", heads={})
Qwen3Next = DecoderAPI(
    "Qwen3Next",
    ("qwen3_next",),
    LINEAR,
    kinds={"self_attn": decoder_components(heads=QUERY_AND_GATE)},
    cone=False,
)
OlmoHybrid = DecoderAPI(
    "OlmoHybrid",
    ("olmo_hybrid",),
    LINEAR,
    kinds={"post_feedforward_layernorm": POST_NORMS},
    cone=False,
)
#: The number of heads is a list in the config, or a function.
Listed = DecoderAPI(
    "Listed", ("llama",), decoder_components(), key_value_heads="key_value_heads_of_layers"
)
Counted = attrs.evolve(
    Listed, name="Counted", key_value_heads=lambda config, layer: 4 if layer == 1 else 2
)


def more_heads_in_one_layer() -> Any:
    """Layer 1 has a key and a value for each query head, the others one for two."""
    model, other = tiny_model("llama"), tiny_model("llama", num_key_value_heads=4)
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    model.config.key_value_heads_of_layers = [2, 4, 2]
    return model


class MlpFirst(LlamaDecoderLayer):
    """Attention and MLP in parallel, the MLP first."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__(config, number)
        self.mlp_first = nn.Identity()

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        mlp = self.mlp(normed)
        attn, _ = self.self_attn(hidden_states=normed, **kwargs)
        return hidden_states + mlp + attn


_LLAMA = decoder_components()
_ORDER = ("resid_pre", "mlp", "q", "k", "v", "o", "attn", "resid")
MixedOrder = DecoderAPI(
    "MixedOrder",
    ("llama",),
    _LLAMA,
    kinds={"mlp_first": {name: _LLAMA[name] for name in _ORDER}},
)


def mlp_first_in_one_layer() -> Any:
    model = tiny_model("llama")
    layer = MlpFirst(model.config, 1).eval()
    layer.load_state_dict(model.model.layers[1].state_dict())
    model.model.layers[1] = layer
    return model


def two_layers(family: str, **settings: Any) -> Callable[[], Any]:
    return functools.partial(tiny_model, family, num_hidden_layers=2, **settings)


HYBRID = ["linear_attention", "full_attention", "linear_attention"]
FAMILIES = {
    "bloom": Family(Bloom, two_layers("bloom")),
    "cohere": Family(Cohere, two_layers("cohere")),
    "falcon": Family(Falcon, two_layers("falcon")),
    "falcon, one after the other": Family(Falcon, two_layers("falcon", parallel_attn=False)),
    "falcon, alibi": Family(Falcon, two_layers("falcon", alibi=True)),
    "falcon, by head": Family(Falcon, two_layers("falcon", multi_query=False)),
    "falcon, by group": Family(
        Falcon, two_layers("falcon", new_decoder_architecture=True, num_kv_heads=2)
    ),
    "gemma": Family(Gemma, two_layers("gemma")),
    "gemma2": Family(Gemma2, two_layers("gemma2")),
    "gemma3_text": Family(
        Gemma3,
        two_layers("gemma3_text", layer_types=["sliding_attention", "full_attention"]),
    ),
    "gpt2": Family(Gpt2, two_layers("gpt2")),
    "gpt_neox": Family(GptNeoX, two_layers("gpt_neox")),
    "gptj": Family(GptJ, two_layers("gptj")),
    "granite": Family(Granite, two_layers("granite", residual_multiplier=0.3)),
    "lfm2": Family(
        Lfm2,
        functools.partial(tiny_model, "lfm2", layer_types=["conv", "full_attention", "conv"]),
    ),
    "llama, MLP first in one layer": Family(MixedOrder, mlp_first_in_one_layer),
    "llama, more heads in one layer": Family(Listed, more_heads_in_one_layer),
    "mixtral": Family(Mixtral, two_layers("mixtral")),
    "mpt": Family(Mpt, two_layers("mpt")),
    "olmo2": Family(Olmo2, two_layers("olmo2")),
    "olmo_hybrid": Family(
        OlmoHybrid, functools.partial(tiny_model, "olmo_hybrid", layer_types=HYBRID)
    ),
    "opt": Family(Opt, two_layers("opt")),
    "phi": Family(Phi, two_layers("phi")),
    "phi3": Family(Phi3, two_layers("phi3")),
    "qwen3": Family(Qwen3, two_layers("qwen3")),
    "qwen3_next": Family(Qwen3Next, functools.partial(tiny_model, "qwen3_next")),
    "starcoder2": Family(Starcoder2, two_layers("starcoder2")),
}
#: Variants that are laid out as another family.
LAID_OUT_AS = {"falcon, one after the other": "falcon", "falcon, alibi": "falcon"}


@functools.cache
def model_of(name: str) -> Any:
    return FAMILIES[name].model()


def kit(name: str) -> list[Any]:
    made = {name: functools.partial(model_of, name)}
    return parametrize_with_checks(FAMILIES[name].api, made).args[1]


@pytest.mark.parametrize("check", [case for name in FAMILIES for case in kit(name)])
def test_the_kit(check: Callable[[], None]) -> None:
    check()


# Plain hooks.


class Hooks:
    """Two pairs of prompts of a family, and what plain hooks say of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.oracle = FamilyOracle(model_of(name), LAYOUTS[LAID_OUT_AS.get(name, name)])
        seed = SEEDS.get(name, 1)
        self.source = random_prompts(LENGTHS, seed=seed)
        self.target = random_prompts(LENGTHS, seed=seed + 1)
        self.source_tokens, self.mask = lay_out(self.source, "left", seed=3)
        self.target_tokens, _ = lay_out(self.target, "left", seed=4)
        source = torch.stack([self.oracle.logits(prompt) for prompt in self.source])
        target = torch.stack([self.oracle.logits(prompt) for prompt in self.target])
        # The two tokens between which the runs differ most, so that no effect is a small one.
        self.answers = (source - target).argmax(-1), (source - target).argmin(-1)
        self.unpatched = self.difference(target)

    def difference(self, logits: torch.Tensor) -> torch.Tensor:
        """The logit difference of each prompt, `[batch]`."""
        rows = torch.arange(len(LENGTHS))
        return logits[rows, self.answers[0]] - logits[rows, self.answers[1]]

    def patched(self, *spots: Spot) -> torch.Tensor:
        """The logit difference of each prompt, `[batch]`, with all of the spots patched."""
        pairs = zip(self.target, self.source, strict=True)
        return self.difference(
            torch.stack([self.oracle.patched(target, source, spots) for target, source in pairs])
        )

    def sweep(self, sites: Any, api: Any = None) -> Any:
        return activation_patching(
            model_of(self.name),
            FAMILIES[self.name].api if api is None else api,
            sites,
            self.source_tokens,
            self.target_tokens,
            *self.answers,
            attention_mask=self.mask,
            progress=False,
        )


hooks = functools.cache(Hooks)


def spots(oracle: FamilyOracle, component: str) -> Iterator[Spot]:
    """A component in the first two layers, as far as they have it: some heads and positions."""
    for layer, back in product((0, 1), (LAST, MIDDLE)):
        if component in oracle.layout.table(layer):
            heads = oracle.heads(component, layer)
            for head in dict.fromkeys((heads[0], heads[-1])):
                yield component, layer, head, back


def site(api: DecoderAPI, spot: Spot) -> Site:
    component, layer, head, back = spot
    return Site.get_site(api, component, layer, head, [-back])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_equals_plain_hooks(name: str) -> None:
    known, api = hooks(name), FAMILIES[name].api
    components = list(dict.fromkeys(chain(*known.oracle.layout.tables)))
    wanted = {component: list(spots(known.oracle, component)) for component in components}
    out = known.sweep(Sites.from_sites(site(api, spot) for spot in chain(*wanted.values())))
    declared = {*api.components, *chain(*api.kinds.values())}
    assert set(out) == set(components) == declared
    for component, cells in wanted.items():
        expected = torch.stack([known.patched(spot) for spot in cells])
        torch.testing.assert_close(out.patched(component), expected, atol=ATOL, rtol=0)
        # Something moves, and by far more than the tolerance.
        assert (expected - known.unpatched).abs().max() > 100 * ATOL, component


# Layers that differ.


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("qwen3_next", "q k v o"), ("olmo_hybrid", "q k v o"), ("lfm2", "q k v o attn")],
)
def test_a_sweep_of_every_layer_is_of_those_that_have_the_component(
    name: str, lacking: str
) -> None:
    known = hooks(name)
    out = known.sweep(Sites([*lacking.split(), "mlp"], seq_pos_type="last"))
    assert out["mlp"].shape == (3,)
    assert out.swept("mlp").all()
    frame = out.to_dataframe()
    for component in lacking.split():
        heads = known.oracle.heads(component, 1)
        assert out[component].shape == (3, *([] if heads == [None] else [len(heads)]))
        assert out.swept(component)[1].all()
        assert not out.swept(component)[[0, 2]].any()
        assert torch.equal(out[component][[0, 2]], torch.zeros_like(out[component][[0, 2]]))
        assert out.patched(component)[[0, 2]].isnan().all()
        for head in heads:
            index = (1,) if head is None else (1, head)
            expected = known.patched((component, 1, head, LAST))
            torch.testing.assert_close(out.patched(component)[index], expected, atol=ATOL, rtol=0)
        rows = frame[frame["site"] == component]
        assert len(rows) == 3 * len(heads)
        assert rows["layer"][rows["value"].notna()].tolist() == [1] * len(heads)
        assert out.to_xarray()[component].notnull().any(..., keep_attrs=True)


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid", "lfm2"])
def test_a_layer_without_the_component_is_refused(name: str) -> None:
    known, api = hooks(name), FAMILIES[name].api
    refusal = r"layer 0 has no 'o'; the layers \[1\] have one"
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites("o", layers=[0, 1]))
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites(["mlp", "z"], layers=[0]))
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites.from_sites([Site.get_site(api, "o", 0)]))
    assert list(known.sweep(Sites("o", layers=[1]))) == ["o"]


def test_a_component_that_no_layer_of_this_model_has_is_refused() -> None:
    model = tiny_model("lfm2", layer_types=["conv"] * 3)
    tokens, answers = torch.tensor([[5, 6, 7]]), torch.tensor([5])
    for names in ("q", ["resid", "q"]):
        with pytest.raises(LayerError, match="no layer of this model has"):
            activation_patching(
                model, Lfm2, Sites(names), tokens, tokens + 1, answers, answers + 1, progress=False
            )


@pytest.mark.parametrize("api", [Listed, Counted], ids=lambda api: api.name)
def test_layers_with_other_numbers_of_heads(api: DecoderAPI) -> None:
    """The axis of heads is as long as the layer with most of them needs."""
    known = hooks("llama, more heads in one layer")
    out = known.sweep(Sites(["k", "v", "q"], seq_pos_type="last"), api)
    assert out["q"].shape == (3, 4)
    assert out.swept("q").all()
    for component in ("k", "v"):
        has = [[True, True, False, False], [True] * 4, [True, True, False, False]]
        assert out.swept(component).tolist() == has
        assert out[component].shape == (3, 4)
        for layer, head in out.swept(component).nonzero().tolist():
            expected = known.patched((component, layer, head, LAST))
            found = out.patched(component)[layer, head]
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
        rows = out.to_dataframe()
        rows = rows[(rows["site"] == component) & rows["value"].isna()]
        assert rows[["layer", "head"]].values.tolist() == [[0, 2], [0, 3], [2, 2], [2, 3]]
    with pytest.raises(HeadError, match="head 3 of 'k' is out of range"):
        known.sweep(Sites("k", layers=[0], heads=[3]), api)
    assert known.sweep(Sites("k", layers=[1], heads=[3]), api).swept("k").sum() == 1


def test_a_list_of_heads_that_is_too_short() -> None:
    model = more_heads_in_one_layer()
    model.config.key_value_heads_of_layers = [2, 4]
    with pytest.raises(AdapterError, match="key_value_heads_of_layers"):
        Sites("k").get_sites_dict(model, Listed, torch.tensor([[5, 6]]))


#: In this order a forward reaches neither the first layer's nor the second layer's.
SEVERAL: list[Spot] = [
    ("attn", 1, None, LAST),
    ("q", 1, 2, MIDDLE),
    ("mlp", 1, None, MIDDLE),
    ("mlp", 0, None, LAST),
    ("k", 0, 1, MIDDLE),
]


def test_several_sites_of_layers_that_run_in_another_order() -> None:
    known = hooks("llama, MLP first in one layer")
    both = MultiSite([site(MixedOrder, spot) for spot in SEVERAL], name="both")
    reached = [
        (each.layer, each.component) for each in both.in_order(NNsight(model_of(known.name)))
    ]
    assert reached == [(0, "k"), (0, "mlp"), (1, "mlp"), (1, "q"), (1, "attn")]
    out = known.sweep(Sites.from_sites([both]))
    expected = known.patched(*SEVERAL)
    torch.testing.assert_close(out.patched("both")[0], expected, atol=ATOL, rtol=0)
    assert (expected - known.unpatched).abs().min() > 100 * ATOL


def test_several_sites_in_ones_own_traces() -> None:
    """Prompts of one length, as the user's own trace has no mask."""
    known = hooks("llama, MLP first in one layer")
    nnmodel = NNsight(model_of(known.name))
    both = MultiSite([site(MixedOrder, spot) for spot in SEVERAL])
    source, target = known.source[0], known.target[0]
    with torch.no_grad(), nnmodel.trace(torch.tensor([source])):
        both.cache(nnmodel)
    with torch.no_grad(), nnmodel.trace(torch.tensor([target])):
        both.patch(nnmodel)
        logits = nnmodel.output.logits[0, -1].save()
    expected = known.oracle.patched(target, source, SEVERAL)
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
