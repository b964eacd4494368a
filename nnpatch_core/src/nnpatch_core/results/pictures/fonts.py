"""Letters that a matplotlib figure can draw: fonts that have them, or their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import attrs
import matplotlib as mpl
from matplotlib.font_manager import (
    FontProperties,
    findfont,
    findSystemFonts,
    fontManager,
    get_font,
)

#: Fonts are asked in this order: those whose names have the first of these, and so on.
_LIKED = ("sans cjk", "noto sans", "unicode", "sans", "")
#: The fonts that were added to matplotlib's list here, by path.
_added: dict[str, str] = {}


@attrs.frozen
class Letters:
    """The fonts of a figure.

    Args:
        families: the user's, then those that have what they lack.
        lacking: what none of the machine's fonts has.
    """

    families: tuple[str, ...]
    lacking: frozenset[str]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Letters:
        """The fonts for some texts."""
        users = tuple(mpl.rcParams["font.family"])
        needed = {letter for text in texts for letter in text if not letter.isascii()}
        if not needed:
            return cls(users, frozenset())
        lacking = needed - _drawn_by(findfont(FontProperties(family=list(users))), needed)
        more = []
        for family, path in _installed() if lacking else ():
            found = _drawn_by(path, lacking)
            if found:
                more.append(family)
                lacking -= found
            if not lacking:
                break
        return cls((*users, *more), frozenset(lacking))

    def shown(self, text: str) -> str:
        r"""The text, with a letter that no font has as its number, such as `\u4e2d`."""
        return "".join(
            letter.encode("unicode_escape").decode() if letter in self.lacking else letter
            for letter in text
        )


def _drawn_by(path: str, letters: Iterable[str]) -> set[str]:
    """The letters that a font has; none of one that cannot be read."""
    try:
        font = get_font(path)
    except (OSError, RuntimeError):
        return set()
    return {letter for letter in letters if font.get_char_index(ord(letter))}


def _installed() -> Iterator[tuple[str, str]]:
    """Names and paths of upright fonts of usual weight, a file each, the liked ones first.

    Those that were installed after matplotlib made its list come last, and are added to it: each
    time in the same place, so that a picture does not depend on those that were drawn before.
    """
    files: dict[str, str] = {}
    for entry in fontManager.ttflist:
        if entry.fname in _added:
            continue
        usual = entry.style == "normal" and entry.weight in (400, "normal", "regular", "book")
        if usual and _is_drawn(entry.name):
            files.setdefault(entry.fname, entry.name)
    yield from sorted(((name, path) for path, name in files.items()), key=_rank)
    known = {entry.fname for entry in fontManager.ttflist} - _added.keys()
    for path in sorted(set(findSystemFonts()) - known, key=lambda path: _rank((path, path))):
        if "bold" in path.lower() or not _is_drawn(path):
            continue
        if path not in _added:
            try:
                fontManager.addfont(path)
            except (OSError, RuntimeError):
                continue
            _added[path] = fontManager.ttflist[-1].name
        yield _added[path], path


def _is_drawn(name: str) -> bool:
    """Whether letters of a font are letters: neither pictures nor frames for all there are."""
    return not any(part in name.lower() for part in ("color", "last resort", "lastresort"))


def _rank(font: tuple[str, str]) -> tuple[int, str]:
    name = font[0].lower().replace("notosans", "noto sans ").replace("sanscjk", "sans cjk")
    return next(number for number, part in enumerate(_LIKED) if part in name), name
