"""The tutorial runs from top to bottom, shows what is stored, and what its text says is true."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import notebooks
import numpy as np
import pytest

#: What a cell shows that no other run shows in the same way, or in the same bytes.
VOLATILE = ("text/html", "image/png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def done(folder: Path) -> list[Any]:
    """The cells of code, after a run."""
    ran = notebooks.run(notebooks.read("tutorial.ipynb"), folder)
    return [cell for cell in ran.cells if cell.cell_type == "code"]


def showing(done: list[Any], code: str) -> dict[str, str]:
    """What the cell shows that has this code."""
    [cell] = [each for each in done if code in each.source]
    return notebooks.shown(cell)


def rows(table: str) -> dict[tuple[str, str, str], float]:
    """Site, layers and place (position, else head) of each row of a table, to its value."""
    lines = re.findall(r"^(\w+) +\d+ +([\d-]+) +(\d+) .*?(-?\d+\.\d{3}) ", table, re.MULTILINE)
    return {(site, layers, place): float(value) for site, layers, place, value in lines}


def test_cells_show_what_is_stored(done: list[Any]) -> None:
    stored = notebooks.read("tutorial.ipynb").cells
    kept = [cell for cell in stored if cell.cell_type == "code"]
    for before, after in zip(kept, done, strict=True):
        one, other = notebooks.shown(before), notebooks.shown(after)
        assert one.keys() == other.keys(), before.source
        for kind in one.keys() - set(VOLATILE):
            assert notebooks.same(one[kind], other[kind]), (before.source, one[kind], other[kind])


def test_the_model_tells_the_answers(done: list[Any]) -> None:
    table = showing(done, "pd.DataFrame")["text/plain"]
    values = re.findall(r"(-?\d+\.\d\d) +(-?\d+\.\d\d)$", table, re.MULTILINE)
    assert len(values) == 12
    assert all(float(source) > 0 > float(target) for source, target in values)


def test_the_picture_has_cells_of_both_signs(done: list[Any]) -> None:
    drawn = base64.b64decode(showing(done, "out.plot")["image/png"])
    picture = matplotlib.image.imread(io.BytesIO(drawn), format="png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 600
    panels = picture[:, : int(picture.shape[1] * 0.9), :3]
    red, _, blue = np.moveaxis(panels, -1, 0)
    assert (blue - red > 0.25).mean() > 0.02
    assert (red - blue > 0.25).mean() > 0.0005


def test_the_text_says_what_the_tables_show(done: list[Any]) -> None:
    found = rows(showing(done, "out.top(8)")["text/plain"])
    assert found["attn", "26", "4"] == pytest.approx(0.725, abs=2e-3)
    assert ("resid", "13-25", "1") in found
    assert ("resid", "27-29", "4") in found
    heads = rows(showing(done, "heads.top(4)")["text/plain"])
    assert list(heads)[:2] == [("o", "26", "0"), ("o", "27", "8")]
    text = "".join(cell.source for cell in notebooks.read("tutorial.ipynb").cells)
    for value in list(heads.values())[:2]:
        assert f"({value:.2f}" in text
    difference = showing(done, "back =")["text/plain"]
    ends = re.findall(r" (-?\d+\.\d{3}) +(-?\d+\.\d{3})$", difference, re.MULTILINE)
    assert len(ends) == 3
    assert all(float(low) > 0 for low, _ in ends)


def test_tables_are_shown_as_tables(done: list[Any]) -> None:
    for code in ("out.top(8)", "heads.top(4)", "pd.DataFrame"):
        assert "<table" in showing(done, code)["text/html"]


def test_the_report_is_there(done: list[Any], folder: Path) -> None:
    assert "report.html" in showing(done, "heads.report")["text/plain"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Which heads bring the number of the subject to the last word?" in page
    assert "0.722" in page
    assert "<svg" in page


def test_it_is_stored_small_and_without_marks_of_a_machine() -> None:
    text = (notebooks.DOCS / "tutorial.ipynb").read_text(encoding="utf-8")
    assert len(text) < 250_000
    for mark in ("/home/", "/root/", "/tmp/", "iopub", "stderr"):
        assert mark not in text, mark
