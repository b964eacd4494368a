"""What commands print: a table for people, JSON for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


class UsageError(ValueError):
    """A command that cannot be carried out, and why."""


def say(text: str = "") -> None:
    """A line on the standard output."""
    sys.stdout.write(f"{text}\n")


def say_json(value: Any) -> None:
    """A value as JSON on the standard output."""
    say(json.dumps(value, indent=2))


def say_table(header: Sequence[str], rows: Sequence[Sequence[Any]], margin: str = "") -> None:
    """Rows under a header, in columns as wide as they must be."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say((margin + "  ".join(cells)).rstrip())
