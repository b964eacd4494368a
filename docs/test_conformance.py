"""docs/conformance.md has every check of the kit, and says which adapters skip it."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from nnpatch_core._rounding import SHARES
from nnpatch_core.conformance import why_skipped
from nnpatch_core.testing import CHECKS, tiny_api

PAGE = Path(__file__).with_name("conformance.md").read_text(encoding="utf-8")
API = tiny_api()


def without(*names: str) -> object:
    rows = {name: row for name, row in API.components.items() if name not in names}
    return attrs.evolve(API, components=rows)


DECLARED = {
    **{f"no `{name}`": without(name) for name in API.components},
    "no `attn` and no `mlp`": without("attn", "mlp"),
    "no `attn` and no `resid`": without("attn", "resid"),
    "`residual=None`": attrs.evolve(API, residual=None),
    '`residual="scaled"`': attrs.evolve(API, residual="scaled"),
    "`padding=False`": attrs.evolve(API, padding=False),
    "`cone=False`": attrs.evolve(API, cone=False),
}


def table(heading: str) -> dict[str, list[str]]:
    """The first table under a heading: first cell of a row to the others."""
    text = re.split(rf"^##+ {heading}\n", PAGE, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()  # type: ignore[index]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[2:]]
    return {first: others for first, *others in rows}


def test_each_check_has_its_heading() -> None:
    headings = re.findall(r"^### (check_\w+)$", PAGE, re.MULTILINE)
    assert headings == list(CHECKS)


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_says_what_it_finds(check: str) -> None:
    text = re.split(r"^##+ ", PAGE.partition(f"\n### {check}\n")[2], flags=re.MULTILINE)[0]
    assert re.fullmatch(r"\n\S[^|]{20,}\bFinds:\s[^|]+\.\n\n", text)


def test_no_other_check_is_named() -> None:
    assert set(re.findall(r"`(check_\w+)`", PAGE)) <= set(CHECKS)


def test_what_is_skipped() -> None:
    found = {
        declared: [name for name in CHECKS if why_skipped(name, api) is not None]
        for declared, api in DECLARED.items()
    }
    written = {
        declared: re.findall(r"`(\w+)`", cells[0])
        for declared, cells in table("Which are skipped").items()
    }
    assert written == {declared: names for declared, names in found.items() if names}


def test_rounding() -> None:
    text = PAGE.partition("\n### What counts as the same\n")[2]
    written = dict(re.findall(r"(\d+e-\d) in\s(\w+)", text))
    assert {name: float(share) for share, name in written.items()} == {
        str(dtype).removeprefix("torch."): share for dtype, share in SHARES.items()
    }
