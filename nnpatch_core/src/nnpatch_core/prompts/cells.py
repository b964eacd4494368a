"""Reads the cells of a table: texts, lists, and objects inside of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from nnpatch_core._printable import shown


@attrs.frozen
class Bad:
    """A cell that cannot be read, which matters where it is needed.

    Args:
        message: why.
        advice: a way out, if there is one.
        kept: what stands for it among further columns.
    """

    message: str
    advice: str = ""
    kept: Any = None


def flat(cells: Mapping[Any, Any], before: str = "") -> dict[Any, Any]:
    """Name what is inside of objects by its way there, as `metadata.subject`.

    A row or an object with `choices` and an `answerKey` has their `answer`.

    Raises:
        ValueError: two things have one name.
    """
    found: dict[Any, Any] = {}
    for name, value in _with_answer(cells):
        key = f"{before}{name}" if before else name
        inside: Mapping[Any, Any] = {key: plain(value)}
        if isinstance(value, Mapping):
            messages = _messages_of_lists(value)
            inside = flat(value, f"{key}.") if messages is None else {key: messages}
        for each, its in inside.items():
            if each in found:
                raise ValueError(f"has two values for {shown(each)}")
            found[each] = its
    return found


def plain(value: Any) -> Any:
    """A list in place of an array of one axis, as tables of columns hold them."""
    if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist"):
        return value.tolist()
    return value


def _with_answer(cells: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    yield from cells.items()
    if "choices" in cells and "answerKey" in cells and "answer" not in cells:
        choices, key = plain(cells["choices"]), cells["answerKey"]
        if isinstance(choices, Mapping):
            choices = plain(choices.get("label"))
        if not isinstance(choices, list | tuple):
            return
        if isinstance(key, str) and key in choices:
            yield "answer", key
        elif isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(choices):
            yield "answer", choices[key]
        else:
            yield "answer", Bad(f"the answerKey {shown(key)} is none of its {len(choices)} choices")


def _messages_of_lists(value: Mapping[Any, Any]) -> list[dict[str, Any]] | None:
    """Messages that a table of columns has taken apart."""
    roles, contents = plain(value.get("role")), plain(value.get("content"))
    if not isinstance(roles, list) or not isinstance(contents, list):
        return None
    if len(roles) != len(contents):
        return None
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=True)
    ]


def read_prompt(value: Any) -> Any:
    """Read JSON of messages, since a cell of many tables holds no list."""
    return _read(value, r"\s*\[\s*\{", _is_message)


def read_answer_cell(value: Any) -> Any:
    """Read JSON of a list of answers."""
    return _read(value, r"\s*\[", _is_answer)


def _read(value: Any, opening: str, fits: Callable[[Any], bool]) -> Any:
    if not isinstance(value, str) or not re.match(opening, value):
        return value
    try:
        items = json.loads(value)
    # Deeply nested brackets are no list of these either.
    except (ValueError, RecursionError):
        return value
    return items if isinstance(items, list) and items and all(map(fits, items)) else value


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and "content" in item


def _is_answer(item: Any) -> bool:
    return isinstance(item, str | int) and not isinstance(item, bool)


def listed_answers(value: Any) -> Sequence[Any] | None:
    """The answers of a set; None of a single answer."""
    return value if isinstance(value, list | tuple) else None


def is_utf8(text: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` had nothing to escape."""
    return not any("\udc80" <= letter <= "\udcff" for letter in text)


def as_bytes(text: str) -> bytes:
    """The bytes that such a text was decoded from."""
    return text.encode("utf-8", errors="surrogateescape")


def escaped(value: Any) -> Any:
    r"""A text with bytes that are no UTF-8 as `\xe9`; all else as it is."""
    if not isinstance(value, str) or is_utf8(value):
        return value
    return as_bytes(value).decode("utf-8", errors="backslashreplace")
