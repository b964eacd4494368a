"""A tiny model and a table on disk, for runs."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import attrs

from nnpatch_core.testing import tiny_model, tiny_tokenizer

COUNTRIES = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Greece": "Athens",
    "Cuba": "Havana",
    "Norway": "Oslo",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "China": "Beijing",
}
HEADER = "clean,corrupted,answer,wrong_answer"


def row(country: str, other: str) -> str:
    """A line of a table."""
    capitals = COUNTRIES[country], COUNTRIES[other]
    return ",".join([f"Now {country} is", f"Now {other} is", *(f" {each}" for each in capitals)])


def lines(count: int = 4) -> list[str]:
    """The lines of a table with a header."""
    names = [*COUNTRIES]
    return [HEADER, *(row(names[n], names[(n + 3) % len(names)]) for n in range(count))]


@attrs.frozen
class Files:
    """A model's folder and a table.

    Args:
        model: the folder.
        table: the file.
    """

    model: Path
    table: Path

    @property
    def arguments(self) -> list[str]:
        """As the command line takes them."""
        return [str(self.table), "--model", str(self.model)]


@cache
def _model() -> Path:
    folder = Path(mkdtemp()) / "model"
    words = [*lines(8), *(f" {each}" for pair in COUNTRIES.items() for each in pair)]
    words += [text for line in lines(8) for text in line.split(",")]
    tokenizer = tiny_tokenizer(words)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_files(folder: Path, count: int = 4, **_: Any) -> Files:
    """A model's folder and a table of some pairs, in a folder of the test."""
    model, table = folder / "model", folder / "pairs.csv"
    shutil.copytree(_model(), model)
    table.write_text("\n".join(lines(count)) + "\n", "utf-8")
    return Files(model, table)
