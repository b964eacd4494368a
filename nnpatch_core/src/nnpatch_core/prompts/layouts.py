"""Layouts of known data sets, in which the four columns are to be made of what is there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core.errors import TokensError, UnknownNameError
from nnpatch_core.prompts.cells import Bad
from nnpatch_core.prompts.encoding import is_tokenizer
from nnpatch_core.prompts.names import ColumnsError, find_names
from nnpatch_core.prompts.rows import COLUMNS, Table
from nnpatch_core.prompts.templates import TEMPLATE

#: The cells of a row, by column; a layout may add some.
Cells: TypeAlias = dict[Any, Any]
#: The names of the four columns, those of them that hold token ids, and columns that were added.
Laid: TypeAlias = tuple[tuple[Any, ...], frozenset[str], tuple[str, ...]]
Layout: TypeAlias = Callable[[Sequence[Cells], Sequence[Any], Any, Any], Laid]

_YEARS = 100


def _columns(rows: Sequence[Cells], present: Sequence[Any], renamed: Any, tokenizer: Any) -> Laid:
    """One column each."""
    try:
        return find_names(renamed, present), frozenset(), ()
    except ColumnsError as error:
        hint = _recognised(rows, present, renamed)
        if hint is None:
            raise
        told = f"{error}; layout={hint!r} reads tables like this one"
        raise ColumnsError([told], error.names) from None


def _recognised(rows: Sequence[Cells], present: Sequence[Any], renamed: Any) -> str | None:
    """Name the layout that a table seems to have."""
    if not renamed and {_PROMPT, _SUBJECT, _TRUE} <= set(present):
        return "counterfact"
    try:
        find_names(renamed, [*present, COLUMNS[3]])
        *_, label = find_names(renamed, present, COLUMNS[:3])
    except (ColumnsError, TokensError):
        return None
    return "greater-than" if rows and all(_year(row.get(label)) for row in rows) else None


# CounterFact --------------------------------------------------------------------------------------

_FACT = "requested_rewrite"
_PROMPT, _SUBJECT = f"{_FACT}.prompt", f"{_FACT}.subject"
_TRUE = f"{_FACT}.target_true.str"


def _counterfact(
    rows: Sequence[Cells], present: Sequence[Any], renamed: Any, tokenizer: Any
) -> Laid:
    """Pair each fact with the next one of the same sentence that has another answer."""
    if renamed:
        raise TokensError("layout='counterfact' finds its columns itself: leave out columns=")
    needed = (_PROMPT, _SUBJECT, _TRUE)
    missing = [name for name in needed if name not in present]
    if missing:
        raise TokensError(f"layout='counterfact' needs {', '.join(needed)}: no {missing[0]}")
    alike = defaultdict(list)
    for at, row in enumerate(rows):
        if all(isinstance(row.get(name), str) for name in needed):
            alike[row[_PROMPT]].append(at)
    names = (_PROMPT, f"target's {_PROMPT}", _TRUE, f"target's {_TRUE}")
    # As they were: sentences are filled in on the way.
    facts = [dict(row) for row in rows]
    for places in alike.values():
        for order, at in enumerate(places):
            following = (facts[its] for its in places[order + 1 :] + places[:order])
            other = next((fact for fact in following if fact[_TRUE] != facts[at][_TRUE]), None)
            rows[at].update(_fact_pair(facts[at], other, names))
    return names, frozenset(), (TEMPLATE, "subject", "target_subject", "target_case_id")


def _fact_pair(fact: Cells, other: Cells | None, names: Sequence[str]) -> Cells:
    alone = Bad("no other fact has this sentence and another answer")
    return {
        names[0]: _filled(fact),
        names[1]: alone if other is None else _filled(other),
        names[3]: None if other is None else other[_TRUE],
        TEMPLATE: fact[_PROMPT],
        "subject": fact[_SUBJECT],
        "target_subject": None if other is None else other[_SUBJECT],
        "target_case_id": None if other is None else other.get("case_id"),
    }


def _filled(fact: Cells) -> str | Bad:
    sentence = fact[_PROMPT]
    if sentence.count("{}") != 1:
        return Bad(f"must hold {{}} once, for its subject, got {shown(sentence)}")
    return str(sentence.replace("{}", fact[_SUBJECT]))


def _subjects(table: Table) -> Table:
    """The subject of each fact as a span of its prompts."""
    rows = []
    for row in table.rows:
        names, sentence = (
            (row.others["subject"], row.others["target_subject"]),
            row.others[TEMPLATE],
        )
        letters = None
        if isinstance(sentence, str) and "{}" in sentence and all(map(_is_text, names)):
            start = sentence.index("{}")
            letters = tuple((start, start + len(name)) for name in names)
        rows.append(attrs.evolve(row, spans={"subject": letters}))
    return attrs.evolve(table, rows=tuple(rows), spans={"subject": (_SUBJECT, _SUBJECT)})


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# Greater-than -------------------------------------------------------------------------------------


def _greater_than(
    rows: Sequence[Cells], present: Sequence[Any], renamed: Any, tokenizer: Any
) -> Laid:
    """Of each prompt's year, the answers are the tokens that begin later years, and the others."""
    if not is_tokenizer(tokenizer):
        raise TokensError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    if "year" in present and "source_answer" not in (renamed or {}):
        renamed = {**(renamed or {}), "source_answer": "year"}
    try:
        source, target, label = find_names(renamed, present, COLUMNS[:3])
    except ColumnsError as error:
        # Answers are made of one that is missing.
        raise TokensError(str(error)) from None
    later, other = f"{label}, later years", f"{label}, other years"
    first = [_first_of_year(tokenizer, year) for year in range(_YEARS)]
    for row in rows:
        sets = _sets_of_years(row.get(label, Bad("is missing")), first)
        row[later], row[other] = sets if isinstance(sets, tuple) else (sets, None)
    return (source, target, later, other), frozenset(COLUMNS[2:]), ()


