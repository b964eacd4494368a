"""Pages of HTML, read as a browser does."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

#: Elements that have no end.
_VOID = {"meta", "br", "img", "hr", "input", "link", "base", "col", "source", "wbr"}
#: Attributes by which a page loads something, by element; a link is followed by a click alone.
_LOADS = ("src", "srcset", "data", "poster", "background", "action", "formaction", "xlink:href")


class Page(HTMLParser):
    """What stands in a page.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text("utf-8")
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.references: list[str] = []
        self.scripts = 0
        self.labels: list[str] = []
        self.tags: list[str] = []
        self.handlers: list[str] = []
        #: The texts of each element that was read, by its name.
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._parts: list[list[str]] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        own = {name: value or "" for name, value in attrs}
        assert len(own) == len(attrs), f"<{tag}> has an attribute twice"
        if "id" in own:
            self.ids.append(own["id"])
        if tag == "a":
            self.links.append(own.get("href", ""))
        elif "href" in own:
            (self.references if own["href"].startswith("#") else self.loaded).append(own["href"])
        self.loaded += [own[name] for name in _LOADS if name in own]
        self.handlers += [name for name in own if name.startswith("on")]
        self.references += [
            part.partition(")")[0] for value in own.values() for part in value.split("url(")[1:]
        ]
        self.scripts += tag == "script"
        if own.get("role") == "img":
            self.labels.append(own.get("aria-label", ""))
        if tag not in _VOID:
            self._open.append(tag)
            self._parts.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag, tag
        self.texts.setdefault(tag, []).append("".join(self._parts.pop()))

    def handle_data(self, data: str) -> None:
        for parts in self._parts:
            parts.append(data)

    @property
    def text(self) -> str:
        """All words of the page."""
        return self.texts["body"][0]

    def check(self) -> None:
        """It stands alone, runs nothing, and its names are each there once."""
        assert self.source.startswith("<!DOCTYPE html>")
        assert self.scripts == 0
        assert self.handlers == []
        assert "link" not in self.tags
        assert "@import" not in self.source
        assert all(each.startswith("data:image/png;base64,") for each in self.loaded)
        assert len(set(self.ids)) == len(self.ids)
        named = [each.removeprefix("#") for each in self.references if each.startswith("#")]
        assert set(named) <= set(self.ids)
        assert all(each.startswith("#") for each in self.references)
        assert {link.removeprefix("#") for link in self.links if link[:1] == "#"} <= set(self.ids)
        assert 'lang="en"' in self.source
        assert all(self.labels), "a picture without words"
        assert self.tags.count("h1") == 1
        assert self.tags.count("svg") == len(self.labels)
