"""The parts of a page, as the template lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import attrs
from markupsafe import Markup

from nnpatch_core.report.advice import Advice


@attrs.frozen
class Marked:
    """A text, some pieces of which stand out.

    Args:
        pieces: each a text, and whether it stands out.
    """

    pieces: tuple[tuple[str, bool], ...]


#: A cell of a table.
Cell: TypeAlias = str | Marked


@attrs.frozen
class Table:
    """A table, of which the first rows are seen at once and the others behind a click.

    Args:
        caption: of which the table is.
        head: the names of the columns.
        rows: as many cells each.
        numbers: the names of the columns that hold numbers.
        shown: how many rows are seen at once.
        notes: below it.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    numbers: frozenset[str] = frozenset()
    shown: int = 10
    notes: tuple[str, ...] = ()
    kind: str = attrs.field(default="table", init=False)

    @property
    def first(self) -> tuple[tuple[Cell, ...], ...]:
        """The rows that are seen at once: all, if few are left."""
        return self.rows if len(self.rows) <= self.shown + 2 else self.rows[: self.shown]

    @property
    def others(self) -> tuple[tuple[Cell, ...], ...]:
        """The rows behind a click."""
        return self.rows[len(self.first) :]


@attrs.frozen
class Words:
    """A paragraph."""

    text: str
    kind: str = attrs.field(default="words", init=False)


@attrs.frozen
class Listing:
    """Names, each with what is said of it."""

    entries: tuple[tuple[str, str], ...]
    kind: str = attrs.field(default="listing", init=False)


@attrs.frozen
class Items:
    """Sentences, one below the other."""

    texts: tuple[str, ...]
    kind: str = attrs.field(default="items", init=False)


@attrs.frozen
class Code:
    """Text to copy."""

    text: str
    kind: str = attrs.field(default="code", init=False)


@attrs.frozen
class Picture:
    """A picture, with words below it.

    Args:
        svg: the picture.
        caption: below it.
    """

    svg: Markup
    caption: str
    kind: str = attrs.field(default="picture", init=False)


@attrs.frozen
class Links:
    """Pages that stand beside this one, each with its address."""

    pages: tuple[tuple[str, str], ...]
    kind: str = attrs.field(default="links", init=False)


@attrs.frozen
class Advices:
    """Advice, with where it comes from."""

    given: tuple[Advice, ...]
    kind: str = attrs.field(default="advices", init=False)


Part: TypeAlias = Table | Words | Listing | Items | Code | Picture | Links | Advices


@attrs.frozen
class Section:
    """A part of the page under a heading.

    Args:
        name: by which it is linked to.
        heading: above it.
        parts: in their order.
    """

    name: str
    heading: str
    parts: Sequence[Part]
