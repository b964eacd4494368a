"""Makes tables of prompts of lists, data frames and rows, so that each row knows its place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import named, shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning, TokensError
from nnpatch_core.prompts.cells import Bad, escaped, flat, read_answer_cell, read_prompt
from nnpatch_core.prompts.layouts import find_layout
from nnpatch_core.prompts.names import ColumnsError
from nnpatch_core.prompts.rows import COLUMNS, Fault, Row, Table, place

#: How the cells of `COLUMNS` are read.
_READ = (read_prompt, read_prompt, read_answer_cell, read_answer_cell)
_MISSING = Bad("is missing")


@attrs.frozen
class RawRow:
    """A row before anybody knows which columns matter.

    Args:
        label: the user's name of it.
        cells: its values, by column.
        faults: what was wrong with it as a whole.
        position: as for `Row`.
    """

    label: Any
    cells: dict[Any, Any]
    faults: tuple[Fault, ...] = ()
    position: int | None = None


@attrs.frozen
class Raw:
    """A table before anybody knows which columns matter.

    Args:
        kind: as for `Table`.
        rows: the rows.
        columns: its columns, where the table itself names them, one that stands twice too.
        where: what an error about columns begins with, such as the file's name.
        note: what it ends with.
    """

    kind: str
    rows: Sequence[RawRow]
    columns: tuple[Any, ...] = ()
    where: str = ""
    note: str = ""


def from_lists(columns: Sequence[Any], extra: Any = None) -> Table:
    """Take the rows off four lists, in the order of `COLUMNS`, and further ones by name.

    Raises:
        TokensError: they are no lists, or not equally long; further ones have no other names.
    """
    if extra is not None and not isinstance(extra, Mapping):
        raise TokensError(f"extra must be a mapping, such as {{'template': [...]}}: {shown(extra)}")
    further = dict(extra or {})
    for name in COLUMNS:
        if name in further:
            raise TokensError(f"extra names {name!r}, which is an argument of its own")
    lists = []
    for name, column in [*zip(COLUMNS, columns, strict=True), *further.items()]:
        cells = None if isinstance(column, str | bytes | Mapping) else listed(column)
        if cells is None:
            kind = "a list of texts" if name in COLUMNS else "a list, with one value for each pair"
            raise TokensError(f"{named(name)} must be {kind}, got {shown(column)}")
        lists.append(cells)
    if len({len(column) for column in lists}) > 1:
        names = [*COLUMNS, *map(named, further)]
        sizes = ", ".join(f"{name} {len(its)}" for name, its in zip(names, lists, strict=True))
        raise TokensError(f"the lists of texts must be equally long, got {sizes}")
    rows = [
        Row(number, cells[:4], others=dict(zip(further, cells[4:], strict=True)))
        for number, cells in enumerate(zip(*lists, strict=True))
    ]
    return Table("pair", COLUMNS, tuple(rows), tuple(further))


def raw_frame(frame: Any) -> Raw:
    """Take the rows off a DataFrame or an Arrow table; a pandas index names them by its labels.

    Raises:
        TokensError: it is none.
    """
    if type(frame).__name__ == "LazyFrame":
        raise TokensError("frame is a LazyFrame, which has no rows yet: pass frame.collect()")
    if hasattr(frame, "columns") and hasattr(frame, "index"):
        columns = list(frame.columns)
        times = Counter(columns)
        places = [at for at, name in enumerate(columns) if times[name] == 1]
        lists = [frame.iloc[:, at].tolist() for at in places]
        labels = frame.index.tolist()
        # A label that stands twice finds no row.
        unique = getattr(frame.index, "is_unique", True)
        rows = [
            RawRow(
                label,
                {columns[place]: column[at] for place, column in zip(places, lists, strict=True)},
                position=None if unique else at,
            )
            for at, label in enumerate(labels)
        ]
        return Raw("row", rows, tuple(columns))
    if isinstance(getattr(frame, "columns", None), list) and hasattr(frame, "to_dicts"):
        return raw_rows(frame.to_dicts(), tuple(frame.columns))
    if hasattr(frame, "column_names") and hasattr(frame, "to_pylist"):
        return raw_rows(frame.to_pylist(), tuple(frame.column_names))
    hint = "; from_csv reads a file" if isinstance(frame, str | os.PathLike) else ""
    raise TokensError(
        f"frame must be a pandas DataFrame or a polars DataFrame, got {type(frame).__name__}{hint}"
    )


def raw_dataset(dataset: Any) -> Raw:
    """Take the rows off a data set of Hugging Face, numbered from 0.

    Raises:
        TokensError: it is none, or a stream, or several splits.
    """
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset)) or "none"
        raise TokensError(f"dataset must be one split, such as dataset['train']: it has {splits}")
    if not hasattr(dataset, "column_names") or not hasattr(dataset, "features"):
        raise TokensError(
            "dataset must be a datasets.Dataset, such as one split of what datasets.load_dataset "
            f"gives, got {shown(dataset)}"
        )
    if not hasattr(dataset, "__len__"):
        raise TokensError(
            "dataset is a stream, which may have no end: take some of it, as "
            "PromptPairs.from_rows(dataset.take(1000), tokenizer)"
        )
    # Not as tensors, whatever it was set to.
    return raw_rows(dataset.with_format(None), tuple(dataset.column_names))


def raw_rows(rows: Any, columns: tuple[Any, ...] = ()) -> Raw:
    """Take rows that are mappings, numbered from 0.

    Raises:
        TokensError: they are no list of rows.
    """
    items = None if isinstance(rows, str | bytes | Mapping) else listed(rows)
    if items is None:
        raise TokensError(
            "rows must be a list of mappings, such as [{'clean': ..., 'corrupted': ...}], got "
            f"{shown(rows)}"
        )
    return Raw("row", raw_items("row", enumerate(items)), columns)


def raw_items(kind: str, items: Iterable[tuple[Any, Any]]) -> list[RawRow]:
    """Make rows of what should be mappings, each with its label."""
    return [
        RawRow(label, dict(item))
        if isinstance(item, Mapping)
        else RawRow(label, {}, (_whole(kind, label, f"must name its values, got {shown(item)}"),))
        for label, item in items
    ]


def _whole(kind: str, label: Any, message: str) -> Fault:
    return Fault(f"{kind} {label}", message, TokensError)


def to_table(raw: Raw, renamed: Any, layout: str | None, tokenizer: Any) -> Table:
    """Find the four columns of a table, and keep the others.

    Args:
        raw: the table.
        renamed: the user's choice of names.
        layout: how it is laid out; None for one column each.
        tokenizer: as for the layout.

    Raises:
        TokensError: a column is missing or stands twice, or may be one of several.
        UnknownNameError: there is no such layout.
    """
    lay_out = find_layout(layout)
    rows = [_flat(raw.kind, row) for row in raw.rows]
    known = dict.fromkeys(name for row in rows for name in row.cells)
    if raw.columns and not known:
        known = dict.fromkeys(raw.columns)
    # A table's own names first; what was inside of one has its names behind.
    own = Counter(raw.columns)
    present = [name for name in raw.columns if name in known or own[name] > 1]
    present += [name for name in known if name not in own]
    if not present and (rows or raw.kind != "line"):
        nothing = (None,) * len(COLUMNS)
        made = tuple(
            Row(row.label, nothing, row.faults, unread=frozenset(COLUMNS if row.faults else ()))
            for row in rows
        )
        return Table(raw.kind, COLUMNS, made)
    faults: tuple[TokensError, ...] = ()
    lacking: frozenset[str] = frozenset()
    try:
        names, ids, added = lay_out([row.cells for row in rows], present, renamed, tokenizer)
    except ColumnsError as error:
        # The rows are looked at all the same, and all is told at once.
        faults = (TokensError(f"{raw.where}{error}{raw.note}"),)
        lacking = frozenset(COLUMNS) - set(error.names)
        names, ids, added = tuple(error.names.get(each, each) for each in COLUMNS), frozenset(), ()
    except TokensError as error:
        raise TokensError(f"{raw.where}{error}{raw.note}") from None
    present += [name for name in added if name not in present]
    others = {name: escaped(name) for name in _others(names, present, told=not faults)}
    made = tuple(_row(raw.kind, row, names, others, lacking) for row in rows)
    return Table(raw.kind, names, made, tuple(others.values()), ids, faults=faults)


def prompts_of(raw: Raw) -> list[RawRow]:
    """The rows of a table, what is inside of their objects in columns of its own."""
    return [_flat(raw.kind, row) for row in raw.rows]


def _row(
    kind: str,
    raw: RawRow,
    names: Sequence[Any],
    others: Mapping[Any, Any],
    lacking: frozenset[str],
) -> Row:
    row = Row(raw.label, (), position=raw.position)
    faults = list(raw.faults)
    # A row that is faulty as a whole has no columns.
    unread = set(COLUMNS if faults else lacking)
    values: list[Any] = []
    for column, name, read in zip(COLUMNS, names, _READ, strict=True):
        if column in lacking:
            values.append(None)
            continue
        value = raw.cells.get(name, _MISSING)
        if isinstance(value, Bad) and not raw.faults:
            where = place(kind, row.name, name)
            faults.append(Fault(where, value.message, TokensError, value.advice))
            unread.add(column)
        values.append(value.kept if isinstance(value, Bad) else read(value))
    kept = {own: raw.cells.get(name) for name, own in others.items()}
    return attrs.evolve(
        row,
        values=tuple(values),
        faults=tuple(faults),
        others={own: it.kept if isinstance(it, Bad) else it for own, it in kept.items()},
        unread=frozenset(unread),
    )


def _others(names: Sequence[Any], present: Sequence[Any], *, told: bool) -> tuple[Any, ...]:
    """Find the further columns, those apart that have no name of their own; `told` warns of these.

    Warns:
        PromptWarning: columns have one name, so that nobody can ask for them.
    """
    others = [name for name in present if name not in names]
    twice = [name for name, times in Counter(others).items() if times > 1]
    # Spreadsheets write columns without name or content behind the table.
    left = [shown(name) for name in twice if name != ""]
    if left and told:
        warn(f"columns of one name are left out: {', '.join(left)}", PromptWarning)
    return tuple(name for name in others if name not in twice)


def _flat(kind: str, row: RawRow) -> RawRow:
    try:
        return attrs.evolve(row, cells=flat(row.cells))
    except ValueError as error:
        return attrs.evolve(row, cells={}, faults=(_whole(kind, row.label, str(error)),))
