"""The additions of the caller of `report` to what an outcome knows, read without trust."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError


@attrs.frozen
class Asked:
    """The additions of the caller of `report`.

    Args:
        command: one that makes the outcome again.
        question: in a sentence.
        title: of the page.
        pages: that stand beside it: what each is, and its address.
        warnings: that were raised on the way.
        spelled: gives a sentence in the caller's language, whose options are perhaps no arguments.
    """

    command: str | None
    question: str | None
    title: str | None
    pages: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    spelled: Callable[[str], str] = str


def read_asked(
    command: Any = None,
    question: Any = None,
    title: Any = None,
    pages: Any = None,
    warnings: Any = (),
) -> Asked:
    """Read the arguments of `report`.

    Raises:
        OutcomeError: one of them is none.

    Examples:
        >>> read_asked(pages={"heatmaps": "heat maps.html"}).pages
        (('heatmaps', 'heat%20maps.html'),)
    """
    for name, value in (("command", command), ("question", question), ("title", title)):
        if value is not None and not isinstance(value, str):
            raise OutcomeError(f"{name} must be a text, got {shown(value)}")
    given = () if warnings is None else listed(warnings)
    if given is None or isinstance(warnings, str | bytes):
        raise OutcomeError(f"warnings must be a list of texts, got {shown(warnings)}")
    # Warnings as `warnings.catch_warnings(record=True)` has them are meant by their words.
    told = tuple(str(getattr(each, "message", each)) for each in given)
    return Asked(command, question, title, _pages(pages), tuple(dict.fromkeys(told)))


def read_width(width: Any) -> float:
    """How wide an interval may be.

    Raises:
        OutcomeError: it is no positive number.
    """
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if not number or not 0 < width < float("inf"):
        raise OutcomeError(f"width must be a positive number, got {shown(width)}")
    return float(width)


def read_level(level: Any) -> float:
    """The level of intervals.

    Raises:
        OutcomeError: it is none.
    """
    number = isinstance(level, int | float) and not isinstance(level, bool)
    if not number or not 0 < level < 1:
        raise OutcomeError(f"level must be between 0 and 1, such as 0.95, got {shown(level)}")
    return float(level)


def _pages(pages: Any) -> tuple[tuple[str, str], ...]:
    if pages is None:
        return ()
    if not isinstance(pages, Mapping) or not all(
        isinstance(each, str) for pair in pages.items() for each in pair
    ):
        raise OutcomeError(f"pages must be addresses by name, got {shown(pages)}")
    return tuple((name, _address(name, address)) for name, address in pages.items())


def _address(name: str, address: str) -> str:
    """A file beside the report, or a page of the web: nothing else is a link that is safe to click.

    A file's name may hold anything, and is written so that a link reads it.
    """
    try:
        scheme = urlsplit(address).scheme
        if scheme in ("http", "https"):
            return address
        # A colon in front would make a scheme of what is a file's name.
        return quote(address, safe="/", errors="strict")
    except ValueError as error:
        raise OutcomeError(f"pages[{name!r}] is no address: {shown(address)}") from error
