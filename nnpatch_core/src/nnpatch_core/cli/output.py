"""Prints for commands: a table for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

from nnpatch_core._printable import printable

#: Where commands print; None is the standard output.
_OUTPUT: ContextVar[TextIO | None] = ContextVar("output", default=None)


class UsageError(ValueError):
    """A command that cannot be carried out, and why."""


@contextmanager
def only_ours() -> Iterator[None]:
    """Send the prints of plugins and models to the standard error, so that JSON stays JSON."""
    token = _OUTPUT.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _OUTPUT.reset(token)


def say(text: str = "") -> None:
    """Print lines on the standard output; names and reasons in them may be anybody's."""
    for line in text.split("\n"):
        _write(printable(line))


def say_aside(text: str) -> None:
    """Print a warning in one line on the standard error."""
    sys.stderr.write(f"nnpatch: warning: {printable(first_line(text))}\n")


def say_json(value: Any) -> None:
    """Print a value as JSON on the standard output."""
    _write(json.dumps(value, indent=2))


def say_table(header: Sequence[str], rows: Sequence[Sequence[Any]], margin: str = "") -> None:
    """Print rows under a header, in columns as wide as they must be."""
    lines = [list(header), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say((margin + "  ".join(cells)).rstrip())


def first_line(reason: str) -> str:
    """The first line of an error; with the second one, where that is what it announces."""
    # What follows is for other readers, such as a list of all classes there are.
    first, *rest = reason.strip().splitlines() or [""]
    if first.rstrip().endswith(":") and rest:
        return f"{first.rstrip()} {rest[0].strip()}"
    return first


def _write(line: str) -> None:
    (_OUTPUT.get() or sys.stdout).write(f"{line}\n")
