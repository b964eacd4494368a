"""Names our own distribution that has an adapter for a type, where it is not installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata

from nnpatch_core.plugins.manager import ENVIRONMENT_VARIABLE, Registry

#: Distribution to the model types that it claims.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "nnpatch-gemma": ("gemma", "gemma2", "gemma3", "gemma3_text"),
    "nnpatch-llama": ("llama",),
    "nnpatch-mistral": ("mistral",),
}


def how_to_get(model_type: str, registry: Registry) -> str:
    """Say how to get our adapter for a type that no loaded plugin claims; "" if there is none."""
    for distribution, types in DISTRIBUTIONS.items():
        if model_type not in types:
            continue
        has_one = f"{distribution} has one"
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            return f"{has_one}: pip install {distribution}"
        loaded = (*registry.plugins, *(failure.plugin for failure in registry.failures))
        if all(plugin.distribution != distribution for plugin in loaded):
            limit = os.environ.get(ENVIRONMENT_VARIABLE)
            return f"{has_one}, which {ENVIRONMENT_VARIABLE}={limit!r} leaves out"
    return ""
