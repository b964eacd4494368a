"""From the rows of a table to tokens and answers: every fault is found before one is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from nnpatch_core._integers import strict_int
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
from nnpatch_core.prompts.turns import warn_of_ended_turns, warn_of_texts_in_chat

_RUNS = ("source", "target")
#: Letters of a prompt that a warning shows.
_TAIL = 60


@attrs.frozen
class Read:
    """A row that can be used: its prompts and answers by run."""

    row: Row
    pair: TextPair
    prompts: Mapping[str, Encoded]
    answers: Mapping[str, Answer]


@attrs.frozen
class Reader:
    """How rows are read.

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
        """The rows that can be used, and those left out, each with the reason.

        Raises:
            PatchingError: rows are faulty and not to be left out, or none is left.

        Warns:
            AnswerWarning: answers were joined by a space, or cut to their first token; integers of
                a DataFrame were taken as token ids.
            PromptWarning: pairs or the tokenizer's end tokens were left out; texts were rendered
                by the chat template already, or end a turn and open none.
        """
        kept, faulty, dropped = [], [], []
        for row in table.rows:
            found = self._row(table, row)
            if isinstance(found, Read):
                kept.append(found)
            else:
                faulty.append(found)
                dropped.append((row.pair, "; ".join(map(str, found))))
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
        self._warn_of_turns(table, kept)
        return kept, dropped

    def _row(self, table: Table, row: Row) -> Read | list[Fault]:
        """A row's prompts and answers, or all that is wrong with them."""
        if row.faults:
            return list(row.faults)
        given = dict(zip(COLUMNS, row.values, strict=True))
        faults: list[Fault] = []
        values: dict[str, Any] = {}
        prompts: dict[str, Encoded] = {}
        answers: dict[str, Answer] = {}
        for run in _RUNS:
            with _noted(table.place(row, run), faults):
                values[run] = _prompt(given[run])
                prompts[run] = self.encoder.encode(values[run])
        for run in _RUNS:
            column = f"{run}_answer"
            with _noted(table.place(row, column), faults):
                values[column] = _answer(given[column], column in self.ids)
                # Without its prompt nobody knows its tokens.
                if run in prompts:
                    answers[run] = read_answer(
                        self.encoder,
                        prompts[run],
                        values[column],
                        space=self.space,
                        first=self.first,
                    )
        if not faults and answers["source"].token == answers["target"].token:
            shown = " and ".join(repr(values[f"{run}_answer"]) for run in _RUNS)
            message = f"answers {shown} begin with one token"
            faults.append(Fault(table.place(row, "source_answer"), message, AnswerError))
        if faults:
            return faults
        return Read(row, TextPair(**values), prompts, answers)

    def _warn_of_answers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once which answers were not taken as they were spelled."""
        spaced = _where(table, kept, lambda answer: answer.spaced)
        if spaced is not None:
            where, read, run = spaced
            given, text = getattr(read.pair, f"{run}_answer"), _tail(read.prompts[run].text)
            warn(
                f"answers without their space were joined to their prompts by one: {given!r} "
                f"follows {text!r} as {read.answers[run].spelled!r} ({where}). Spell them with "
                "their space to silence this, or pass space=False to join them as they are",
                AnswerWarning,
            )
        cut = _where(table, kept, lambda answer: answer.cut)
        if cut is not None:
            where, read, run = cut
            first = self.encoder.pieces([read.answers[run].token])[0]
            warn(f"{FIRST}: {first!r} of {read.answers[run].spelled!r} ({where})", AnswerWarning)

    def _warn_of_integers(self, table: Table, kept: Sequence[Read]) -> None:
        """Say once that a DataFrame's integers are ids: pandas makes them of digits unasked."""
        texts = [run for run in _RUNS if f"{run}_answer" not in self.ids]
        found = {
            f"{run}_answer": [read for read in kept if read.answers[run].spelled is None]
            for run in texts
        }
        first = next(((name, reads[0]) for name, reads in found.items() if reads), None)
        if table.kind != "row" or first is None:
            return
        name, read = first
        given = getattr(read.pair, name)
        places = joined_places(table, {name: [r.row for r in each] for name, each in found.items()})
        warn(
            f"integers were taken as token ids: {given} is the token "
            f"{self.encoder.pieces([given])[0]!r} ({places}). answers='ids' says so and silences "
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

    def _warn_of_turns(self, table: Table, kept: Sequence[Read]) -> None:
        prompts = {run: [(read.row, getattr(read.pair, run)) for read in kept] for run in _RUNS}
        texts = {
            run: [(row, text) for row, text in each if isinstance(text, str)]
            for run, each in prompts.items()
        }
        tell = warn_of_texts_in_chat if self.encoder.chat else warn_of_ended_turns
        tell(self.encoder, table, texts)


@contextmanager
def _noted(place: str, faults: list[Fault]) -> Iterator[None]:
    """Note what cannot be used, and go on with the rest of the row."""
    try:
        yield
    except UnusableError as error:
        faults.append(Fault(place, error.message, error.error, error.advice))


def _where(
    table: Table, kept: Iterable[Read], concerns: Callable[[Answer], bool]
) -> tuple[str, Read, str] | None:
    """Where the answers stand that something concerns, and the first of them."""
    found = {run: [read for read in kept if concerns(read.answers[run])] for run in _RUNS}
    rows = {f"{run}_answer": [read.row for read in reads] for run, reads in found.items()}
    for run, reads in found.items():
        if reads:
            return joined_places(table, rows), reads[0], run
    return None


def _tail(text: str) -> str:
    return text if len(text) <= _TAIL else f"…{text[-_TAIL:]}"


def _prompt(given: Any) -> Prompt:
    if isinstance(given, str):
        if not given:
            raise UnusableError(TokensError, "must be a non-empty text, got ''")
        return given
    return _messages(given)


def is_messages(given: Any) -> bool:
    """Whether a prompt is meant as the messages of a chat."""
    sequence = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    return sequence and len(given) > 0 and all(isinstance(each, Mapping) for each in given)


def _messages(given: Any) -> Prompt:
    if not is_messages(given):
        raise UnusableError(
            TokensError, f"must be a non-empty text, or a list of messages, got {given!r}"
        )
    for message in given:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise UnusableError(
                TokensError, f"a message needs a 'role' and a 'content', got {dict(message)!r}"
            )
    return tuple(dict(message) for message in given)


def _answer(given: Any, ids: bool) -> str | int:
    if isinstance(given, str) and not ids:
        if not given:
            raise UnusableError(TokensError, "must be a non-empty text or a token id, got ''")
        return given
    if isinstance(given, str):
        digits = given.strip()
        if digits.isascii() and digits.isdigit():
            return int(digits)
        raise UnusableError(AnswerError, f"must be a token id, got {given!r}")
    try:
        return strict_int(given, "an answer", TokensError)
    except PatchingError:
        kind = f"{given!r} ({type(given).__name__})"
        raise UnusableError(
            TokensError, f"must be a non-empty text or a token id, got {kind}"
        ) from None
