"""Adapters of many families, as a third party would write them, each with a tiny model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.testing import tiny_model
from tests.helpers.kit import GPT2, GRANITE, MIXTRAL, NEOX, QWEN3_NEXT

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
Starcoder2 = DecoderAPI("Starcoder2", ("starcoder2",), decoder_components())
Cohere = DecoderAPI("Cohere", ("cohere",), decoder_components())

# Nearly so.

POST_NORMS = decoder_components(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")
Gemma2 = DecoderAPI("Gemma2", ("gemma2",), POST_NORMS)
Gemma3 = DecoderAPI("Gemma3", ("gemma3_text",), POST_NORMS)
Olmo2 = DecoderAPI("Olmo2", ("olmo2",), POST_NORMS)
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
LINEAR = decoder_components(attn="linear_attn", heads={})
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
    "gpt2": Family(GPT2, two_layers("gpt2")),
    "gpt_neox": Family(NEOX, two_layers("gpt_neox")),
    "gptj": Family(GptJ, two_layers("gptj")),
    "granite": Family(GRANITE, two_layers("granite", residual_multiplier=0.3)),
    "lfm2": Family(
        Lfm2,
        functools.partial(tiny_model, "lfm2", layer_types=["conv", "full_attention", "conv"]),
    ),
    "llama, MLP first in one layer": Family(MixedOrder, mlp_first_in_one_layer),
    "llama, more heads in one layer": Family(Listed, more_heads_in_one_layer),
    "mixtral": Family(MIXTRAL, two_layers("mixtral")),
    "mpt": Family(Mpt, two_layers("mpt")),
    "olmo2": Family(Olmo2, two_layers("olmo2")),
    "olmo_hybrid": Family(
        OlmoHybrid, functools.partial(tiny_model, "olmo_hybrid", layer_types=HYBRID)
    ),
    "opt": Family(Opt, two_layers("opt")),
    "phi": Family(Phi, two_layers("phi")),
    "phi3": Family(Phi3, two_layers("phi3")),
    "qwen3": Family(Qwen3, two_layers("qwen3")),
    "qwen3_next": Family(QWEN3_NEXT, functools.partial(tiny_model, "qwen3_next")),
    "starcoder2": Family(Starcoder2, two_layers("starcoder2")),
}
#: Variants that are laid out as another family.
LAID_OUT_AS = {"falcon, one after the other": "falcon", "falcon, alibi": "falcon"}


@functools.cache
def model_of(name: str) -> Any:
    return FAMILIES[name].model()
