"""nnpatch plugin: the adapter for Mistral, with and without sliding window."""

from collections.abc import Callable

from nnpatch_core import DecoderAPI, decoder_components, hookimpl

__all__ = ["Mistral"]

#: Mistral, with and without sliding window.
Mistral = DecoderAPI(
    name="Mistral",
    model_types=("mistral",),
    components=decoder_components(),
)


@hookimpl
def register_model_apis(register: Callable[[DecoderAPI], None]) -> None:
    """Register `Mistral`."""
    register(Mistral)
