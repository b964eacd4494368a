"""nnpatch plugin: the adapters for Gemma, Gemma 2 and the text models of Gemma 3."""

from collections.abc import Callable

from nnpatch_core import DecoderAPI, decoder_components, hookimpl

__all__ = ["Gemma", "Gemma2", "Gemma3"]

#: Gemma 2 and 3 add the outputs of the norms *after* their blocks to the residual stream.
_POST_NORMS = decoder_components(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

#: Gemma, laid out like Llama: its `post_attention_layernorm` stands before the MLP.
Gemma = DecoderAPI("Gemma", ("gemma",), decoder_components())
#: Gemma 2.
Gemma2 = DecoderAPI("Gemma2", ("gemma2",), _POST_NORMS)
#: Gemma 3, text alone.
Gemma3 = DecoderAPI("Gemma3", ("gemma3_text",), _POST_NORMS)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `Gemma`, `Gemma2` and `Gemma3`."""
    for adapter in (Gemma, Gemma2, Gemma3):
        register(adapter)