def _first_of_year(tokenizer: Any, year: int) -> int | None:
    """The first token of a year's last two digits; None where it is more than digits."""
    for token in tokenizer(f"{year:02}", add_special_tokens=False)["input_ids"]:
        piece = tokenizer.decode([token]).strip()
        if piece:
            return int(token) if f"{year:02}".startswith(piece) else None
    return None


def _sets_of_years(value: Any, first: Sequence[int | None]) -> tuple[list[int], list[int]] | Bad:
    """The tokens of which all years are later, and those of which none is."""
    if isinstance(value, Bad):
        return value
    if not _year(value):
        return Bad(f"must be a year, or its last two digits, got {shown(value)}")
    start = int(str(value).strip()[-2:])
    if None in first:
        return Bad("the tokenizer has no token with which a year's last two digits begin")
    tokens = [token for token in first if token is not None]
    others, later = set(tokens[: start + 1]), set(tokens[start + 1 :])
    if not later - others or not others - later:
        kind = "other" if later - others else "later"
        return Bad(f"no token is of {kind} years alone, for {shown(value)}")
    return sorted(later - others), sorted(others - later)


def _year(value: Any) -> bool:
    digits = "" if isinstance(value, bool) else str(value).strip()
    return digits.isascii() and digits.isdigit() and len(digits) in (1, 2, 4)


LAYOUTS: Mapping[str, Layout] = {"counterfact": _counterfact, "greater-than": _greater_than}


#: Layouts that tell spans of their own.
_SPANS: Mapping[str, Callable[[Table], Table]] = {"counterfact": _subjects}


def with_own_spans(table: Table, layout: str | None) -> Table:
    """The table with the spans that its layout tells."""
    own = None if layout is None else _SPANS.get(layout)
    return table if own is None else own(table)


def find_layout(name: str | None) -> Layout:
    """Find a layout by its name; None is that of one column each.

    Raises:
        UnknownNameError: there is none.
    """
    if name is None:
        return _columns
    if not isinstance(name, str) or name not in LAYOUTS:
        hint = did_you_mean(name, LAYOUTS)
        raise UnknownNameError(
            f"unknown layout {shown(name)}{hint}; there are {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[name]
