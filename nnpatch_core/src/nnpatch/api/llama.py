"""The adapter for Llama 2, 3 and 3.x."""

from nnpatch.api._plugins import plugin

with plugin("nnpatch-llama"):
    from nnpatch_llama import Llama3

__all__ = ["Llama3"]
