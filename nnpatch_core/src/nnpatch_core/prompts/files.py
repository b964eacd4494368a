"""Reads tables off files; each row is named by its line, or by its number."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnpatch_core._extras import extra
from nnpatch_core._printable import shown
from nnpatch_core.errors import TokensError
from nnpatch_core.prompts.cells import Bad, as_bytes, escaped, is_utf8
from nnpatch_core.prompts.rows import Fault, place
from nnpatch_core.prompts.tables import Raw, RawRow, raw_items, raw_rows

_WIDE = (b"\xff\xfe", b"\xfe\xff")
_AS_UTF8 = "save the file as UTF-8"
#: Separators of fields that other programs write in place of a comma.
_SEPARATORS = (";", "\t", "|")


def raw_csv(path: Any) -> Raw:
    """Take the rows off a CSV file; the lines that they begin in name them; the header is line 1.

    Raises:
        TokensError: it cannot be read as one.
    """
    text = _text(path)
    _check_separator(text, str(path))
    lines = _lines(text, str(path))
    _, header = next(lines, (1, []))
    empty = "" if header else "the file is empty, "
    coded = "" if all(map(is_utf8, header)) else f"; it is not UTF-8: {_AS_UTF8}"
    rows = [_csv_row(number, cells, header) for number, cells in lines]
    return Raw("line", rows, tuple(header), f"{path}, line 1: {empty}", coded)


def _csv_row(number: int, cells: list[str], header: list[str]) -> RawRow:
    fields = f"the line has {len(cells)} fields, and the header {len(header)}"
    faults: tuple[Fault, ...] = ()
    if len(cells) > len(header):
        where = place("line", str(number), str(len(header) + 1))
        message = f"{fields}: a text with a comma stands in quotes"
        faults = (Fault(where, message, TokensError),)
    missing = [Bad(f"is missing: {fields}")] * (len(header) - len(cells))
    values = [*map(_checked, cells[: len(header)]), *missing]
    return RawRow(number, dict(zip(header, values, strict=True)), faults)


def _checked(text: str) -> str | Bad:
    if is_utf8(text):
        return text
    return Bad(f"is not UTF-8: {shown(as_bytes(text))}", _AS_UTF8, escaped(text))


def raw_jsonl(path: Any) -> Raw:
    """Take the rows off a file with a JSON object in each line; blank lines are none.

    Raises:
        TokensError: it cannot be read.
    """
    rows = [
        _json_row(number, line)
        for number, line in enumerate(re.split(r"\r\n|\n|\r", _text(path)), start=1)
        if line.strip()
    ]
    return Raw("line", rows, where=f"{path}: ")


def _json_row(number: int, line: str) -> RawRow:
    def faulty(message: str, advice: str = "") -> RawRow:
        return RawRow(number, {}, (Fault(f"line {number}", message, TokensError, advice),))

    if not is_utf8(line):
        return faulty(f"is not UTF-8: {shown(as_bytes(line))}", _AS_UTF8)
    try:
        item = _loaded(line)
    except json.JSONDecodeError as error:
        return faulty(f"is no JSON: {error.msg} (character {error.colno})")
    except (ValueError, RecursionError) as error:
        return faulty(f"is no JSON: {error}")
    return raw_items("line", [(number, item)])[0]


def raw_json(path: Any) -> Raw:
    """Take the rows off a JSON file: a list of objects, numbered from 0, or an object with one.

    Raises:
        TokensError: it cannot be read as one.
    """
    text = _text(path)
    if not is_utf8(text):
        raise TokensError(f"{path} is not UTF-8: {_AS_UTF8}")
    try:
        content = _loaded(text)
    except json.JSONDecodeError as error:
        lines = "" if error.msg != "Extra data" else "; from_jsonl reads an object in each line"
        raise TokensError(
            f"{path}, line {error.lineno}: it is no JSON: {error.msg} (character {error.colno})"
            f"{lines}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise TokensError(f"{path}: it is no JSON: {error}") from None
    items = _items(content, str(path))
    return Raw("item", raw_items("item", enumerate(items)), where=f"{path}: ")


def _items(content: Any, path: str) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = {
        name: value
        for name, value in (content.items() if isinstance(content, dict) else ())
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if len(lists) == 1:
        return next(iter(lists.values()))
    if lists:
        names = " and ".join(map(shown, lists))
        raise TokensError(
            f"{path}: {names} are lists of objects: pass one to PromptPairs.from_rows"
        )
    raise TokensError(
        f"{path} must be a list of objects, or an object with one such list, got {shown(content)}; "
        "pandas writes one with orient='records'"
    )


def _loaded(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object has two values for {shown(name)}")
        found[name] = value
    return found


def raw_parquet(path: Any) -> Raw:
    """Take the rows off a Parquet file, numbered from 0.

    Raises:
        TokensError: pyarrow is not installed, or the file cannot be read.
    """
    parquet = extra("pyarrow.parquet", "parquet", TokensError)
    where = _path(path)
    try:
        table = parquet.read_table(where)
    # pyarrow has errors of its own, of many kinds.
    except Exception as error:
        raise TokensError(f"{path} cannot be read as Parquet: {error}") from error
    return raw_rows(table.to_pylist(), tuple(table.column_names))


#: The reader of a file, by how its name ends.
READERS = {
    ".csv": raw_csv,
    ".jsonl": raw_jsonl,
    ".ndjson": raw_jsonl,
    ".json": raw_json,
    ".parquet": raw_parquet,
}


def raw_file(path: Any) -> Raw:
    """Take the rows off a file of the kind that its name says.

    Raises:
        TokensError: it says none, or the file cannot be read.
    """
    suffix = Path(os.fsdecode(path)).suffix.lower()
    if suffix not in READERS:
        raise TokensError(
            f"{path}: which kind of table it is, its name does not say: it may end with "
            f"{', '.join(READERS)}; PromptPairs.from_csv, from_jsonl, from_json and from_parquet "
            "read files of any name"
        )
    return READERS[suffix](path)


def _path(path: Any) -> Any:
    try:
        return os.fspath(path)
    except TypeError as error:
        hint = "; from_dataframe takes a DataFrame" if hasattr(path, "columns") else ""
        raise TokensError(f"path must be a path, got {type(path).__name__}{hint}") from error


def _text(path: Any) -> str:
    """Read the file's text; bytes that are no UTF-8 are kept for `is_utf8` to find."""
    try:
        with open(_path(path), "rb") as file:
            content = file.read()
    except TokensError:
        raise
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
