"""Rows of a table of prompts, and their faults, in words by which the user finds them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from nnpatch_core._printable import named
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import PatchingError, TokensError

PROMPTS = ("source", "target")
COLUMNS = (*PROMPTS, "source_answer", "target_answer")
#: A text, or the messages of a chat, each with its `role` and `content`.
Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
#: An answer as a text or a token id, or several that count as one.
Answers: TypeAlias = str | int | Sequence[str | int]
#: Faults that an error or a warning shows, one a line.
_SHOWN = 10


@attrs.frozen
class TextPair:
    """A source and a target prompt, and the answer that each calls for, or its set of answers."""

    source: Prompt
    target: Prompt
    source_answer: Answers
    target_answer: Answers


class UnusableError(Exception):
    """A prompt or an answer that cannot be used.

    Args:
        error: the kind of error it is.
        message: why.
        advice: a way out, if there is one.
    """

    def __init__(self, error: type[PatchingError], message: str, advice: str = "") -> None:
        super().__init__(message)
        self.error, self.message, self.advice = error, message, advice


@attrs.frozen
class Fault:
    """One thing that is wrong with a row; `place` says where."""

    place: str
    message: str
    error: type[PatchingError]
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}"


@attrs.frozen
class Row:
    """A row as it was read.

    Args:
        label: the user's name of it: a number, or the label of an index.
        values: its prompts and answers, in the order of `COLUMNS`.
        faults: what was wrong with it before anybody looked at its values.
        position: which row it is, from 0, where other rows may have its label too.
        others: what it has in further columns, by the user's names.
        spans: the spans of its prompts, by name, as the user gives them.
        unread: those of `COLUMNS` with a fault among `faults`, so that their values are none.
    """

    label: Any
    values: tuple[Any, ...]
    faults: tuple[Fault, ...] = ()
    position: int | None = None
    others: Mapping[Any, Any] = attrs.Factory(dict)
    spans: Mapping[str, Any] = attrs.Factory(dict)
    unread: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The label in words, and the position where the label alone does not find the row."""
        label = str(self.label) if isinstance(self.label, int) else repr(self.label)
        return label if self.position is None else f"{label} (position {self.position})"

    @property
    def pair(self) -> TextPair:
        """The values by their names."""
        return TextPair(*self.values)


@attrs.frozen
class Table:
    """The user's prompts and answers, row by row.

    Args:
        kind: what a row is called: `"pair"`, `"row"`, `"line"` or `"item"`.
        names: the user's names of `COLUMNS`.
        rows: the rows.
        others: the user's names of further columns.
        spans: by the name of a span the user's columns for it, of source and target.
        ids: those of `COLUMNS` whose integers are token ids for certain.
        faults: of the table as a whole, such as columns that are missing.
    """

    kind: str
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    others: tuple[Any, ...] = ()
    ids: frozenset[str] = frozenset()
    spans: Mapping[str, tuple[str, str]] = attrs.Factory(dict)
    faults: tuple[PatchingError, ...] = ()

    def span_place(self, row: Row, name: str, side: str = "source") -> str:
        """Say where the span of a row stands, of the source or the target prompt."""
        if name not in self.spans:
            return f"span {named(name)} of {self.kind} {row.name}"
        column = self.spans[name][PROMPTS.index(side)]
        return f"{place(self.kind, row.name, column)} (span {named(name)})"

    def place(self, row: Row, column: str) -> str:
        """Say where one value of a row stands."""
        return place(self.kind, row.name, self.names[COLUMNS.index(column)])

    def places(self, column: str, rows: Iterable[Row]) -> str:
        """Say where the values of several rows stand, in one column."""
        rows = list(rows)
        labels = [row.label for row in rows]
        where = self.kind if len(labels) == 1 else f"{self.kind}s"
        if rows[0].position is not None:
            where, labels = f"{where} at position", [row.position for row in rows]
        name = named(self.names[COLUMNS.index(column)])
        if self.kind == "pair":
            return f"{name} of {where} {_labels(labels)}"
        return f"{where} {_labels(labels)}, column {name}"


def place(kind: str, name: str, column: str) -> str:
    """Say where one value stands, such as `line 3, column clean`."""
    if kind == "pair":
        return f"{named(column)} of pair {name}"
    return f"{kind} {name}, column {named(column)}"


def joined_places(table: Table, rows: Mapping[str, Sequence[Row]]) -> str:
    """Say where the values of several columns stand, each with rows of its own."""
    return " and ".join(table.places(column, its) for column, its in rows.items() if its)


def _labels(labels: Sequence[Any]) -> str:
    """Labels of rows, such as `0 to 3, 7`."""
    if all(isinstance(label, int) for label in labels):
        return ranges(labels, " to ")
    return ", ".join(map(repr, labels))


def report(faulty: Sequence[Sequence[Fault]]) -> str:
    """List the faults of some rows, one row a line, the first of them where there are many."""
    lines = ["; ".join(map(str, faults)) for faults in faulty]
    more = len(lines) - _SHOWN
    return "\n".join(lines[:_SHOWN] + ([f"and {more} more"] if more > 0 else []))


def error_of_table(table: Table, faulty: Sequence[Sequence[Fault]]) -> PatchingError:
    """Make the error that says what is wrong with a table as a whole, and with its rows."""
    faults = [*table.faults, *([error_of(table, faulty)] if faulty else [])]
    kinds = {type(fault) for fault in faults}
    error = kinds.pop() if len(kinds) == 1 else TokensError
    return error("\n".join(map(str, faults)))


def error_of(table: Table, faulty: Sequence[Sequence[Fault]]) -> PatchingError:
    """Make the error that says what is wrong with some rows, and what can be done about it."""
    way = f"faulty='drop' leaves {'it' if len(faulty) == 1 else 'them'} out"
    return error_of_rows(faulty, len(table.rows), table.kind, way)


def error_of_rows(
    faulty: Sequence[Sequence[Fault]], count: int, kind: str, *ways: str
) -> PatchingError:
    """Make the error that says what is wrong with some of so many rows; `ways` out come last."""
    faults = [fault for its in faulty for fault in its]
    kinds = {fault.error for fault in faults}
    advice = list(dict.fromkeys(fault.advice for fault in faults if fault.advice))
    opening = []
    if len(faulty) > 1:
        opening = [f"{len(faulty)} of {count} {kind}s cannot be used"]
    advice += ways
    error = kinds.pop() if len(kinds) == 1 else TokensError
    return error("\n".join([*opening, report(faulty), *advice]))
