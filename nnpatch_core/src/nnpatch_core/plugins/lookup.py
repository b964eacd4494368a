"""Finds adapters, metrics and position strategies: by name, or an adapter by its model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.errors import AdapterError, AdapterWarning, UnknownNameError
from nnpatch_core.metrics import BUILTIN_METRICS, Metric, with_context
from nnpatch_core.plugins.inferring import infer_unclaimed, warning_of
from nnpatch_core.plugins.manager import Registered, Registry, load_plugins
from nnpatch_core.seq_pos import BUILTIN_SEQ_POS, PlacedSeqPos, SeqPos

T = TypeVar("T")


def find_metric(name: str) -> Metric:
    """The metric of that name: a built-in one, or a plugin's.

    Raises:
        UnknownNameError: nobody registers it, or two plugins do.
    """
    if name in BUILTIN_METRICS:
        return BUILTIN_METRICS[name]
    return with_context(_find("metric", name, BUILTIN_METRICS, load_plugins().metrics))


def find_seq_pos(name: str) -> Callable[..., SeqPos | PlacedSeqPos]:
    """The position strategy of that name: a built-in one, or a plugin's.

    Raises:
        UnknownNameError: nobody registers it, or two plugins do.
    """
    if name in BUILTIN_SEQ_POS:
        return BUILTIN_SEQ_POS[name]
    return _find("position strategy", name, BUILTIN_SEQ_POS, load_plugins().seq_pos)


def find_adapter(api: Any, model: nn.Module | None = None) -> ModelAPI:
    """The adapter that `api=` means.

    Args:
        api: an adapter, instance or class; its registered name; or None, for the one that a
            plugin registers for the model's type. Where none does, one is inferred from the model,
            which runs it many times, and an `AdapterWarning` says what was found.
        model: the Hugging Face model; needed where `api` is None.

    Raises:
        AdapterError: `api` is no adapter; several are registered for the model; or none is, and
            none can be inferred, or what was inferred fails a check.
        UnknownNameError: no adapter of that name, or two.
    """
    if api is None:
        return _adapter_for(model)
    if isinstance(api, str):
        return _find("adapter", api, (), load_plugins().adapters)
    try:
        instance = api() if isinstance(api, type) else api
    except TypeError as error:
        raise AdapterError(
            f"adapter class {api!r} takes no arguments, or it fails: {error}"
        ) from error
    if not isinstance(instance, ModelAPI):
        raise AdapterError(
            f"api must be an adapter, the name of one or None, got {shown(api)}; an adapter has "
            "name, model_types, layers, components and n_heads"
        )
    return instance


def _adapter_for(model: nn.Module | None) -> ModelAPI:
    if model is None:
        raise AdapterError(
            "api=None finds an adapter by a model, and there is none here: pass an adapter, such "
            "as that of infer_adapter(model), or the name of one"
        )
    registry = load_plugins()
    adapter = claimed(model, registry, "choose one with api=")
    if adapter is not None:
        return adapter
    inferred = infer_unclaimed(model, registry, "pass an adapter as api=")
    warn(warning_of(inferred, model), AdapterWarning)
    return inferred.adapter


def claimed(model: nn.Module, registry: Registry, choice: str) -> ModelAPI | None:
    """The adapter that a plugin registers for the model's type; None if none does.

    Args:
        model: the Hugging Face model.
        registry: the plugins.
        choice: how to choose one of several where this is called, for an error.

    Raises:
        AdapterError: several do, or the model has no type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise AdapterError(
            f"api=None finds an adapter by config.model_type, which {type(model).__name__} does "
            "not have: name an adapter, or pass one"
        )
    claims = [claim for claim in registry.adapters if model_type in claim.value.model_types]
    if len(claims) > 1:
        rivals = " and ".join(f"{claim.name!r} of {claim.plugin}" for claim in claims)
        raise AdapterError(
            f"{len(claims)} adapters claim model_type {model_type!r}: {rivals}; {choice}"
        )
    return claims[0].value if claims else None


def _find(kind: str, name: str, builtin: Iterable[str], registered: Iterable[Registered[T]]) -> T:
    entries = list(registered)
    matches = [entry for entry in entries if entry.name == name]
    if len(matches) == 1:
        return matches[0].value
    if matches:
        rivals = " and ".join(str(entry.plugin) for entry in matches)
        raise UnknownNameError(f"{kind} {name!r} is registered by {rivals}; pass the object itself")
    names = sorted({*builtin, *(entry.name for entry in entries)})
    raise UnknownNameError(
        f"unknown {kind} {name!r}{did_you_mean(name, names)}; "
        f"there are {', '.join(names) or 'none'}"
    )
