"""The adapter for Gemma 2."""

from nnpatch.api._plugins import plugin

with plugin("nnpatch-gemma"):
    from nnpatch_gemma import Gemma2

__all__ = ["Gemma2"]
