"""Sees that built pages load nothing from elsewhere: `python docs/check_site.py BUILT`."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

#: Tags that load what they name, and by which attribute; a link of a page does not.
LOADING = {"src": None, "srcset": None, "poster": None, "data": ("object",), "href": ("link",)}
#: Links that tell a browser of something, and load nothing.
TOLD = {"canonical", "next", "prev", "search", "author", "help", "index", "top", "up"}
ELSEWHERE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


class Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Look at the attributes that load something."""
        named = dict(attrs)
        if tag == "link" and set((named.get("rel") or "").split()) <= TOLD:
            return
        for name, value in attrs:
            tags = LOADING.get(name, ())
            if (tags is None or tag in tags) and value and ELSEWHERE.match(value):
                self.found.append(value)
            if name == "style":
                self.found += IN_STYLES.findall(value or "")


def loads(built: Path) -> dict[str, list[str]]:
    """Each file of a site that loads something from elsewhere, and what."""
    found: dict[str, list[str]] = {}
    for path in sorted(built.rglob("*")):
        text = path.read_text("utf-8", "replace") if path.suffix in (".html", ".css") else ""
        reader = Loads()
        if path.suffix == ".html":
            reader.feed(text)
        elsewhere = [*reader.found, *IN_STYLES.findall(text if path.suffix == ".css" else "")]
        if elsewhere:
            found[path.relative_to(built).as_posix()] = elsewhere
    return found


def main() -> None:
    """End with an error that names what is loaded."""
    built = Path(sys.argv[1])
    found = loads(built)
    if not (built / "index.html").exists() or found:
        raise SystemExit("\n".join(f"{page}: {', '.join(which)}" for page, which in found.items()))


if __name__ == "__main__":
    main()
