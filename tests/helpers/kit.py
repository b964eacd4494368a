"""Adapters and models for the conformance kit, right ones, and what makes them wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
from torch import Tensor, nn

from nnpatch_core import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.adapters import PartOfHead, consecutive
from nnpatch_core.testing import tiny_model
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3

GPT2 = DecoderAPI(
    "GPT2",
    ("gpt2",),
    decoder_components(attn="attn", heads=fused_projections("attn.c_attn", "attn.c_proj", Fused)),
    "transformer.h",
)
NEOX = DecoderAPI(
    "NeoX",
    ("gpt_neox",),
    decoder_components(
        attn="attention",
        heads=fused_projections("attention.query_key_value", "attention.dense", Interleaved),
    ),
    "gpt_neox.layers",
)
MIXTRAL = DecoderAPI("Mixtral", ("mixtral",), decoder_components())
GRANITE = DecoderAPI("Granite", ("granite",), decoder_components(), residual="scaled")
#: A norm follows each sum, so that there is no sum to check.
BERT = DecoderAPI(
    "Bert",
    ("bert",),
    decoder_components(
        attn="attention.output.dense",
        mlp="output.dense",
        heads=separate_projections(
            "attention", q="self.query", k="self.key", v="self.value", o="output.dense"
        ),
    ),
    "bert.encoder.layer",
    residual=None,
)
GATED = separate_projections()
GATED["q"] = attrs.evolve(GATED["q"], columns=PartOfHead(0, parts=2))
#: Attention with a gate in one layer, and none in the others.
QWEN3_NEXT = DecoderAPI(
    "Qwen3Next",
    ("qwen3_next",),
    decoder_components(attn="linear_attn", heads={}),
    kinds={"self_attn": decoder_components(heads=GATED)},
    cone=False,
)


@functools.cache
def shared(family: str, **settings: Any) -> Any:
    """A model of two layers that nobody changes."""
    return tiny_model(family, **{"num_hidden_layers": 2, **settings})


def model_of(family: str, **settings: Any) -> Callable[[], Any]:
    return functools.partial(shared, family, **settings)


LLAMA = model_of("llama")
#: As many key/value heads as query heads, so that the three projections have one shape.
UNGROUPED = model_of("llama", num_key_value_heads=4)
#: The MLP is as wide inside as the residual stream.
SQUARE = model_of("llama", intermediate_size=32)
GEMMA2 = model_of("gemma2")
HALVED = model_of("granite", residual_multiplier=0.5)

RIGHT: dict[str, tuple[DecoderAPI, Callable[[], Any]]] = {
    "llama": (Llama3, LLAMA),
    "llama, ungrouped": (Llama3, UNGROUPED),
    "gemma2": (Gemma2, GEMMA2),
    "gemma2, o wider than the residual stream": (Gemma2, model_of("gemma2", hidden_size=20)),
    "gpt2": (GPT2, model_of("gpt2")),
    "gpt_neox": (NEOX, model_of("gpt_neox")),
    "mixtral": (MIXTRAL, model_of("mixtral")),
    "granite": (GRANITE, HALVED),
    "bert": (BERT, model_of("bert")),
    "qwen3_next": (QWEN3_NEXT, functools.partial(tiny_model, "qwen3_next")),
}


def failures(results: list[Any]) -> dict[str, str]:
    return {result.check: result.reason for result in results if result.status == "failed"}


def changed(api: DecoderAPI, **rows: Component) -> DecoderAPI:
    """The adapter with other rows, at the same places of its table."""
    return attrs.evolve(api, components={**api.components, **rows})


def arranged(api: DecoderAPI, names: str, **rows: Component) -> DecoderAPI:
    """The adapter with these components in this order, some of them with other rows."""
    table = {**api.components, **rows}
    return attrs.evolve(api, components={name: table[name] for name in names.split()})


class Wrapped(nn.Module):
    """A module with another one inside, which does something to what that gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = self.inner(*args, **kwargs)
        if isinstance(found, tuple):
            return (self.after(found[0]), *found[1:])
        return self.after(found)

    def after(self, found: Tensor) -> Tensor:
        return found


def fresh(edit: Callable[[Any], object], family: str = "llama", **settings: Any) -> Callable:
    """Makes a model of its own, with something wrong about it."""

    def make() -> Any:
        model = tiny_model(family, **{"num_hidden_layers": 2, **settings})
        edit(model)
        return model

    return make


def in_each_layer(path: str, wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for layer in model.model.layers:
            layer.set_submodule(path, wrap(layer.get_submodule(path)))

    return edit


def table(*names: str, **rows: Component) -> DecoderAPI:
    """A part of Llama's table, with other rows."""
    return DecoderAPI("Part", ("llama",), {name: Llama3.components[name] for name in names} | rows)


def columns(api: DecoderAPI, name: str, edit: Callable[[Tensor], Tensor]) -> DecoderAPI:
    """The adapter with a component's columns `[heads, dim]` edited."""
    row = api.components[name]

    def layout(width: int, heads: Any) -> Tensor:
        return edit(consecutive(width, heads.count(row.heads)))

    return changed(api, **{name: attrs.evolve(row, columns=layout)})


def heads(api: DecoderAPI, name: str, *order: int) -> DecoderAPI:
    """The adapter with the heads of a component in another order."""
    return columns(api, name, lambda found: found[list(order)])


def last_layer(**rows: Component) -> DecoderAPI:
    """Right in all layers but the last, which has a mark."""
    return attrs.evolve(Llama3, kinds={"mark": {**Llama3.components, **rows}})


@attrs.frozen(eq=False)
class OwnCounts:
    """Wrong about the heads of one layer, and no `DecoderAPI`."""

    name = "OwnCounts"
    model_types = ("llama",)
    layers = "model.layers"
    components = Llama3.components

    def n_heads(self, config: Any, kind: str, layer: int) -> int:
        return 4 if kind == "query" or layer == 1 else 2


def mark_last(model: Any) -> None:
    model.model.layers[-1].mark = nn.Identity()


def scaled(api: DecoderAPI) -> DecoderAPI:
    return attrs.evolve(api, residual="scaled")
