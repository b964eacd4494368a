"""Reads tokens and answers off the rows of a table; every fault is found before one is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import (
    AnswerError,
    AnswerWarning,
    PatchingError,
    PromptWarning,
    TokensError,
)
from nnpatch_core.prompts.answers import FIRST, Answer, read_answer
from nnpatch_core.prompts.encoding import Encoded, Encoder
from nnpatch_core.prompts.rows import (
    COLUMNS,
    PROMPTS,
    Fault,
    Prompt,
    Row,
    Table,
    TextPair,
    UnusableError,
    error_of,
    joined_places,
    report,
)
from nnpatch_core.prompts.spans import Found, Part, find_span, read_part
from nnpatch_core.prompts.turns import warn_of_turns

#: Letters of a prompt that a warning shows.
_TAIL = 60


@attrs.frozen
class Read:
    """A row that can be used: its prompts, their answers and spans, by the prompt's column."""

    row: Row
    pair: TextPair
    prompts: Mapping[str, Encoded]
    answers: Mapping[str, Answer]
    spans: Mapping[str, Mapping[str, Found]]

    def given(self, column: str) -> Any:
        """A value of the row, as the user gave it."""
        return getattr(self.pair, column)


@attrs.frozen
class Reader:
    """Reads rows of prompts.

    Args:
        encoder: tokenises.
        ids: the columns of answers in which digits are token ids.
        space: whether an answer is joined to its prompt by a space, where neither has one.
        first: whether the first token of several will do.
        drop: whether faulty rows are left out.
    """

    encoder: Encoder
    ids: frozenset[str]
    space: bool
    first: bool
    drop: bool

    def read(self, table: Table) -> tuple[list[Read], list[tuple[TextPair, str]]]:
        """Read the rows that can be used; give those left out too, each with the reason.

        Raises:
            PatchingError: rows are faulty and not to be left out, or none is left.

        Warns:
            AnswerWarning: answers were joined by a space, or cut to their first token; integers of
                a DataFrame were taken as token ids.
            PromptWarning: a span cuts a token in two; pairs or the tokenizer's end tokens were left
                out; texts were rendered by the chat template already, or end a turn and open none.
        """
        kept, faulty, dropped = [], [], []
        for row in table.rows:
            read = self._row(table, row)
            if isinstance(read, Read):
                kept.append(read)
            else:
                faulty.append(read)
                dropped.append((row.pair, "; ".join(map(str, read))))
        if faulty and not self.drop:
            raise error_of(table, faulty)
        if not kept:
            raise TokensError(
                f"there are no prompt pairs: all were dropped\n{report(faulty)}"
                if faulty
                else "there are no prompt pairs"
            )
        if faulty:
            count = f"{len(faulty)} of {len(table.rows)} {table.kind}s"
            was = "was" if len(faulty) == 1 else "were"
            warn(f"{count} {was} dropped\n{report(faulty)}", PromptWarning)
        self._warn_of_answers(table, kept)
        self._warn_of_integers(table, kept)
        self._warn_of_ends(kept)
        _warn_of_cuts(table, kept)
        texts = {
            name: [(read.row, text) for read in kept if isinstance(text := read.given(name), str)]
            for name in PROMPTS
        }
        warn_of_turns(self.encoder, table, texts)
        return kept, dropped

    def _row(self, table: Table, row: Row) -> Read | list[Fault]:
        """Read a row's prompts and answers; or give all that is wrong with them."""
        if row.faults:
            return list(row.faults)
        cells = dict(zip(COLUMNS, row.values, strict=True))
        faults: list[Fault] = []
        values: dict[str, Any] = {}
        prompts: dict[str, Encoded] = {}
        answers: dict[str, Answer] = {}
        for name in PROMPTS:
            with _noted(table.place(row, name), faults):
                values[name] = _prompt(cells[name])
                prompts[name] = self.encoder.encode(values[name])
        for name in PROMPTS:
            column = f"{name}_answer"
            with _noted(table.place(row, column), faults):
                values[column] = _answer(cells[column], column in self.ids)
                # Without its prompt nobody knows its tokens.
                if name in prompts:
                    answers[name] = read_answer(
                        self.encoder,
                        prompts[name],
                        values[column],
                        space=self.space,
                        first=self.first,
                    )
        if not faults and answers["source"].token == answers["target"].token:
            both = " and ".join(repr(values[f"{name}_answer"]) for name in PROMPTS)
            message = f"answers {both} begin with one token"
            faults.append(Fault(table.place(row, "source_answer"), message, AnswerError))
        spans = self._spans(table, row, prompts, faults)
        return faults or Read(row, TextPair(**values), prompts, answers, spans)

    def _spans(
        self, table: Table, row: Row, prompts: Mapping[str, Encoded], faults: list[Fault]
    ) -> dict[str, dict[str, Found]]:
        """By the prompt's column the spans of a row, by name."""
        found: dict[str, dict[str, Found]] = {side: {} for side in PROMPTS}
        for name, value in row.spans.items():
            parts: tuple[Part, Part] = (None, None)
            with _noted(table.span_place(row, name), faults):
                parts = read_part(value)
            for side, part in zip(PROMPTS, parts, strict=True):
                if side in prompts:
                    with _noted(f"{table.span_place(row, name, side)}, {side} prompt", faults):
                        found[side][name] = find_span(self.encoder, prompts[side], part)
        return found

    def _warn_of_answers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once which answers were not taken as they were spelled."""
        spaced = _where(table, kept, lambda answer: answer.spaced)
        if spaced is not None:
            where, read, name = spaced
            spelled, text = read.given(f"{name}_answer"), _tail(read.prompts[name].text)
            warn(
                f"answers without their space were joined to their prompts by one: {spelled!r} "
                f"follows {text!r} as {read.answers[name].spelled!r} ({where}). Spell them with "
                "their space to silence this, or pass space=False to join them as they are",
                AnswerWarning,
            )
        cut = _where(table, kept, lambda answer: answer.cut)
        if cut is not None:
            where, read, name = cut
            first = self.encoder.pieces([read.answers[name].token])[0]
            warn(f"{FIRST}: {first!r} of {read.answers[name].spelled!r} ({where})", AnswerWarning)

    def _warn_of_integers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once that a DataFrame's integers are ids: pandas makes them of digits unasked."""
        texts = [name for name in PROMPTS if f"{name}_answer" not in self.ids]
        ids = _where(table, kept, lambda answer: answer.spelled is None, texts)
        if table.kind != "row" or ids is None:
            return
        places, read, name = ids
        token = read.given(f"{name}_answer")
        warn(
            f"integers were taken as token ids: {token} is the token "
            f"{self.encoder.pieces([token])[0]!r} ({places}). answers='ids' says so and silences "
            "this; pandas.read_csv(path, dtype=str) reads digits as text",
            AnswerWarning,
        )

    def _warn_of_ends(self, kept: Sequence[Read]) -> None:
        ends = [prompt.end for read in kept for prompt in read.prompts.values() if prompt.end]
        if ends:
            named = ", ".join(map(repr, self.encoder.pieces(ends[0])))
            warn(
                f"the tokenizer ends a text with {named}, which was left out: the answer is read "
                "after the prompt's own last token",
                PromptWarning,
            )


