"""Tiny random models of the families at hand, made in milliseconds without any download."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nnpatch_core.errors import UnknownNameError
from nnpatch_core.model_api import DecoderAPI, decoder_components

#: Grouped-query heads, and where the family has one a sliding window of 3 tokens.
_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "gemma": {},
    "gemma2": {"sliding_window": 3, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 3, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
}
#: Wide enough that a patch moves the logits far more than float32 rounds them.
_STD = 0.3


def tiny_model(model_type: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random causal language model of a family, float32, in evaluation mode.

    Args:
        model_type: `"llama"`, `"mistral"`, `"gemma"`, `"gemma2"` or `"gemma3_text"`.
        seed: of the weights.
        config: overrides settings; by default 3 layers, width 32, 4 query and 2 key/value heads,
            64 tokens, and a sliding window of 3 tokens where the family has one.

    Raises:
        UnknownNameError: another family.

    Examples:
        >>> tiny_model("mistral").config.sliding_window
        3
    """
    if model_type not in _FAMILIES:
        raise UnknownNameError(
            f"unknown family {model_type!r}; there are {', '.join(sorted(_FAMILIES))}"
        )
    settings = AutoConfig.for_model(model_type, **{**_COMMON, **_FAMILIES[model_type], **config})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call]
    model.train(False)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * _STD)
    return model


def tiny_api() -> DecoderAPI:
    """An adapter for `tiny_model("llama")` and its like, from no plugin."""
    return DecoderAPI("TinyLlama", ("llama", "mistral"), decoder_components())


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
