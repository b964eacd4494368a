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
from nnpatch_core.prompts.cells import Bad, listed_answers, read_prompt
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
    error_of_table,
    joined_places,
    report,
)
from nnpatch_core.prompts.spans import Found, Part, find_span, read_part
from nnpatch_core.prompts.turns import warn_of_turns

#: Letters of a prompt that a warning shows.
_TAIL = 60
_BEGIN = "begin with one token"


@attrs.frozen
class Read:
    """A row that can be used: its prompts, their answers and spans, by the prompt's column."""

    row: Row
    pair: TextPair
    prompts: Mapping[str, Encoded]
    answers: Mapping[str, tuple[Answer, ...]]
    spans: Mapping[str, Mapping[str, Found]]

    def given(self, column: str) -> Any:
        """A value of the row, as the user gave it."""
        return getattr(self.pair, column)

    @property
    def has_sets(self) -> bool:
        """Whether an answer was given as a set."""
        return any(isinstance(self.given(f"{name}_answer"), tuple) for name in PROMPTS)


@attrs.frozen
class Reader:
    """Reads rows of prompts.

    Args:
        encoder: tokenises.
        ids: the columns of answers in which digits are token ids.
        texts: those in which integers are texts.
        space: whether an answer is joined to its prompt by a space, where neither has one.
        several: what becomes of an answer of several tokens, as for `read_answer`.
        drop: whether faulty rows are left out.
    """

    encoder: Encoder
    ids: frozenset[str]
    texts: frozenset[str]
    space: bool
    several: str
    drop: bool

    def read(self, table: Table) -> tuple[list[Read], list[tuple[TextPair, str]]]:
        """Read the rows that can be used; give those left out too, each with the reason.

        Raises:
            PatchingError: rows are faulty and not to be left out, or none is left.

        Warns:
            AnswerWarning: answers were joined by a space, or cut to their first token; integers of
                a table were taken as token ids; of two answers all tokens were kept, and the first
                is one.
            PromptWarning: a span cuts a token in two; pairs or the tokenizer's end tokens were left
                out; texts were rendered by the chat template already, or end a turn and open none.
        """
        kept, faulty, dropped = [], [], []
        for row in table.rows:
            read = self._row(table, row)
            if isinstance(read, Read):
                kept.append(read)
            elif read:
                faulty.append(read)
                dropped.append((row.pair, "; ".join(map(str, read))))
        if table.faults:
            raise error_of_table(table, [] if self.drop else faulty)
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
        self._warn_of_first_tokens(table, kept)
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
        """Read a row's prompts and answers; or give all that is wrong with them.

        Of a table without all columns nothing may be wrong with a row, and it cannot be used.
        """
        cells = dict(zip(COLUMNS, row.values, strict=True))
        faults = list(row.faults)
        values: dict[str, Any] = {}
        prompts: dict[str, Encoded] = {}
        answers: dict[str, tuple[Answer, ...]] = {}
        for name in (name for name in PROMPTS if name not in row.unread):
            with _noted(table.place(row, name), faults):
                values[name] = _prompt(cells[name])
                prompts[name] = self.encoder.encode(values[name])
        for name in (name for name in PROMPTS if f"{name}_answer" not in row.unread):
            column = f"{name}_answer"
            read = self._answers(table, row, column, prompts.get(name), faults)
            answers[name] = tuple(answer for answer in read if isinstance(answer, Answer))
            given = tuple(it.given if isinstance(it, Answer) else it for it in read)
            one = listed_answers(cells[column]) is None
            values[column] = given[0] if one and given else given
        if not faults and not row.unread:
            faults += self._alike(table, row, answers)
        spans = self._spans(table, row, prompts, faults)
        if faults or row.unread:
            return faults
        return Read(row, TextPair(**values), prompts, answers, spans)

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

    def _answers(
        self, table: Table, row: Row, column: str, prompt: Encoded | None, faults: list[Fault]
    ) -> list[Answer | str | int]:
        """Read an answer, or each of a set; without its prompt nobody knows its tokens."""
        value = row.values[COLUMNS.index(column)]
        items, where = listed_answers(value), table.place(row, column)
        read: list[Answer | str | int] = []
        with _noted(where, faults):
            if items is not None and not items:
                raise UnusableError(TokensError, f"must be a non-empty list, got {shown(value)}")
            if items is not None and self.several == "all":
                raise UnusableError(
                    TokensError, f"multi_token='all' takes one answer a prompt, got {shown(value)}"
                )
            for number, item in enumerate([value] if items is None else items):
                with _noted(where if items is None else f"{where}, answer {number}", faults):
                    answer = _answer(item, self._kind(column))
                    read.append(answer if prompt is None else self._answer(prompt, answer))
        return read

    def _answer(self, prompt: Encoded, answer: str | int) -> Answer:
        return read_answer(self.encoder, prompt, answer, space=self.space, several=self.several)

    def _kind(self, column: str) -> str:
        return "ids" if column in self.ids else "texts" if column in self.texts else ""

    def _alike(
        self, table: Table, row: Row, answers: Mapping[str, Sequence[Answer]]
    ) -> Iterator[Fault]:
        """Find two answers of a row that cannot be told apart."""
        seen: dict[tuple[int, ...], tuple[Answer, str]] = {}
        for name in PROMPTS:
            for answer in answers[name]:
                other, its = seen.setdefault(answer.tokens, (answer, name))
                if other is not answer:
                    share = "are the same tokens" if self.several == "all" else _BEGIN
                    # The target's are compared with the source's.
                    column = f"{name if name == its else 'source'}_answer"
                    message = f"answers {other.given!r} and {answer.given!r} {share}"
                    yield Fault(table.place(row, column), message, AnswerError)
                    return

    def _warn_of_answers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once which answers were not taken as they were spelled."""
        spaced = _where(table, kept, lambda answer: answer.spaced)
        if spaced is not None:
            where, answer, prompt = spaced
            warn(
                "answers without their space were joined to their prompts by one: "
                f"{answer.given!r} follows {_tail(prompt.text)!r} as {answer.spelled!r} ({where}). "
                "Spell them with their space to silence this, or pass space=False to join them as "
                "they are",
                AnswerWarning,
            )
        cut = _where(table, kept, lambda answer: answer.cut)
        if cut is not None:
            where, answer, _ = cut
            first = self.encoder.pieces([answer.token])[0]
            warn(f"{FIRST}: {first!r} of {answer.spelled!r} ({where})", AnswerWarning)

    def _warn_of_first_tokens(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once which answers, of which all tokens are kept, begin with one token."""
        alike = [
            read for read in kept if len({read.answers[name][0].token for name in PROMPTS}) < 2
        ]
        if alike:
            both = " and ".join(repr(alike[0].answers[name][0].given) for name in PROMPTS)
            where = table.places("source_answer", [read.row for read in alike])
            warn(
                f"answers {both} {_BEGIN} ({where}): only metrics of all their tokens tell them "
                "apart, and no metric of one token, such as the logit difference",
                AnswerWarning,
            )

    def _warn_of_integers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once that a table's integers are ids: pandas makes them of digits unasked."""
        texts = [name for name in PROMPTS if f"{name}_answer" not in self.ids]
        ids = _where(table, kept, lambda answer: answer.spelled is None, texts)
        if table.kind == "pair" or ids is None:
            return
        places, answer, _ = ids
        warn(
            f"integers were taken as token ids: {answer.token} is the token "
            f"{self.encoder.pieces([answer.token])[0]!r} ({places}). answers='ids' says so and "
            "silences this; answers='texts' takes them as texts of digits, which "
            "pandas.read_csv(path, dtype=str) keeps as they stand in a file",
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
) -> tuple[str, Answer, Encoded] | None:
    """Find where the answers stand that something concerns, the first of them, and its prompt."""
    concerned = {
        name: [read for read in kept if any(map(concerns, read.answers[name]))] for name in prompts
    }
    rows = {f"{name}_answer": [read.row for read in reads] for name, reads in concerned.items()}
    for name, reads in concerned.items():
        for read in reads[:1]:
            answer = next(filter(concerns, read.answers[name]))
            return joined_places(table, rows), answer, read.prompts[name]
    return None


