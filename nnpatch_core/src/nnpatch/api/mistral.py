"""The adapter for Mistral."""

from nnpatch.api._plugins import plugin

with plugin("nnpatch-mistral"):
    from nnpatch_mistral import Mistral

__all__ = ["Mistral"]
