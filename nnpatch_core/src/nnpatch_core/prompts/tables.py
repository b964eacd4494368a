"""Reads tables of prompts off lists, a DataFrame or a CSV file, into rows that know their place."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from nnpatch_core._arguments import listed
from nnpatch_core._printable import named, shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning, TokensError
from nnpatch_core.prompts.rows import COLUMNS, Fault, Row, Table, place

_WIDE = (b"\xff\xfe", b"\xfe\xff")
_AS_UTF8 = "save the file as UTF-8"
#: Separators of fields that other programs write in place of a comma.
_SEPARATORS = (";", "\t", "|")


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


def from_frame(frame: Any, renamed: Mapping[str, str] | None) -> Table:
    """Take the rows off a DataFrame; the labels of its index name them.

    Raises:
        TokensError: it is none, or a column is missing or stands twice.
    """
    if not hasattr(frame, "columns") or not hasattr(frame, "index"):
        hint = "; from_csv reads a file" if isinstance(frame, str | os.PathLike) else ""
        raise TokensError(f"frame must be a pandas DataFrame, got {type(frame).__name__}{hint}")
    names = _names(renamed, list(frame.columns))
    others = _others(names, list(frame.columns))
    columns = [frame[name].tolist() for name in (*names, *others)]
    rows = zip(frame.index.tolist(), zip(*columns, strict=True), strict=True)
    # A label that stands twice finds no row.
    unique = getattr(frame.index, "is_unique", True)
    return Table(
        "row",
        names,
        tuple(
            Row(
                label,
                _read(values[:4]),
                position=None if unique else at,
                others=dict(zip(others, values[4:], strict=True)),
            )
            for at, (label, values) in enumerate(rows)
        ),
        others,
    )


def from_file(path: Any, renamed: Mapping[str, str] | None) -> Table:
    """Take the rows off a CSV file; the lines that they begin in name them; the header is line 1.

    Raises:
        TokensError: it cannot be read as one, or a column is missing or stands twice.
    """
    text = _text(path)
    _check_separator(text, str(path))
    lines = _lines(text, str(path))
    _, header = next(lines, (1, []))
    try:
        names = _names(renamed, header)
    except TokensError as error:
        empty = "" if header else "the file is empty, "
        coded = "" if all(map(_is_utf8, header)) else f"; it is not UTF-8: {_AS_UTF8}"
        raise TokensError(f"{path}, line 1: {empty}{error}{coded}") from None
    places = [header.index(name) for name in names]
    others = {header.index(name): _escaped(name) for name in _others(names, header)}
    rows = tuple(_row(number, cells, header, places, others) for number, cells in lines)
    return Table("line", names, rows, tuple(others.values()))


def _row(
    number: int, cells: list[str], header: list[str], places: list[int], others: Mapping[int, str]
) -> Row:
    faults = []

    def fault(column: str, message: str, advice: str = "") -> None:
        faults.append(Fault(place("line", str(number), column), message, TokensError, advice))

    values = [cells[at] if at < len(cells) else None for at in places]
    fields = f"the line has {len(cells)} fields, and the header {len(header)}"
    if len(cells) > len(header):
        fault(str(len(header) + 1), f"{fields}: a text with a comma stands in quotes")
    for at, value in zip(places, values, strict=True):
        if value is None:
            fault(header[at], f"is missing: {fields}")
        elif not _is_utf8(value):
            fault(header[at], f"is not UTF-8: {shown(_readable(value))}", _AS_UTF8)
    further = {
        name: _escaped(cells[at]) if at < len(cells) else None for at, name in others.items()
    }
    return Row(number, _read(values), tuple(faults), others=further)


def _others(names: Sequence[Any], present: Sequence[Any]) -> tuple[Any, ...]:
    """Find the further columns, those apart that have no name of their own.

    Warns:
        PromptWarning: columns have one name, so that nobody can ask for them.
    """
    others = [name for name in present if name not in names]
    twice = list(dict.fromkeys(name for name in others if others.count(name) > 1))
    # Spreadsheets write columns without name or content behind the table.
    told = [shown(name) for name in twice if name != ""]
    if told:
        warn(f"columns of one name are left out: {', '.join(told)}", PromptWarning)
    return tuple(name for name in others if name not in twice)


def _read(values: Sequence[Any]) -> tuple[Any, ...]:
    """Read JSON of messages among a row's values, since a cell holds no list."""
    return (*map(_messages_or_text, values[:2]), *values[2:])


def _messages_or_text(value: Any) -> Any:
    if not isinstance(value, str) or not re.match(r"\s*\[\s*\{", value):
        return value
    try:
        messages = json.loads(value)
    # Deeply nested brackets are no messages either.
    except (ValueError, RecursionError):
        return value
    valid = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message
        for message in messages
    )
    return messages if valid else value