def _warn_of_cuts(table: Table, kept: Sequence[Read]) -> None:
    """Say once, of each span, which tokens it cuts in two."""
    for name in dict.fromkeys(name for read in kept for name in read.row.spans):
        cut = [
            (read, side, found.cut[0])
            for read in kept
            for side in PROMPTS
            if (found := read.spans[side].get(name)) is not None and found.cut
        ]
        if not cut:
            continue
        read, side, token = cut[0]
        rows = len({id(read) for read, _, _ in cut})
        more = f", and in {rows - 1} more {table.kind}{'s' * (rows > 2)}" if rows > 1 else ""
        warn(
            f"span {name!r} cuts the token {token!r} in two, of which it takes the whole "
            f"({table.span_place(read.row, name, side)}, {side} prompt{more})",
            PromptWarning,
        )


@contextmanager
def _noted(place: str, faults: list[Fault]) -> Iterator[None]:
    """Note what cannot be used, and go on with the rest of the row."""
    try:
        yield
    except UnusableError as error:
        faults.append(Fault(place, error.message, error.error, error.advice))


def _where(
    table: Table,
    kept: Iterable[Read],
    concerns: Callable[[Answer], bool],
    prompts: Iterable[str] = PROMPTS,
) -> tuple[str, Read, str] | None:
    """Find where the answers stand that something concerns, the first of them, and its prompt."""
    concerned = {name: [read for read in kept if concerns(read.answers[name])] for name in prompts}
    rows = {f"{name}_answer": [read.row for read in reads] for name, reads in concerned.items()}
    firsts = ((reads[0], name) for name, reads in concerned.items() if reads)
    return next(((joined_places(table, rows), read, name) for read, name in firsts), None)


def _tail(text: str) -> str:
    return text if len(text) <= _TAIL else f"…{text[-_TAIL:]}"


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise UnusableError(TokensError, "must be a non-empty text, got ''")
        return value
    if not is_messages(value):
        raise UnusableError(
            TokensError, f"must be a non-empty text, or a list of messages, got {shown(value)}"
        )
    for message in value:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise UnusableError(
                TokensError, f"a message needs a 'role' and a 'content', got {shown(dict(message))}"
            )
    return tuple(dict(message) for message in value)


def is_messages(prompt: Any) -> bool:
    """Whether a prompt is meant as the messages of a chat."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes)
    return is_list and len(prompt) > 0 and all(isinstance(item, Mapping) for item in prompt)


def _answer(value: Any, ids: bool) -> str | int:
    if isinstance(value, str) and not ids:
        if not value:
            raise UnusableError(TokensError, "must be a non-empty text or a token id, got ''")
        return value
    if isinstance(value, str):
        digits = value.strip()
        if digits.isascii() and digits.isdigit():
            return int(digits)
        raise UnusableError(AnswerError, f"must be a token id, got {shown(value)}")
    try:
        return strict_int(value, "an answer", TokensError)
    except PatchingError:
        kind = f"{shown(value)} ({type(value).__name__})"
        raise UnusableError(
            TokensError, f"must be a non-empty text or a token id, got {kind}"
        ) from None
