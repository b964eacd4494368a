"""An adapter for tiny models, from no plugin."""

from __future__ import annotations

from nnpatch_core.adapters import DecoderAPI, decoder_components


def tiny_api() -> DecoderAPI:
    """An adapter for `tiny_model("llama")` and its like, from no plugin."""
    return DecoderAPI("TinyLlama", ("llama", "mistral"), decoder_components())
