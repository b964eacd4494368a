"""nnpatch plugin: the adapter for GPT-2."""

from collections.abc import Callable

from nnpatch_core import (
    DecoderAPI,
    Fused,
    decoder_components,
    fused_projections,
    hookimpl,
)

__all__ = ["GPT2"]

#: GPT-2 projects to queries, keys and values with one matrix.
GPT2 = DecoderAPI(
    name="GPT2",
    model_types=("gpt2",),
    components=decoder_components(
        attn="attn",
        heads=fused_projections("attn.c_attn", "attn.c_proj", Fused),
    ),
    layers="transformer.h",
)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `GPT2`."""
    register(GPT2)
