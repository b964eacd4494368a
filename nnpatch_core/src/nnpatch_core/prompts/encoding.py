"""Cuts prompts into tokens, apart from those that the tokenizer adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import PromptWarning, TokensError
from nnpatch_core.prompts.rows import Prompt, UnusableError

#: Options of `apply_chat_template` that decide on what comes out; here they are decided.
_DECIDED = (
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
#: Options of `apply_chat_template` itself, which a template need not mention.
_OWN = ("chat_template", "documents", "sanitize_control_tokens", "tools")


@attrs.frozen
class Encoded:
    """A prompt, cut into tokens.

    Args:
        text: as the tokenizer saw it.
        opening: ids of the special tokens that the tokenizer puts in front of it.
        ids: of the text.
        end: ids of the special tokens that the tokenizer would put behind it.
        answered: whether the text ends where an answer begins, as the opening of a turn does.
        own: the letters of the text that are the user's, and not a template's: the first one, and
            the one behind the last; None where that is not known.
    """

    text: str
    opening: tuple[int, ...]
    ids: tuple[int, ...]
    end: tuple[int, ...]
    answered: bool
    own: tuple[int, int] | None

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that are run."""
        return self.opening + self.ids


@attrs.frozen(slots=False)
class Encoder:
    """Turns prompts into tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat: whether a plain text is a user's message.
        system: a system message before it.
        options: of the chat template.
    """

    tokenizer: Any
    chat: bool
    system: str | None
    options: Mapping[str, Any]

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a text alone, without special tokens around it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableError(
                TokensError, f"{shown(text)} has half of a character at {error.start}"
            ) from error
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        return [str(self.tokenizer.decode([token])) for token in ids]

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that stand for no text, such as the one that opens a turn."""
        added = {*getattr(self.tokenizer, "added_tokens_decoder", ())}
        added.update(getattr(self.tokenizer, "all_special_ids", ()))
        return frozenset(added - {getattr(self.tokenizer, "unk_token_id", None)})

    @cached_property
    def vocab_size(self) -> int:
        """The number of token ids."""
        # An id may be left out, so that counting them is not enough.
        return max(len(self.tokenizer), 1 + max(map(int, self.tokenizer.get_vocab().values())))

    def encode(self, prompt: Prompt) -> Encoded:
        """Cut a prompt into tokens.

        Raises:
            UnusableError: the template refuses it, or nothing is left of it.
        """
        if isinstance(prompt, str) and not self.chat:
            return self._plain(prompt)
        if isinstance(prompt, str):
            opening = [] if self.system is None else [{"role": "system", "content": self.system}]
            messages: Sequence[Mapping[str, Any]] = [*opening, {"role": "user", "content": prompt}]
        else:
            messages = prompt
        prefilled = messages[-1]["role"] == "assistant"
        text = self._rendered(messages, prefilled)
        ids = self.ids(text)
        if not ids:
            raise UnusableError(TokensError, f"{shown(prompt)} has no tokens")
        begin = text.rfind(prompt) if isinstance(prompt, str) else -1
        # A template may write a message otherwise than it is.
        own = None if begin < 0 else (begin, begin + len(prompt))
        return Encoded(text, (), ids, (), not prefilled, own)

    def _plain(self, text: str) -> Encoded:
        ids, whole = self.ids(text), tuple(self.tokenizer(text)["input_ids"])
        if not ids:
            raise UnusableError(TokensError, f"{shown(text)} has no tokens")
        places = range(len(whole) - len(ids), -1, -1)
        start = next((at for at in places if whole[at : at + len(ids)] == ids), None)
        if start is None:
            raise UnusableError(
                TokensError,
                f"the tokenizer cuts {shown(text)} differently with its special tokens, into "
                f"{self.pieces(whole)}, than without, into {self.pieces(ids)}",
            )
        opening, end = whole[:start], whole[start + len(ids) :]
        # A text that was rendered by a chat template has its opening already.
        if ids[: len(opening)] == opening:
            opening = ()
        return Encoded(text, opening, ids, end, ids[-1] in self.special, (0, len(text)))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], prefilled: bool) -> str:
        if prefilled and not str(messages[-1]["content"] or "").strip():
            raise UnusableError(TokensError, "the assistant's message, which is to go on, is empty")
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                **self.options,
                tokenize=False,
                add_generation_prompt=not prefilled,
                continue_final_message=prefilled,
            )
        # Templates are programs of their own, and refuse in their own ways.
        except Exception as error:
            raise UnusableError(TokensError, f"the chat template refuses it: {error}") from error
        return str(text)


def is_tokenizer(value: Any) -> bool:
    """Whether a value can be used as a Hugging Face tokenizer."""
    return callable(value) and hasattr(value, "decode")


def make_encoder(
    tokenizer: Any,
    *,
    chat: bool,
    system: str | None,
    options: Mapping[str, Any] | None,
    messages: bool,
) -> Encoder:
    """Make an encoder, if its arguments go together.

    They are those of `Encoder`; `messages` is whether there are prompts that are messages.

    Raises:
        TokensError: they do not.
    """
    if not is_tokenizer(tokenizer):
        raise TokensError(f"tokenizer must be a Hugging Face tokenizer, got {shown(tokenizer)}")
    if system is not None:
        if not chat:
            raise TokensError(
                "system= means nothing without chat=True; messages have a system message of "
                "their own"
            )
        if not isinstance(system, str):
            raise TokensError(f"system must be a text, got {shown(system)}")
    if options is not None and not isinstance(options, Mapping):
        raise TokensError(f"chat_template_kwargs must be a mapping, got {shown(options)}")
    options = dict(options or {})
    if options and not (chat or messages):
        raise TokensError(
            "chat_template_kwargs= mean nothing without chat=True, or prompts that are messages"
        )
    for name in _DECIDED:
        if name in options:
            raise TokensError(f"chat_template_kwargs may not have {name!r}: it is decided here")
    if chat or messages:
        template = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
        if template is None:
            cause = "chat=True needs" if chat else "prompts that are messages need"
            raise TokensError(f"{cause} a tokenizer with a chat template, and this has none")
        unknown = [name for name in options if name not in _OWN and name not in str(template)]
        if unknown:
            warn(
                f"the chat template mentions no {unknown[0]!r}: chat_template_kwargs= that it "
                "does not read change nothing",
                PromptWarning,
            )
    return Encoder(tokenizer, chat, system, options)
