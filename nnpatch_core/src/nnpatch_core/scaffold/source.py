"""An adapter as the Python source that makes it, in as few lines as its table allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnpatch_core.components import Component
from nnpatch_core.heads import Fused, Interleaved
from nnpatch_core.model_api import (
    DecoderAPI,
    Table,
    decoder_components,
    fused_projections,
    separate_projections,
)

_HEADS = ("q", "k", "v", "o")
_INDENT = " " * 4
_WIDTH = 88


def adapter_source(adapter: DecoderAPI, variable: str) -> tuple[str, set[str]]:
    """`variable = DecoderAPI(...)`, and the names of nnpatch_core that it needs.

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
    arguments: dict[str, Any] = {
        "name": _text(adapter.name),
        "model_types": "(" + "".join(f"{_text(each)}, " for each in adapter.model_types).strip(),
        "components": _table(adapter.components, names, 1),
    }
    arguments["model_types"] += ")"
    if len(adapter.model_types) > 1:
        arguments["model_types"] = arguments["model_types"].replace(",)", ")")
    default = DecoderAPI(adapter.name, adapter.model_types, adapter.components)
    for name in ("layers", "query_heads", "key_value_heads"):
        value = getattr(adapter, name)
        if value != getattr(default, name):
            arguments[name] = _text(value) if isinstance(value, str) else repr(value)
    if adapter.kinds:
        arguments["kinds"] = _kinds(adapter.kinds, names)
    for name in ("residual", "padding"):
        value = getattr(adapter, name)
        if value != getattr(default, name):
            arguments[name] = _text(value) if isinstance(value, str) else repr(value)
    lines = [f"{_INDENT}{name}={value}," for name, value in arguments.items()]
    return "\n".join([f"{variable} = DecoderAPI(", *lines, ")"]), names


def _kinds(kinds: Mapping[str, Table], names: set[str]) -> str:
    inner = _INDENT * 2
    lines = [f"{inner}{_text(path)}: {_table(table, names, 2)}," for path, table in kinds.items()]
    return "\n".join(["{", *lines, f"{_INDENT}}}"])


def _table(table: Table, names: set[str], depth: int) -> str:
    """A table by the functions that make the common ones, or row by row."""
    return _common(table, names, depth) or _rows(table, names, depth)


def _common(table: Table, names: set[str], depth: int) -> str | None:
    """`decoder_components(...)`, if it makes just this table."""
    if not {"attn", "mlp"} <= set(table):
        return None
    attn, mlp = table["attn"].module, table["mlp"].module
    for heads, source, needed in _projections(table):
        if list(decoder_components(attn=attn, mlp=mlp, heads=heads).items()) != list(table.items()):
            continue
        arguments = []
        if attn != "self_attn":
            arguments.append(f"attn={_text(attn)}")
        if mlp != "mlp":
            arguments.append(f"mlp={_text(mlp)}")
        if source is not None:
            arguments.append(f"heads={source}")
        names |= {"decoder_components", *needed}
        return _call("decoder_components", arguments, depth)
    return None


def _projections(table: Table) -> list[tuple[Table, str | None, tuple[str, ...]]]:
    """What may stand for the heads: the rows, their source, and the names that it needs."""
    found: list[tuple[Table, str | None, tuple[str, ...]]] = [
        (separate_projections(), None, ()),
        ({}, "{}", ()),
    ]
    if not set(_HEADS) <= set(table):
        return found
    parents = {table[name].module.rpartition(".")[0] for name in _HEADS}
    if len(parents) == 1:
        parent = parents.pop()
        own = {name: table[name].module.rpartition(".")[2] for name in _HEADS}
        given = [] if parent == "self_attn" else [_text(parent)]
        given += [f"{name}={_text(own[name])}" for name in _HEADS if own[name] != f"{name}_proj"]
        source = f"separate_projections({', '.join(given)})"
        found.append((separate_projections(parent, **own), source, ("separate_projections",)))
    for layout in (Fused, Interleaved):
        qkv, o = table["q"].module, table["o"].module
        source = f"fused_projections({_text(qkv)}, {_text(o)}, {layout.__name__})"
        rows = fused_projections(qkv, o, layout)
        found.append((rows, source, ("fused_projections", layout.__name__)))
    return found


def _rows(table: Table, names: set[str], depth: int) -> str:
    names.add("Component")
    inner = _INDENT * (depth + 1)
    lines = [f"{inner}{_text(name)}: {_row(row, names)}," for name, row in table.items()]
    return "\n".join(["{", *lines, f"{_INDENT * depth}}}"])


def _row(row: Component, names: set[str]) -> str:
    arguments = [_text(row.module)]
    if row.side == "input":
        arguments.append(_text(row.side))
    if row.heads is not None:
        arguments.append(f"heads={_text(row.heads)}")
    if row.item:
        arguments.append(f"item={row.item}")
    if row.columns is not None:
        names.add(type(row.columns).__name__)
        arguments.append("columns=" + repr(row.columns).replace("'", '"'))
    return f"Component({', '.join(arguments)})"


def _call(function: str, arguments: list[str], depth: int) -> str:
    """On one line, if it fits."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) + len(_INDENT) * depth + len("components=,") <= _WIDTH:
        return line
    inner = _INDENT * (depth + 1)
    lines = [f"{inner}{argument}," for argument in arguments]
    return "\n".join([f"{function}(", *lines, f"{_INDENT * depth})"])


def _text(value: str) -> str:
    return f'"{value}"'
