"""Layers of different kinds: which tables there are, and by which module a layer is told."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

from torch import nn

from nnpatch_core.adapters import Component

Rows = Mapping[str, Component]


def signature(layer: nn.Module) -> Hashable:
    """What layers of one kind have in common: their modules, and the shapes of their weights."""
    return frozenset(
        (path, type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
        for path, module in layer.named_modules()
    )


def separate(
    tables: Sequence[Rows], layers: Sequence[nn.Module]
) -> tuple[Rows, dict[str, Rows], dict[str, str]]:
    """One table for most layers, and by a module that only they have, the tables of the others.

    Where layers cannot be told apart, only the rows that they share are kept.

    Returns:
        The table of most layers; path to table of the others; component to why it was dropped.
    """
    distinct: list[Rows] = []
    for table in tables:
        if not any(map(partial(_alike, table), distinct)):
            distinct.append(table)
    distinct.sort(key=lambda table: -sum(map(partial(_alike, table), tables)))
    marks = {place: _mark(table, tables, layers) for place, table in enumerate(distinct)}
    unmarked = [place for place, mark in marks.items() if mark is None]
    if len(unmarked) > 1:
        shared = {
            name: row
            for name, row in distinct[0].items()
            if all(table.get(name) == row for table in distinct)
        }
        names = {name for table in distinct for name in table} - set(shared)
        reason = "it is elsewhere in some layers, which no module tells apart"
        return shared, {}, dict.fromkeys(names, reason)
    default = unmarked[0] if unmarked else 0
    kinds = {
        mark: distinct[place]
        for place, mark in marks.items()
        if place != default and mark is not None
    }
    return distinct[default], kinds, {}


def _alike(one: Rows, other: Rows) -> bool:
    """Equal, and in the same order."""
    return list(one.items()) == list(other.items())


def _mark(table: Rows, tables: Sequence[Rows], layers: Sequence[nn.Module]) -> str | None:
    """The path of a module that all layers with this table have, and no other layer."""
    own = [
        _paths(layer) for other, layer in zip(tables, layers, strict=True) if _alike(other, table)
    ]
    rest = [
        _paths(layer)
        for other, layer in zip(tables, layers, strict=True)
        if not _alike(other, table)
    ]
    paths = set.intersection(*own).difference(*rest)
    return min(paths, key=lambda path: (path.count("."), path), default=None)


def _paths(layer: nn.Module) -> set[str]:
    return {path for path, _ in layer.named_modules() if path}
