"""nnpatch plugin: the adapter for Llama 2, 3 and 3.x, and what shares their layout."""

from collections.abc import Callable

from nnpatch_core import DecoderAPI, decoder_components, hookimpl

__all__ = ["Llama3"]

#: Llama 2, 3 and 3.x, SmolLM2 and others of `model_type` llama.
Llama3 = DecoderAPI(
    name="Llama3",
    model_types=("llama",),
    components=decoder_components(),
)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `Llama3`."""
    register(Llama3)
