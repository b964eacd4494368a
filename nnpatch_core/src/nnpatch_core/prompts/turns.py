"""Recognises texts that a chat template rendered already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import attrs

from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning
from nnpatch_core.prompts.encoding import Encoder
from nnpatch_core.prompts.rows import Row, Table, joined_places

#: By the prompt's column, the rows whose prompt is a text, and the text.
Texts: TypeAlias = Mapping[str, Sequence[tuple[Row, str]]]
#: Stands for a message in a template; no template has it in its own text.
_CONTENT = "some-message-of-nnpatch"
_USER = {"role": "user", "content": _CONTENT}
_ASSISTANT = {"role": "assistant", "content": _CONTENT}


@attrs.frozen
class Turns:
    """The marks by which a chat template writes turns.

    Args:
        marks: the special tokens around a user's message.
        endings: texts that end a turn where another one would have to be opened, without the white
            space behind them.
        opening: the text that opens the assistant's turn, without the white space around it.
    """

    marks: frozenset[int]
    endings: tuple[str, ...]
    opening: str


def read_turns(encoder: Encoder) -> Turns | None:
    """Learn how the chat template writes turns; None without one that can be rendered."""
    closed = _rendered(encoder, [_USER], False)
    opened = _rendered(encoder, [_USER], True)
    if closed is None or opened is None:
        return None
    marks = {token for token in encoder.ids(closed) if _is_mark(encoder, token)}
    opening = opened[len(closed) :] if opened.startswith(closed) else _behind(opened)
    endings = []
    # Where nothing opens the assistant's turn, a message's end is where the answer begins.
    if opened != closed:
        both = _rendered(encoder, [_USER, _ASSISTANT], False)
        for text in (closed, both):
            ending = "" if text is None else _behind(text).rstrip()
            ids = encoder.ids(ending) if ending else ()
            if ids and _is_mark(encoder, ids[-1]):
                endings.append(ending.lstrip())
    return Turns(frozenset(marks), tuple(endings), opening.strip())


def warn_of_turns(encoder: Encoder, table: Table, texts: Texts) -> None:
    """Say once which texts a chat template rendered already, where that matters.

    With `chat` they are rendered once more; without, they may end a turn and open none.

    Args:
        encoder: tokenises.
        table: has the rows.
        texts: the prompts that are texts.

    Warns:
        PromptWarning: there are some.
    """
    turns = read_turns(encoder) if any(texts.values()) else None
    if turns is not None:
        tell = _warn_of_marks if encoder.chat else _warn_of_endings
        tell(turns, encoder, table, texts)


def _warn_of_marks(turns: Turns, encoder: Encoder, table: Table, texts: Texts) -> None:
    marks = {
        column: [(row, turns.marks.intersection(encoder.ids(text))) for row, text in pairs]
        for column, pairs in texts.items()
    }
    rows = {column: [row for row, its in pairs if its] for column, pairs in marks.items()}
    count = len({id(row) for marked in rows.values() for row in marked})
    if count:
        mark = min(mark for pairs in marks.values() for _, its in pairs for mark in its)
        kind = table.kind if len(table.rows) == 1 else f"{table.kind}s"
        hold = "holds" if count == 1 else "hold"
        warn(
            f"{count} of {len(table.rows)} {kind} {hold} {encoder.pieces([mark])[0]!r}, which the "
            f"chat template writes itself ({joined_places(table, rows)}): chat=True puts a text "
            "that was rendered already into the template once more. Leave out chat=True for "
            "rendered texts",
            PromptWarning,
        )


def _warn_of_endings(turns: Turns, encoder: Encoder, table: Table, texts: Texts) -> None:
    endings = {
        column: [(row, ending) for row, text in pairs if (ending := _ending(turns, text))]
        for column, pairs in texts.items()
    }
    if any(endings.values()):
        first = next(ending for pairs in endings.values() for _, ending in pairs)
        rows = {column: [row for row, _ in pairs] for column, pairs in endings.items()}
        warn(
            f"a prompt that ends with {first!r} ends a turn and opens none "
            f"({joined_places(table, rows)}), so that the answer is read where the next turn's "
            "opening belongs: render with add_generation_prompt=True, or with "
            "continue_final_message=True where the answer goes on with the last message",
            PromptWarning,
        )


def _ending(turns: Turns, text: str) -> str | None:
    """Find the end of a turn in which a text ends; None if it opens a turn, or ends in none."""
    end = text.rstrip()
    if turns.opening and end.endswith(turns.opening):
        return None
    return next((ending for ending in turns.endings if end.endswith(ending)), None)


def _rendered(encoder: Encoder, messages: Sequence[Mapping[str, str]], opened: bool) -> str | None:
    template = encoder.options.get("chat_template")
    if template is None and getattr(encoder.tokenizer, "chat_template", None) is None:
        return None
    try:
        text = encoder.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            **encoder.options,
            tokenize=False,
            add_generation_prompt=opened,
        )
    # Templates are programs of their own; one that refuses this says nothing about the prompts.
    except Exception:
        return None
    return text if isinstance(text, str) and _CONTENT in text else None


def _behind(text: str) -> str:
    """The text behind the last message."""
    return text.rpartition(_CONTENT)[2]


def _is_mark(encoder: Encoder, token: int) -> bool:
    # Some tokenizers add runs of white space as tokens of their own.
    return token in encoder.special and bool(encoder.pieces([token])[0].strip())
