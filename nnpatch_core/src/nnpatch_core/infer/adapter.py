"""Reads an adapter off a model that no plugin knows, and puts it through the checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._models import in_one_thread, module_of, with_weights
from nnpatch_core._wrappers import missing_weight
from nnpatch_core.adapters import Component, DecoderAPI, ModelAPI, Residual, described, table_of
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.conformance import Result, random_prompts, run_checks
from nnpatch_core.errors import AdapterError
from nnpatch_core.infer.blocks import Blocks, find_blocks
from nnpatch_core.infer.counts import KEY_VALUE_HEADS, QUERY_HEADS, attribute_with, first_count
from nnpatch_core.infer.heads import HeadComponents, find_heads, no_heads
from nnpatch_core.infer.kinds import separate, signature
from nnpatch_core.infer.probe import Calls, LayerProbe, capture
from nnpatch_core.plugins import hookimpl
from nnpatch_core.tracing import forward_hooks, in_words


@attrs.frozen
class Inference:
    """An adapter, read off a model.

    Args:
        adapter: the adapter, not yet put through any check.
        missing: for each component that it lacks, in every layer or in some, why; and for a
            number of heads that no attribute of the config has.
    """

    adapter: DecoderAPI
    missing: Mapping[str, str]


@attrs.frozen
class _Layer:
    """The components of one layer, read off it."""

    components: dict[str, Component]
    residual: Residual | None
    key_value: int | None
    missing: dict[str, str]


@in_one_thread
def infer_adapter(nnmodel: Any, name: str | None = None) -> DecoderAPI:
    """Read an adapter off a model that no plugin knows, by its modules and what they do.

    The model is run on random tokens; each component is told by its effects, not by its name.
    Then the adapter is put through the checks of `nnpatch_core.testing`, on the first, the middle
    and the last layer of each kind. What could not be told is left out of the table.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        name: the adapter's name; by default the model's type in camel case.

    Raises:
        AdapterError: the model has nothing like layers, or a check fails; it says which.

    Examples:
        >>> from nnpatch_core.testing import tiny_model
        >>> adapter = infer_adapter(tiny_model("gpt2"))
        >>> adapter.layers, adapter.components["k"].columns
        ('transformer.h', Fused(part='k'))
    """
    return _checked(read_model(nnmodel, name).adapter, nnmodel)


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
    adapter = _checked(read.adapter, model)
    for name, reason in read.missing.items():
        lacks(name, reason)
    return adapter


def _checked(adapter: DecoderAPI, nnmodel: Any) -> DecoderAPI:
    """Put an inferred adapter through the checks, and declare what its model cannot do.

    Raises:
        AdapterError: a check fails; it says which.
    """
    adapter, results = put_to_test(adapter, nnmodel)
    failed = [f"{result.check}: {result.reason}" for result in results if not result.ok]
    if failed:
        model = module_of(nnmodel)
        raise AdapterError(
            f"the adapter inferred for {described(model)} fails {len(failed)} of {len(results)} "
            f"checks: {'; '.join(failed)}. {_advice(model)}"
        )
    return adapter


def _advice(model: nn.Module) -> str:
    """Say how to get an adapter for a model that fails its checks."""
    if hooks := forward_hooks(model):
        return (
            f"The model has {in_words(hooks)}, which the checks see: infer the adapter without it, "
            "and pass it as api="
        )
    dtypes = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
    if next(dtypes, None) in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cpu"):
        return (
            "In a type of few digits, rounding may look like an effect: infer the adapter from "
            "the model in float32, and pass it as api="
        )
    return (
        "If it is a causal language model that gives the same numbers twice, write its DecoderAPI "
        "by hand"
    )


#: The declarations of an adapter that a check can refute.
_DECLARED = {"padding": "check_padding", "cone": "check_cone_equals_full"}


@in_one_thread
def put_to_test(adapter: DecoderAPI, nnmodel: Any) -> tuple[DecoderAPI, list[Result]]:
    """Run the checks on an inferred adapter, and declare what its model cannot do."""
    layers = _sample(adapter, module_of(nnmodel))
    results = run_checks(adapter, nnmodel, layers=layers)
    for tag, check in _DECLARED.items():
        if not all(result.ok for result in results if result.check == check):
            declared: dict[str, Any] = {tag: False}
            adapter = attrs.evolve(adapter, **declared)
            results = run_checks(adapter, nnmodel, layers=layers)
    return adapter, results


@in_one_thread
def read_model(nnmodel: Any, name: str | None = None) -> Inference:
    """Read an adapter off a model, without any check of it.

    Raises:
        AdapterError: the model has nothing like layers.
    """
    model = module_of(nnmodel)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise AdapterError(f"{described(model)} has no config with a model_type")
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    model = with_weights(nnmodel)
    prompts = random_prompts(model)[0]
    try:
        lists = capture(model, prompts)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise AdapterError(f"{described(model)} does not run on plain tokens: {reason}") from error
    if not lists:
        raise AdapterError(
            f"{described(model)} has no list of modules that run one after the other, each on "
            "what the one before it gave"
        )
    path = max(lists, key=lambda path: (len(lists[path]), -path.count(".")))
    probes = lists[path]
    signatures = [signature(probe.layer) for probe in probes]
    read_layers: dict[Any, _Layer] = {}
    for number, (kind, probe) in enumerate(zip(signatures, probes, strict=True)):
        if kind not in read_layers:
            read_layers[kind] = _read_layer(probe, config, number)
    layers = _consistent([read_layers[kind] for kind in signatures])
    modules = [probe.layer for probe in probes]
    components, kinds, dropped = separate([layer.components for layer in layers], modules)
    residuals = {layer.residual for layer in layers if _is_whole(layer)}
    whole = (
        all(map(_is_whole, layers)) and len(residuals) == 1 and not {"attn", "mlp"} & set(dropped)
    )
    query = [first_count(config, QUERY_HEADS, number) for number in range(len(layers))]
    key_value = [layer.key_value for layer in layers]
    adapter = DecoderAPI(
        name=name or "".join(part.capitalize() for part in model_type.replace("-", "_").split("_")),
        model_types=(model_type,),
        components=components,
        layers=path,
        query_heads=attribute_with(config, QUERY_HEADS, query, "num_attention_heads"),
        # A config without this attribute has as many as query heads.
        key_value_heads="num_key_value_heads"
        if key_value == query and not hasattr(config, "num_key_value_heads")
        else attribute_with(
            config, (*KEY_VALUE_HEADS, *QUERY_HEADS), key_value, "num_key_value_heads"
        ),
        kinds=kinds,
        residual=residuals.pop() if whole else None,
    )
    missing = _missing(layers, dropped)
    if isinstance(adapter.key_value_heads, int):
        missing["key_value_heads"] = (
            f"no attribute of the config is {adapter.key_value_heads}, so that the number itself "
            "stands in the table: true of this model, but maybe not of its family"
        )
    return Inference(adapter, missing)


def _read_layer(probe: LayerProbe, config: Any, number: int) -> _Layer:
    calls = probe.run()
    blocks = find_blocks(probe)
    missing = {
        name: f"no module gives what the layer adds to the residual stream as {name}"
        for name in ("attn", "mlp")
        if name not in blocks.components
    }
    if blocks.mixer is not None:
        missing["attn"] = f"{blocks.mixer}, which mixes tokens, is not called attention"
    heads = _read_heads(probe, calls, blocks, config, number)
    components = blocks.components | heads.components

    def time(name: str) -> int:
        call = calls[components[name].module]
        return call.begun if components[name].side == "input" else call.ended

    ordered = {
        "resid_pre": Component("", "input"),
        **{name: components[name] for name in sorted(components, key=time)},
        "resid": Component("", item=calls[""].item),
    }
    return _Layer(ordered, blocks.residual, heads.key_value, missing | heads.missing)


def _read_heads(
    probe: LayerProbe, calls: Calls, blocks: Blocks, config: Any, number: int
) -> HeadComponents:
    if blocks.mixer is not None:
        return no_heads(f"{blocks.mixer} is not called attention")
    query = first_count(config, QUERY_HEADS, number)
    if query is None:
        return no_heads(f"the config has none of {', '.join(QUERY_HEADS)}")
    key_value = first_count(config, KEY_VALUE_HEADS, number) or query
    key_value = key_value if query % key_value == 0 else query
    attention = blocks.components.get("attn")
    until = None if attention is None else calls[attention.module].ended
    heads = find_heads(probe, query, key_value, config, until)
    if attention is None and not {"q", "k", "v"} <= set(heads.components):
        # A gated convolution has something like a value, but is no attention.
        return no_heads("the layer has no attention that could be told")
    return heads


def _is_whole(layer: _Layer) -> bool:
    return {"attn", "mlp"} <= set(layer.components)


def _consistent(layers: Sequence[_Layer]) -> list[_Layer]:
    """Drop keys and values where layers have one projection with different numbers of heads."""
    counts: dict[Component, set[int | None]] = {}
    for layer in layers:
        for component in layer.components.values():
            if component.heads == "key_value":
                counts.setdefault(component, set()).add(layer.key_value)
    if all(len(numbers) == 1 for numbers in counts.values()):
        return list(layers)
    return [_without_key_value(layer) for layer in layers]


def _without_key_value(layer: _Layer) -> _Layer:
    kept = {
        name: component
        for name, component in layer.components.items()
        if component.heads != "key_value"
    }
    reason = "the number of key/value heads differs from layer to layer"
    lost = dict.fromkeys(set(layer.components) - set(kept), reason)
    return attrs.evolve(layer, components=kept, missing={**layer.missing, **lost})


def _missing(layers: Sequence[_Layer], dropped: Mapping[str, str]) -> dict[str, str]:
    """Say why components are missing, by name."""
    missing: dict[str, str] = {}
    for name in COMPONENT_NAMES:
        lacking = [number for number, layer in enumerate(layers) if name not in layer.components]
        if name in dropped:
            missing[name] = dropped[name]
        elif lacking:
            reasons = dict.fromkeys(layers[number].missing.get(name, "") for number in lacking)
            where = "" if len(lacking) == len(layers) else f"layers {lacking}: "
            missing[name] = where + "; ".join(reason for reason in reasons if reason)
    return missing


def _sample(adapter: DecoderAPI, model: nn.Module) -> list[int]:
    """Choose the first, the middle and the last layer of each kind."""
    of_kind: dict[int, list[int]] = {}
    for layer in range(len(model.get_submodule(adapter.layers))):  # type: ignore[arg-type]
        of_kind.setdefault(id(table_of(adapter, model, layer)), []).append(layer)
    return sorted(
        {layers[place] for layers in of_kind.values() for place in (0, len(layers) // 2, -1)}
    )
