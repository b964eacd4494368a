"""nnpatch plugin: the adapter for Gemma 2."""

from collections.abc import Callable

from nnpatch_core import DecoderAPI, decoder_components, hookimpl

__all__ = ["Gemma2"]

#: Gemma 2 adds the outputs of the norms *after* its blocks to the residual stream.
Gemma2 = DecoderAPI(
    name="Gemma2",
    model_types=("gemma2",),
    components=decoder_components(
        attn="post_attention_layernorm", mlp="post_feedforward_layernorm"
    ),
)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `Gemma2`."""
    register(Gemma2)
