"""Tiny random models of every family that transformers has, made in moments without a download."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from nnpatch_core._sizes import bounded, check_config
from nnpatch_core._upstream import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    transformers,
)
from nnpatch_core.errors import AdapterError, UnknownNameError

_WIDTH, _LAYERS, _HEADS, _DIM, _FEED_FORWARD, _LENGTH = 32, 3, 4, 8, 48, 128
#: The settings that a config is offered, under each name that some family has for one.
_OFFERED: Mapping[str, Any] = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Some families are encoders unless they are told.
    "is_decoder": True,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim",), _WIDTH),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers",), _LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), _HEADS),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), _HEADS),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim"), _DIM),
    # Not as wide as a value, as it need not be.
    "qk_nope_head_dim": 4,
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim"), _FEED_FORWARD),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim"), _FEED_FORWARD),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), _LENGTH),
    # Not 1, which would hide that a family scales what it adds.
    "residual_multiplier": 0.5,
    "sliding_window": 3,
    "rotary_dim": 4,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "moe_num_experts": 4,
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head"), 8),
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _DIM),
}
_HYBRID = ("linear_attention", "full_attention", "linear_attention")
#: Gemma 3's two halves, each with a config of its own.
_GEMMA3_TEXT: Mapping[str, Any] = {
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": _WIDTH,
    "intermediate_size": _FEED_FORWARD,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "head_dim": _DIM,
    "query_pre_attn_scalar": _DIM,
    "max_position_embeddings": _LENGTH,
    "sliding_window": 3,
    "sliding_window_pattern": 2,
}
_GEMMA3_VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
#: Settings that a family needs besides; None takes an offer back.
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    # In as many groups as it has by default, with more than one head in each.
    "codegen": {"n_head": 8, "rotary_dim": 2},
    "falcon": {"head_dim": None},
    "gemma2": {"query_pre_attn_scalar": _DIM},
    "gemma3_text": {"query_pre_attn_scalar": _DIM, "sliding_window_pattern": 2},
    "gemma3": {
        "text_config": _GEMMA3_TEXT,
        "vision_config": _GEMMA3_VISION,
        "mm_tokens_per_image": 4,
        **dict.fromkeys(("image_token_index", "boi_token_index", "eoi_token_index"), 63),
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 3},
    "qwen3_5_moe_text": {"layer_types": _HYBRID},
    "qwen3_5_text": {"layer_types": _HYBRID},
    "qwen3_next": {"layer_types": _HYBRID},
}
#: Wide enough that a patch moves the logits far more than float32 rounds them.
_STD = 0.3
#: More parameters are no tiny model: the settings above are not those of the family.
_MOST_PARAMETERS = 3_000_000


def causal_model_types() -> tuple[str, ...]:
    """The `model_type` of every causal language model of the installed transformers."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def tiny_model(model_type: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random causal language model of a family, float32, in evaluation mode.

    Args:
        model_type: a `config.model_type` of transformers' causal language models.
        seed: of the weights.
        config: overrides settings; by default 3 layers, width 32, 4 query and 2 key/value heads,
            64 tokens, 4 experts, and a sliding window of 3 tokens, where the family has them.

    Raises:
        UnknownNameError: transformers has no such causal language model.
        AdapterError: with these settings the family gives no tiny model.

    Examples:
        >>> tiny_model("mistral").config.sliding_window
        3
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        types = causal_model_types()
        word = model_type if isinstance(model_type, str) else ""
        like = get_close_matches(word, types) or ("llama", "gpt2")
        raise UnknownNameError(
            f"unknown family {model_type!r}: transformers {transformers.__version__} has "
            f"{len(types)} types of causal language models, such as {', '.join(like)}"
        )
    # What transformers says of a config that is not a real one is of no use to anybody.
    with warnings.catch_warnings(action="ignore"):
        which = "these settings" if config else "generic settings"
        model = _build(model_type, {**_settings(model_type), **config}, which)
    model.train(False)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(
                parameter.shape, generator=random, dtype=torch.float32, device="cpu"
            )
            parameter.copy_(drawn * _STD)
    return model


def _build(model_type: str, settings: Mapping[str, Any], which: str) -> PreTrainedModel:
    try:
        check_config(settings)
        # Without memory first: a setting of another name may leave a model of billions.
        with torch.device("meta"), bounded():
            built = _from_config(AutoConfig.for_model(model_type, **settings))
    except AdapterError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise _unfit(
            f"no tiny model of type {model_type!r} can be built with {which}: {reason}"
        ) from error
    size = sum(tensor.numel() for tensor in (*built.parameters(), *built.buffers()))
    if size > _MOST_PARAMETERS:
        raise _unfit(
            f"a model of type {model_type!r} has {size} parameters and buffers with {which}, and a "
            f"tiny one at most {_MOST_PARAMETERS}"
        )
    # A fresh config: building a model may change it.
    return _from_config(AutoConfig.for_model(model_type, **settings))


def _unfit(reason: str) -> AdapterError:
    error = AdapterError(reason)
    # Apart, since it does not fit the command line, which has advice of its own.
    error.add_note("tiny_model(model_type, key=value) sets what its config has under other names")
    return error


def _from_config(config: Any) -> PreTrainedModel:
    # Its weights are drawn anew; nobody's random numbers are to depend on that.
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    return model


def _settings(model_type: str) -> dict[str, Any]:
    """Choose what the family's config knows of what is offered, each thing under one name."""
    kind = CONFIG_MAPPING[model_type]
    names = set(getattr(kind, "attribute_map", {}))
    for base in kind.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        names |= set(inspect.signature(base).parameters)
    settings = {name: value for name, value in _OFFERED.items() if name in names}
    for alias, name in getattr(kind, "attribute_map", {}).items():
        if alias != name and name in settings:
            settings.pop(alias, None)
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        # Latent attention gives each query head a key and a value of its own.
        settings["num_key_value_heads"] = _HEADS
    settings |= _FAMILIES.get(model_type, {})
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value is not None
    }


def tiny_tokenizer(texts: Iterable[str], **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of `texts`, with the space before it.

    Args:
        texts: where the words come from; a word that is not there is unknown.
        special: passed on to the tokenizer, such as `chat_template=`.

    Examples:
        >>> tokenizer = tiny_tokenizer(["The capital of France"])
        >>> tokenizer.convert_ids_to_tokens(tokenizer(" France").input_ids)
        [' France']
    """
    splitter = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(text)]
    names = dict.fromkeys(["<pad>", "<bos>", "<eos>", "<unk>", *words])
    vocabulary = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        **special,
    )