def _text(path: Any) -> str:
    """Read the file's text; bytes that are no UTF-8 are kept for `_is_utf8` to find."""
    try:
        with open(os.fspath(path), "rb") as file:
            content = file.read()
    except TypeError as error:
        hint = "; from_dataframe takes a DataFrame" if hasattr(path, "columns") else ""
        raise TokensError(f"path must be a path, got {type(path).__name__}{hint}") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise TokensError(f"{path} cannot be read: {why}") from error
    if content.startswith(_WIDE):
        raise TokensError(f"{path}, line 1: it is UTF-16; save it as UTF-8")
    return content.decode("utf-8-sig", errors="surrogateescape")


def _check_separator(text: str, path: str) -> None:
    """Raise `TokensError` for a file whose fields are not separated by commas, or which says so."""
    first = next((line for line in re.split(r"[\r\n]+", text) if line.strip()), "")
    # Some programs write such a line for Excel, in front of the header.
    declared = re.fullmatch(r'"?sep=(.)"?[,;\s]*', first)
    if declared and declared[1] == ",":
        raise TokensError(f"{path}, line 1: it is {shown(first)} and no header; take this line out")
    separator = next((letter for letter in _SEPARATORS if letter in first), None)
    if declared:
        separator = declared[1]
    elif separator is None or "," in first:
        return
    skipped = ", skiprows=1" if declared else ""
    read = f"pandas.read_csv(path, sep={separator!r}{skipped}, dtype=str)"
    raise TokensError(
        f"{path}, line 1: the fields are separated by {separator!r}: save the file with commas, or "
        f"use PromptPairs.from_dataframe({read}, tokenizer)"
    )


def _lines(text: str, path: str) -> Iterator[tuple[int, list[str]]]:
    """Give the rows that are not empty, each with the line that it begins in."""
    # Strict: a quote that nobody closed would swallow the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin = reader.line_num + 1
    except csv.Error as error:
        raise TokensError(
            f"{path}: the row that begins in line {begin} is no CSV: {error}"
        ) from error


def _is_utf8(text: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


def _readable(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogateescape")


def _escaped(text: str) -> str:
    r"""The text, with bytes that are no UTF-8 as `\xe9`."""
    return text if _is_utf8(text) else _readable(text).decode("utf-8", errors="backslashreplace")


def _names(renamed: Any, present: list[Any]) -> tuple[Any, ...]:
    """Find the user's names of the columns."""
    if renamed is not None and not isinstance(renamed, Mapping):
        raise TokensError(
            f"columns must be a mapping, such as {{'source': 'clean'}}: {shown(renamed)}"
        )
    renamed = dict(renamed or {})
    unknown = sorted(set(renamed) - set(COLUMNS), key=repr)
    if unknown:
        raise TokensError(
            f"columns= renames {shown(unknown[0])}; it may rename {', '.join(COLUMNS)}"
            f"{_other_way(unknown, renamed)}"
        )
    names = tuple(renamed.get(name, name) for name in COLUMNS)
    missing = [name for name in names if name not in present]
    if missing:
        there = ", ".join(map(named, present)) or "none"
        raise TokensError(
            f"no column {shown(missing[0])}; there are {there}"
            f"{_did_you_mean(names, present, renamed)}"
        )
    for at, name in enumerate(names):
        if name in names[:at]:
            both = f"{COLUMNS[names.index(name)]} and {COLUMNS[at]}"
            raise TokensError(f"columns= reads {both} from one column, {shown(name)}")
        times = present.count(name)
        if times > 1:
            raise TokensError(f"column {shown(name)} stands {times} times in the table")
    return names


def _other_way(unknown: Sequence[Any], renamed: Mapping[Any, Any]) -> str:
    """Advise on a renaming that is misspelled, or the wrong way round."""
    like = get_close_matches(str(unknown[0]), COLUMNS, n=1)
    if like:
        return f"; did you mean {like[0]!r}?"
    if not all(renamed[name] in COLUMNS for name in unknown):
        return ""
    turned = {
        own if name in unknown else name: name if name in unknown else own
        for name, own in renamed.items()
    }
    return f"; it is the wrong way round: columns={shown(turned)}"


def _did_you_mean(names: Sequence[Any], present: Sequence[Any], renamed: Mapping[str, Any]) -> str:
    """Name the renaming that would find the missing columns, where names are much the same."""
    free = [own for own in present if isinstance(own, str) and own not in names]
    meant: dict[str, Any] = {}
    for column, name in zip(COLUMNS, names, strict=True):
        if name in present:
            continue
        plain = {own.strip().casefold(): own for own in reversed(free)}
        wanted = str(name).strip().casefold()
        for like in get_close_matches(wanted, plain, n=1, cutoff=0.8):
            meant[column] = plain[like]
            free.remove(plain[like])
    return f"; did you mean columns={shown({**renamed, **meant})}?" if meant else ""
