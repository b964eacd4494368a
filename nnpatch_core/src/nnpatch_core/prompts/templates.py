"""Fills templates, and notes where each filling stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Formatter
from typing import Any

import attrs

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core._ranges import ranges
from nnpatch_core.errors import TokensError
from nnpatch_core.seq_pos import LAST

#: The column that says which template a pair is of.
TEMPLATE = "template"


@attrs.frozen
class Filled:
    """A template with its placeholders filled.

    Args:
        text: the prompt.
        spans: for each placeholder its first letter and the one behind its last.
    """

    text: str
    spans: Mapping[str, tuple[int, int]]


@attrs.frozen
class Template:
    """A template: texts, each followed by a placeholder; the last one by none.

    Args:
        pieces: text and placeholder.
        names: what the span of each placeholder is called; a placeholder that stands several times
            is numbered, as `A[0]` and `A[1]`.
    """

    pieces: tuple[tuple[str, str | None], ...]
    names: tuple[str, ...]

    @classmethod
    def read(cls, text: Any) -> Template:
        """Read a template in the syntax of `str.format`, with names alone in the braces.

        Raises:
            TokensError: it is none.
        """
        if not isinstance(text, str):
            raise TokensError(f"a template must be a text, got {shown(text)}")
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise TokensError(
                f"{shown(text)} is no template: {error}; a brace of the text is doubled"
            ) from error
        pieces = []
        for before, name, spec, conversion in parsed:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise TokensError(
                    f"{shown(text)} is no template: a placeholder is a name in braces, as "
                    "'{A}'; a brace of the text is doubled"
                )
            if name == LAST:
                raise TokensError(
                    f"a placeholder may not be called {LAST!r}, which is each prompt's last token"
                )
            pieces.append((before, name))
        wanted = [name for _, name in pieces if name is not None]
        if not wanted:
            raise TokensError(f"{shown(text)} is no template: it has no placeholder, as '{{A}}'")
        counted: dict[str, int] = {}
        names = []
        for name in wanted:
            number = counted.get(name, 0)
            counted[name] = number + 1
            names.append(f"{name}[{number}]" if wanted.count(name) > 1 else name)
        return cls(tuple(pieces), tuple(names))

    @property
    def placeholders(self) -> frozenset[str]:
        """Its placeholders."""
        return frozenset(name for _, name in self.pieces if name is not None)

    def fill(self, fills: Mapping[str, str]) -> Filled:
        """Fill the placeholders, of which all are given."""
        text, spans = "", {}
        names = iter(self.names)
        for before, name in self.pieces:
            text += before
            if name is not None:
                spans[next(names)] = (len(text), len(text) + len(fills[name]))
                text += fills[name]
        return Filled(text, spans)


def read_templates(template: Any, count: int) -> tuple[list[str], list[Template]]:
    """Read one template for all pairs, or one for each.

    Raises:
        TokensError: there are other than one or `count` of them, or one is none.
    """
    if isinstance(template, str):
        return [template] * count, [Template.read(template)] * count
    given = listed(template)
    if given is None or len(given) != count:
        got = shown(template) if given is None else str(len(given))
        raise TokensError(
            f"template must be one text, or a list with one for each of {count} pairs, got {got}"
        )
    known = {text: Template.read(text) for text in given}
    return list(given), [known[text] for text in given]


def fill_all(templates: Sequence[Template], fills: Any, argument: str) -> list[Filled]:
    """Fill each template with its mapping.

    Raises:
        TokensError: a mapping that is none, lacks a placeholder, or has a filling that is no text.
    """
    filled = []
    for number, (template, values) in enumerate(zip(templates, fills, strict=True)):
        if not isinstance(values, Mapping):
            raise TokensError(
                f"{argument} of pair {number} must be a mapping from placeholders to texts, got "
                f"{shown(values)}"
            )
        for name in sorted(template.placeholders):
            if name not in values:
                there = ", ".join(map(str, values)) or "none"
                raise TokensError(
                    f"{argument} of pair {number} lacks {name!r}, which its template has; there "
                    f"are {there}"
                )
            if not isinstance(values[name], str) or not values[name].strip():
                raise TokensError(
                    f"{name!r} in {argument} of pair {number} must be a text, got "
                    f"{shown(values[name])}"
                )
        filled.append(template.fill(values))
    return filled


def check_used(templates: Sequence[Template], fills: Sequence[Any], argument: str) -> None:
    """Raise `TokensError` for a filling that no template has a placeholder for."""
    known = frozenset[str]().union(*(template.placeholders for template in templates))
    unused: dict[Any, list[int]] = {}
    for number, values in enumerate(fills):
        for name in values:
            if name not in known:
                unused.setdefault(name, []).append(number)
    for name, numbers in unused.items():
        pairs = f"pair{'s' * (len(numbers) > 1)} {ranges(numbers, ' to ')}"
        raise TokensError(
            f"{argument} of {pairs} has {shown(name)}, and no template has such a placeholder; "
            f"there are {', '.join(sorted(known))}"
        )
