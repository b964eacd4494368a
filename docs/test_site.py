"""Pages that load from elsewhere are found, and the page of citation says what the file says."""

from __future__ import annotations

import re
from pathlib import Path

import check_site
import pytest

DOCS = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.html", '<script src="https://elsewhere.org/a.js"></script>'),
        ("a.html", '<img src="//elsewhere.org/a.png">'),
        ("a.html", '<link rel="stylesheet" href="http://elsewhere.org/a.css">'),
        ("a.html", '<p style="background: url(https://elsewhere.org/a.png)">'),
        ("a.css", "@import 'https://elsewhere.org/a.css';"),
        ("a.css", "p { background: url(//elsewhere.org/a.png) }"),
    ],
)
def test_what_is_loaded_from_elsewhere_is_found(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    [elsewhere] = check_site.loads(tmp_path)[name]
    assert "elsewhere.org" in elsewhere


def test_links_are_no_loads(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://elsewhere.org">there</a><img src="a.png"><script src="a.js"></script>'
        '<link rel="canonical" href="https://elsewhere.org/a"><link rel="icon" href="a.svg">',
        encoding="utf-8",
    )
    (tmp_path / "a.css").write_text("p { background: url(data:image/png;base64,AA) }", "utf-8")
    assert check_site.loads(tmp_path) == {}


def test_the_page_of_citation_says_what_the_file_says() -> None:
    page = (DOCS / "citation.md").read_text(encoding="utf-8")
    file = (DOCS.parent / "CITATION.cff").read_text(encoding="utf-8")
    for field in ("title", "version", "url"):
        [value] = re.findall(rf"^{field}: (.*)$", file, re.MULTILINE)
        said = re.escape(value.strip('"'))
        assert re.search(rf"{field} += {{{said}}}", page), field
