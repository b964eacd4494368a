"""Finds spans in prompts: from texts and letters to tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import named, shown
from nnpatch_core.errors import PositionError
from nnpatch_core.prompts.encoding import Encoded, Encoder
from nnpatch_core.prompts.rows import PROMPTS, Table, UnusableError
from nnpatch_core.prompts.subsets import is_missing
from nnpatch_core.seq_pos import LAST, NONE

#: The tokens of a span in one prompt: its first, and the one behind its last.
Ends: TypeAlias = tuple[int, int]
LACKING: Ends = (NONE, NONE)


@attrs.frozen
class Text:
    """A span by its text; `which` chooses among several, from 0, or from -1 backwards."""

    text: str
    which: int | None = None


@attrs.frozen
class Letters:
    """A span by its first letter and the one behind its last."""

    start: int
    stop: int


Part: TypeAlias = Text | Letters | None
#: For each row, and each name, the span in the source prompt and in the target prompt.
RowParts: TypeAlias = Mapping[str, tuple[Part, Part]]


@attrs.frozen
class Found:
    """A span that was found.

    Args:
        ends: its tokens.
        cut: the texts of tokens that it covers in part.
    """

    ends: Ends
    cut: tuple[str, ...] = ()


def read_part(value: Any) -> tuple[Part, Part]:
    """Read what a user gives for one pair: a part for both prompts, or one for each.

    A part is a text, `(text, which)` where it stands several times, `(start, stop)` letters, or
    None where there is none.

    Raises:
        UnusableError: it is nothing of that.
    """
    both = _part(value)
    if both is not NotImplemented:
        return both, both
    items = None if isinstance(value, str | bytes | Mapping) else listed(value)
    if items is not None and len(items) == len(PROMPTS):
        parts = tuple(_part(item) for item in items)
        if NotImplemented not in parts:
            return parts[0], parts[1]
    raise UnusableError(
        PositionError,
        f"a span must be a text, (text, which), (start, stop), or two of these, got {shown(value)}",
    )


def _part(value: Any) -> Any:
    """One part; NotImplemented if it is none."""
    if value is None or (isinstance(value, float) and is_missing(value)):
        return None
    if isinstance(value, str):
        return Text(value) if value.strip() else None
    items = None if isinstance(value, bytes | Mapping) else listed(value)
    if items is None or len(items) != 2 or not _is_int(items[1]):
        return NotImplemented
    if isinstance(items[0], str):
        return Text(items[0], int(items[1]))
    return Letters(int(items[0]), int(items[1])) if _is_int(items[0]) else NotImplemented


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def find_span(encoder: Encoder, prompt: Encoded, part: Part) -> Found:
    """Find a span's tokens in a prompt; a token that it covers in part belongs to it.

    Raises:
        UnusableError: it does not stand there, or several times; the tokenizer tells no letters.
    """
    if part is None:
        return Found(LACKING)
    start, stop = _letters(prompt, part)
    # The space in front of a word belongs to its token, and to no span.
    while start < stop and prompt.text[start].isspace():
        start += 1
    while start < stop and prompt.text[stop - 1].isspace():
        stop -= 1
    if start == stop:
        raise UnusableError(PositionError, "the span is empty")
    covered = [
        (number, low, high)
        for number, (low, high) in enumerate(_offsets(encoder, prompt))
        if low < stop and high > start
    ]
    if not covered:
        raise UnusableError(
            PositionError, f"{prompt.text[start:stop]!r} has no tokens in {shown(prompt.text)}"
        )
    cut = tuple(
        prompt.text[low:high]
        for _, low, high in covered
        if prompt.text[low:start].strip() or prompt.text[stop:high].strip()
    )
    first = len(prompt.opening)
    return Found((first + covered[0][0], first + covered[-1][0] + 1), cut)


def _letters(prompt: Encoded, part: Text | Letters) -> tuple[int, int]:
    """Find the letters of a span in the text as the tokenizer saw it."""
    begin, end = (0, len(prompt.text)) if prompt.own is None else prompt.own
    if isinstance(part, Letters):
        if prompt.own is None:
            raise UnusableError(
                PositionError,
                "letters are counted in a text, and the prompt is of messages, or the chat "
                "template writes it otherwise",
                "give the span's text in place of its letters",
            )
        size = end - begin
        if not 0 <= part.start < part.stop <= size:
            raise UnusableError(
                PositionError,
                f"letters {part.start} to {part.stop} are not in a prompt of {size} letters",
            )
        return begin + part.start, begin + part.stop
    places = []
    at = prompt.text.find(part.text, begin, end)
    while at >= 0:
        places.append(at)
        at = prompt.text.find(part.text, at + 1, end)
    told = f"{part.text!r} stands {len(places)} times in {shown(prompt.text[begin:end])}"
    if not places:
        raise UnusableError(
            PositionError, f"{part.text!r} does not stand in {shown(prompt.text[begin:end])}"
        )
    if part.which is None and len(places) > 1:
        raise UnusableError(
            PositionError,
            told,
            "choose one of several places, as (text, 0) for the first and (text, -1) for the last",
        )
    which = part.which or 0
    if not -len(places) <= which < len(places):
        raise UnusableError(PositionError, f"{told}, and place {which} was chosen")
    return places[which], places[which] + len(part.text)


def _offsets(encoder: Encoder, prompt: Encoded) -> Sequence[tuple[int, int]]:
    """The letters of each token of the text."""
    try:
        read = encoder.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = tuple(read["input_ids"]), read["offset_mapping"]
    # Each kind of tokenizer refuses in its own way.
    except Exception as error:
        raise UnusableError(
            PositionError,
            f"the tokenizer does not tell which letters a token stands for: {error}",
            "spans need a fast tokenizer, such as AutoTokenizer gives",
        ) from error
    if ids != prompt.ids:
        raise UnusableError(PositionError, "the tokenizer cuts the prompt otherwise with offsets")
    return [(int(low), int(high)) for low, high in offsets]


def with_spans(table: Table, spans: Any) -> Table:
    """A table whose rows have the spans that the user gives.

    Of lists they are `{name: a value for each pair}`, or one text for all; of a table
    `{name: column}`, `(column, which)`, or two of these for source and target.

    Raises:
        PositionError: they are something else, or name a column that is not there.
    """
    if spans is None:
        return table
    given = checked_names(spans)
    places: dict[str, tuple[str, str]] = {}
    if table.kind == "pair":
        rows = _of_lists(given, len(table.rows))
    else:
        rows, places = _of_columns(given, table)
    pairs = zip(table.rows, rows, strict=True)
    return attrs.evolve(
        table, rows=tuple(attrs.evolve(row, spans=its) for row, its in pairs), spans=places
    )


def _of_lists(spans: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    columns: dict[str, Sequence[Any]] = {}
    for name, values in spans.items():
        if isinstance(values, str) or isinstance(_part(values), Text):
            columns[name] = (values,) * count
            continue
        cells = None if isinstance(values, bytes | Mapping) else listed(values)
        if cells is None or len(cells) != count:
            got = shown(values) if cells is None else str(len(cells))
            raise PositionError(
                f"span {name!r} must be one text for all pairs, or a list with one value for each "
                f"of {count} pairs, got {got}"
            )
        columns[name] = cells
    return [{name: cells[number] for name, cells in columns.items()} for number in range(count)]


def _of_columns(
    spans: Mapping[str, Any], table: Table
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """The values of each row, and for each name the user's columns."""
    specs: dict[str, tuple[tuple[Any, int | None], ...]] = {}
    lacking: list[str] = []
    for name, spec in spans.items():
        one = _column(spec)
        items = () if isinstance(spec, str | bytes | Mapping) else listed(spec) or ()
        columns = (one,) if one is not None else tuple(map(_column, items))
        if not columns or len(columns) > len(PROMPTS) or None in columns:
            raise PositionError(
                f"span {name!r} must be the name of a column, (column, which), or a pair of "
                f"these for source and target, got {shown(spec)}"
            )
        specs[name] = tuple(each for each in columns if each is not None)
        for column, _ in specs[name]:
            if column not in table.others:
                lacking.append(f"span {name!r} is to stand in column {shown(column)}")
    if lacking:
        there = ", ".join(map(named, table.others)) or "none"
        told = "\n".join(dict.fromkeys(lacking))
        raise PositionError(f"{told}; further columns of the table are: {there}")
    rows = []
    for row in table.rows:
        values: dict[str, Any] = {}
        for name, columns in specs.items():
            cells = [_chosen(row.others.get(column), which) for column, which in columns]
            values[name] = cells[0] if len(cells) == 1 else cells
        rows.append(values)
    places = {name: (str(columns[0][0]), str(columns[-1][0])) for name, columns in specs.items()}
    return rows, places


def _column(spec: Any) -> tuple[Any, int | None] | None:
    if isinstance(spec, str):
        return spec, None
    items = None if isinstance(spec, bytes | Mapping) else listed(spec)
    if items is None or len(items) != 2 or not isinstance(items[0], str) or not _is_int(items[1]):
        return None
    return items[0], int(items[1])


def _chosen(cell: Any, which: int | None) -> Any:
    return (cell, which) if which is not None and isinstance(cell, str) and cell.strip() else cell


def checked_names(spans: Any) -> dict[str, Any]:
    """Read the names of spans.

    Raises:
        PositionError: they are no names.
    """
    if not isinstance(spans, Mapping):
        raise PositionError(f"spans must be a mapping from names, got {shown(spans)}")
    for name in spans:
        if not isinstance(name, str) or not name or name == LAST:
            raise PositionError(
                f"a span is named by a text, and not {LAST!r}, which is each prompt's last token: "
                f"got {shown(name)}"
            )
    return dict(spans)