def _tail(text: str) -> str:
    return text if len(text) <= _TAIL else f"…{text[-_TAIL:]}"


def encoded_prompt(encoder: Encoder, cell: Any) -> Encoded:
    """A prompt of a table, cut into tokens.

    Raises:
        UnusableError: it is none, or the template refuses it.
    """
    if isinstance(cell, Bad):
        raise UnusableError(TokensError, cell.message, cell.advice)
    return encoder.encode(_prompt(read_prompt(cell)))


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


def _answer(value: Any, kind: str) -> str | int:
    """Read one answer; `kind` says of digits that they are `"ids"`, or of integers `"texts"`."""
    if isinstance(value, str) and kind != "ids":
        if not value:
            raise UnusableError(TokensError, "must be a non-empty text or a token id, got ''")
        return value
    if isinstance(value, str):
        digits = value.strip()
        if digits.isascii() and digits.isdigit():
            return int(digits)
        raise UnusableError(AnswerError, f"must be a token id, got {shown(value)}")
    try:
        number = strict_int(value, "an answer", TokensError)
    except PatchingError:
        got = f"{shown(value)} ({type(value).__name__})"
        raise UnusableError(
            TokensError, f"must be a non-empty text or a token id, got {got}"
        ) from None
    return str(number) if kind == "texts" else number
