"""nnpatch plugin: the adapters for Gemma, Gemma 2 and Gemma 3, with vision and without."""

from collections.abc import Callable

from nnpatch_core import DecoderAPI, decoder_components, hookimpl

__all__ = ["Gemma", "Gemma2", "Gemma3", "Gemma3Vision"]

#: Gemma 2 and 3 add the outputs of the norms *after* their blocks to the residual stream.
_POST_NORMS = decoder_components(attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

#: Gemma, laid out like Llama: its `post_attention_layernorm` stands before the MLP.
Gemma = DecoderAPI("Gemma", ("gemma",), decoder_components())
#: Gemma 2.
Gemma2 = DecoderAPI("Gemma2", ("gemma2",), _POST_NORMS)
#: Gemma 3, text alone: 270M and 1B.
Gemma3 = DecoderAPI("Gemma3", ("gemma3_text",), _POST_NORMS)
#: Gemma 3 with vision: 4B and up. Its text model has the same layers, at another path.
Gemma3Vision = DecoderAPI(
    "Gemma3Vision", ("gemma3",), _POST_NORMS, layers="model.language_model.layers"
)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `Gemma`, `Gemma2`, `Gemma3` and `Gemma3Vision`."""
    for adapter in (Gemma, Gemma2, Gemma3, Gemma3Vision):
        register(adapter)
