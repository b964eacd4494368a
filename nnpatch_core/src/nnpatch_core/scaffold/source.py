"""Writes the Python source that makes an adapter, in as few lines as its table allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from nnpatch_core.adapters import (
    Component,
    DecoderAPI,
    Fused,
    Interleaved,
    PartOfHead,
    Table,
    decoder_components,
    fused_projections,
    separate_projections,
)
from nnpatch_core.errors import AdapterError

_HEADS = ("q", "k", "v", "o")
_OPTIONAL = ("layers", "query_heads", "key_value_heads", "kinds", "residual", "padding", "cone")
_INDENT = " " * 4
_WIDTH = 88


@attrs.frozen
class _Call:
    """A call to be written: each argument is `"name="`, or nothing, and a value."""

    function: str
    arguments: tuple[tuple[str, _Call | str], ...]


def adapter_source(adapter: DecoderAPI, variable: str) -> tuple[str, set[str]]:
    """`variable = DecoderAPI(...)`, and the names of nnpatch_core that it needs.

    Raises:
        AdapterError: there is a function in it, which has no source here.

    Examples:
        >>> from nnpatch_core import DecoderAPI, decoder_components
        >>> source, names = adapter_source(DecoderAPI("A", ("a",), decoder_components()), "A")
        >>> print(source)
        A = DecoderAPI(
            name="A",
            model_types=("a",),
            components=decoder_components(),
        )
        >>> sorted(names)
        ['DecoderAPI', 'decoder_components']
    """
    names = {"DecoderAPI"}
    types = [_text(name) for name in adapter.model_types]
    arguments = {
        "name": _text(adapter.name),
        "model_types": f"({', '.join(types)}{',' * (len(types) == 1)})",
        "components": _table(adapter.components, names, 1, "components="),
    }
    default = DecoderAPI(adapter.name, adapter.model_types, adapter.components)
    for name in _OPTIONAL:
        value = getattr(adapter, name)
        if callable(value):
            raise AdapterError(f"{name} of {adapter.name!r} is a function: it has no source here")
        if value != getattr(default, name):
            arguments[name] = _kinds(value, names) if name == "kinds" else _literal(value)
    lines = [f"{_INDENT}{name}={value}," for name, value in arguments.items()]
    return "\n".join([f"{variable} = DecoderAPI(", *lines, ")"]), names


def call_source(function: str, value: Any, settings: Mapping[str, Any], before: str) -> str:
    """A call with one value and some keywords, all of them JSON, on an indented line.

    Examples:
        >>> call_source("tiny_model", "llama", {"hidden_act": "relu"}, "return ")
        'tiny_model("llama", hidden_act="relu")'
    """
    keywords = [(f"{name}=", _literal(setting)) for name, setting in settings.items()]
    return _written(_Call(function, (("", _literal(value)), *keywords)), 1, before)


def _literal(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        items = (f"{_text(name)}: {_literal(item)}" for name, item in value.items())
        return f"{{{', '.join(items)}}}"
    return repr(value)


def _kinds(kinds: Mapping[str, Table], names: set[str]) -> str:
    inner = _INDENT * 2
    keys = {path: f"{_text(path)}: " for path in kinds}
    lines = [
        f"{inner}{keys[path]}{_table(table, names, 2, keys[path])},"
        for path, table in kinds.items()
    ]
    return "\n".join(["{", *lines, f"{_INDENT}}}"])


def _table(table: Table, names: set[str], depth: int, before: str) -> str:
    """Write a table by the function that makes it, or one component after the other."""
    call = _common(table, names)
    return _by_component(table, names, depth) if call is None else _written(call, depth, before)


def _common(table: Table, names: set[str]) -> _Call | None:
    """Write `decoder_components(...)`, if it makes just this table."""
    if not {"attn", "mlp"} <= set(table):
        return None
    attn, mlp = table["attn"].module, table["mlp"].module
    for heads, source, needed in _projections(table):
        if list(decoder_components(attn=attn, mlp=mlp, heads=heads).items()) != list(table.items()):
            continue
        arguments: list[tuple[str, _Call | str]] = []
        if attn != "self_attn":
            arguments.append(("attn=", _text(attn)))
        if mlp != "mlp":
            arguments.append(("mlp=", _text(mlp)))
        if source is not None:
            arguments.append(("heads=", source))
        names |= {"decoder_components", *needed}
        return _Call("decoder_components", tuple(arguments))
    return None


def _projections(table: Table) -> list[tuple[Table, _Call | str | None, tuple[str, ...]]]:
    """List the usual tables of heads, each with its source and the names that this needs."""
    candidates: list[tuple[Table, _Call | str | None, tuple[str, ...]]] = [
        (separate_projections(), None, ()),
        ({}, "{}", ()),
    ]
    if not set(_HEADS) <= set(table):
        return candidates
    parents = {table[name].module.rpartition(".")[0] for name in _HEADS}
    if len(parents) == 1:
        parent = parents.pop()
        own = {name: table[name].module.rpartition(".")[2] for name in _HEADS}
        named = [(f"{name}=", _text(own[name])) for name in _HEADS if own[name] != f"{name}_proj"]
        before = [] if parent == "self_attn" else [("", _text(parent))]
        source = _Call("separate_projections", (*before, *named))
        candidates.append((separate_projections(parent, **own), source, ("separate_projections",)))
    for layout in (Fused, Interleaved):
        qkv, o = table["q"].module, table["o"].module
        arguments = (("", _text(qkv)), ("", _text(o)), ("", layout.__name__))
        source = _Call("fused_projections", arguments)
        heads = fused_projections(qkv, o, layout)
        candidates.append((heads, source, ("fused_projections", layout.__name__)))
    return candidates


def _by_component(table: Table, names: set[str], depth: int) -> str:
    if not table:
        return "{}"
    names.add("Component")
    inner = _INDENT * (depth + 1)
    lines = []
    for name, component in table.items():
        key = f"{_text(name)}: "
        lines.append(f"{inner}{key}{_written(_component(name, component, names), depth + 1, key)},")
    return "\n".join(["{", *lines, f"{_INDENT * depth}}}"])


def _component(name: str, component: Component, names: set[str]) -> _Call:
    arguments: list[tuple[str, _Call | str]] = [("", _text(component.module))]
    if component.side == "input":
        arguments.append(("", _text(component.side)))
    if component.heads is not None:
        arguments.append(("heads=", _text(component.heads)))
    if component.item:
        arguments.append(("item=", str(component.item)))
    if component.columns is not None:
        if not isinstance(component.columns, Fused | Interleaved | PartOfHead):
            raise AdapterError(f"columns of {name!r} is a function: it has no source here")
        names.add(type(component.columns).__name__)
        arguments.append(("columns=", repr(component.columns).replace("'", '"')))
    return _Call("Component", tuple(arguments))


def _written(value: _Call | str, depth: int, before: str) -> str:
    """Write a call on one line, if it fits behind `before`; else with an argument a line."""
    line = _line(value)
    fits = len(_INDENT) * depth + len(before) + len(line) + len(",") <= _WIDTH
    if isinstance(value, str) or fits or not value.arguments:
        return line
    inner = _INDENT * (depth + 1)
    lines = [f"{inner}{name}{_written(item, depth + 1, name)}," for name, item in value.arguments]
    return "\n".join([f"{value.function}(", *lines, f"{_INDENT * depth})"])


def _line(value: _Call | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value.function}({', '.join(name + _line(item) for name, item in value.arguments)})"


def _text(value: str) -> str:
    # Python spells a text that begins with a double quote between single ones.
    inside = repr(f'"{value}')[2:-1]
    return '"' + inside.replace('"', '\\"').replace("\\'", "'") + '"'
