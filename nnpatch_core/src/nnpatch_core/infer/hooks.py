"""Inferring as a plugin of our own: what `api=None` falls back on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from nnpatch_core._wrappers import missing_weight
from nnpatch_core.adapters import ModelAPI, described
from nnpatch_core.errors import AdapterError
from nnpatch_core.infer.adapter import checked, read_model
from nnpatch_core.plugins import hookimpl


@hookimpl
def infer_model_api(model: nn.Module, lacks: Callable[[str, str], None]) -> ModelAPI:
    """Read an adapter off the model and put it through the conformance kit.

    Raises:
        AdapterError: the model has no weights, or nothing like layers, or a check fails.
    """
    if missing_weight(model) is not None:
        raise AdapterError(
            f"{described(model)} has no weights, so that it cannot be run: load it with them (in "
            "nnsight by dispatch=True)"
        )
    read = read_model(model)
    adapter = checked(read.adapter, model)
    for name, reason in read.missing.items():
        lacks(name, reason)
    return adapter
