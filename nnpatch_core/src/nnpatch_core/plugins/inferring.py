"""Has an adapter read off a model whose type no plugin claims, and says so."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import attrs
from torch import nn

from nnpatch_core._tiny import tiny_model
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import ModelAPI, component_names, heads_of, n_layers, table_of
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.errors import AdapterError, PatchingError, PluginWarning
from nnpatch_core.plugins.known import how_to_get
from nnpatch_core.plugins.manager import Failure, Plugin, Registry

#: Characters of one reason; some name every module of a layer.
_LONGEST = 160


@attrs.frozen(eq=False)
class Inferred:
    """An adapter that was read off a model.

    Args:
        adapter: it has passed its checks.
        missing: component that it does without, to the reason.
        plugin: who has read it.
        unclaimed: why no plugin claims the type, in words.
    """

    adapter: ModelAPI
    missing: Mapping[str, str]
    plugin: Plugin
    unclaimed: str


def infer_unclaimed(model: nn.Module, registry: Registry, instead: str) -> Inferred:
    """Have an adapter read off a model: by the first plugin that can, ours last.

    Args:
        model: the Hugging Face model.
        registry: the plugins.
        instead: how to give an adapter where this is called, for an error.

    Raises:
        AdapterError: nobody can, or what was read fails its checks; it says which.
    """
    unclaimed = why_unclaimed(model, registry)
    for reader in registry.inferring:
        missing: dict[str, str] = {}
        try:
            adapter = reader.value(model=model, lacks=missing.__setitem__)
            if adapter is not None and not isinstance(adapter, ModelAPI):
                raise TypeError(f"an adapter must be a ModelAPI, got {adapter!r}")
        except PatchingError as error:
            reason = f"{unclaimed}; and none can be inferred: {error}; {instead}"
            raise AdapterError(reason) from error
        except Exception as error:
            warn(str(Failure(reader.plugin, f"hook {reader.name}", error)), PluginWarning)
            continue
        if adapter is not None:
            return Inferred(adapter, missing, reader.plugin, unclaimed)
    raise AdapterError(f"{unclaimed}; and no plugin infers one; {instead}")


def why_unclaimed(model: nn.Module, registry: Registry) -> str:
    """Say that no plugin claims the model's type, which one would, and which failed."""
    model_type = getattr(model.config, "model_type", None)
    offer = how_to_get(str(model_type), registry)
    failures = "".join(f"; {failure}" for failure in registry.failures)
    return f"no plugin claims model_type {model_type!r}{f' ({offer})' if offer else ''}{failures}"


def warning_of(inferred: Inferred, model: nn.Module) -> str:
    """Say what was inferred, what was not and why, and how to keep it."""
    adapter = inferred.adapter
    last = n_layers(adapter, model) - 1
    declared = [f"{tag}=False" for tag in ("padding", "cone") if not getattr(adapter, tag, True)]
    sentences = [
        f"{inferred.unclaimed}: adapter {adapter.name!r} was inferred from the model, and passes "
        f"its checks. It has layers 0 to {last} at {adapter.layers} with "
        f"{', '.join(_with_heads(adapter, model))}",
        *([f"It declares {' and '.join(declared)}"] if declared else []),
        *(f"Not read off: {line}" for line in not_read_off(inferred)),
        f"This runs the model many times in each call. To keep it, {_how_to_keep(model)}",
    ]
    return ". ".join(sentences)


def not_read_off(inferred: Inferred) -> list[str]:
    """Say `q, k: why` for the components that an inferred adapter does without."""
    lacking = [name for name in COMPONENT_NAMES if name not in component_names(inferred.adapter)]
    reasons: dict[str, list[str]] = {}
    for name in dict.fromkeys([*lacking, *inferred.missing]):
        reasons.setdefault(inferred.missing.get(name, "no reason is given"), []).append(name)
    return [
        f"{', '.join(names)}: {shorten(reason, _LONGEST, placeholder=' ...')}"
        for reason, names in reasons.items()
    ]


def package_command(model_type: Any) -> str | None:
    """The command that writes a package for a type; None where there is no tiny model of it."""
    try:
        tiny_model(model_type)
    except Exception:
        return None
    return f"nnpatch new-adapter {model_type.replace('_', '-')} --model-type {model_type}"


def _how_to_keep(model: nn.Module) -> str:
    command = package_command(getattr(model.config, "model_type", None))
    package = "" if command is None else f", or write a package with it: {command}"
    return f"call infer_adapter(model) once and pass what it gives as api={package}"


def _with_heads(adapter: ModelAPI, model: nn.Module) -> list[str]:
    """Name each component, with the numbers of heads that it has in the layers."""
    counts: dict[str, set[int]] = {name: set() for name in component_names(adapter)}
    for layer in range(n_layers(adapter, model)):
        for name, component in table_of(adapter, model, layer).items():
            if component.heads is not None:
                counts[name].add(heads_of(adapter, model, layer).count(component.heads))
    return [name + _counted(numbers) for name, numbers in counts.items()]


def _counted(numbers: set[int]) -> str:
    counts = " or ".join(map(str, sorted(numbers)))
    return f" ({counts} head{'' if numbers == {1} else 's'})" if numbers else ""
