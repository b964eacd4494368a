"""Finds the tables of layers of different kinds, and the module that tells each kind."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial

from torch import nn

from nnpatch_core.adapters import Table


def signature(layer: nn.Module) -> Hashable:
    """Layers of one kind have one signature: their modules, and the shapes of their weights."""
    return frozenset(
        (path, type(module).__name__, *(tuple(p.shape) for p in module.parameters(recurse=False)))
        for path, module in layer.named_modules()
    )


def separate(
    tables: Sequence[Table], layers: Sequence[nn.Module]
) -> tuple[Table, dict[str, Table], dict[str, str]]:
    """Find the table of most layers, and the module that tells which layers have another.

    Where layers cannot be told apart, only the components that they share are kept.

    Returns:
        The table of most layers; path to table of the others; component to why it was dropped.
    """
    distinct: list[Table] = []
    for table in tables:
        if not any(map(partial(_alike, table), distinct)):
            distinct.append(table)
    distinct.sort(key=lambda table: -sum(map(partial(_alike, table), tables)))
    marks = {place: _mark(table, tables, layers) for place, table in enumerate(distinct)}
    unmarked = [place for place, mark in marks.items() if mark is None]
    if len(unmarked) > 1:
        shared = {
            name: component
            for name, component in distinct[0].items()
            if all(table.get(name) == component for table in distinct)
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


def _alike(first: Table, second: Table) -> bool:
    """Whether two tables are equal, and in the same order."""
    return list(first.items()) == list(second.items())


def _mark(table: Table, tables: Sequence[Table], layers: Sequence[nn.Module]) -> str | None:
    """Find the path of a module that all layers with this table have, and no layer besides."""
    own: list[set[str]] = []
    rest: list[set[str]] = []
    for its_table, layer in zip(tables, layers, strict=True):
        paths = {path for path, _ in layer.named_modules() if path}
        (own if _alike(its_table, table) else rest).append(paths)
    marks = set.intersection(*own).difference(*rest)
    return min(marks, key=lambda path: (path.count("."), path), default=None)
