"""From prompts in text to everything that `activation_patching` takes."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from nnpatch_core._warnings import warn
from nnpatch_core.errors import AnswerError, AnswerWarning, TokensError, UnknownNameError

COLUMNS = ("source", "target", "source_answer", "target_answer")
MultiToken = Literal["raise", "first", "drop"]
_MULTI_TOKEN = ("raise", "first", "drop")


@attrs.frozen
class TextPair:
    """A source and a target prompt, and the answer that each calls for, as text."""

    source: str
    target: str
    source_answer: str
    target_answer: str


@attrs.frozen(eq=False, repr=False)
class PromptPairs:
    """Tokenised prompt pairs: everything `activation_patching` takes about its prompts.

    Make them with `from_texts`, `from_dataframe` or `from_csv`, and pass them on as
    `activation_patching(nnmodel, api, sites, **pairs.arguments())`.

    Args:
        pairs: the texts that were tokenised.
        dropped: the pairs left out, each with the reason.
        source_tokens, target_tokens: `[batch, seq]`, int64, left-padded to one width.
        source_attention_mask, target_attention_mask: `[batch, seq]`, 1 for a token.
        source_answer_index, target_answer_index: `[batch]`.
        tokenizer: what made them.
    """

    pairs: tuple[TextPair, ...]
    dropped: tuple[tuple[TextPair, str], ...]
    source_tokens: Tensor
    target_tokens: Tensor
    source_attention_mask: Tensor
    target_attention_mask: Tensor
    source_answer_index: Tensor
    target_answer_index: Tensor
    tokenizer: Any

    @classmethod
    def from_texts(
        cls,
        source: Sequence[str],
        target: Sequence[str],
        source_answers: Sequence[str],
        target_answers: Sequence[str],
        tokenizer: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        multi_token: MultiToken = "raise",
    ) -> PromptPairs:
        """Tokenise prompt pairs.

        Args:
            source: the source prompts.
            target: the target prompts, one for each.
            source_answers: how each source prompt goes on, spelled as in running text: most
                tokenizers want `" Paris"`, with its space.
            target_answers: the same for the target prompts.
            tokenizer: a Hugging Face tokenizer.
            chat: put each prompt as a user's message into the tokenizer's chat template, followed
                by the beginning of the assistant's turn.
            system: a system message for the chat template.
            multi_token: what to do about an answer of several tokens: `"raise"`, take the
                `"first"` one, or `"drop"` the pair (`dropped` lists them).

        Raises:
            TokensError: lists of different lengths, no pairs, a prompt without tokens.
            AnswerError: answers that are not one token (all of them are listed), or that two
                answers of a pair are the same token.

        Examples:
            >>> from nnpatch_core.testing import tiny_tokenizer
            >>> prompts = ["The capital of France is", "The capital of Japan is"]
            >>> tokenizer = tiny_tokenizer([*prompts, " Paris Tokyo"])
            >>> pairs = PromptPairs.from_texts(
            ...     prompts[:1], prompts[1:], [" Paris"], [" Tokyo"], tokenizer
            ... )
            >>> pairs
            PromptPairs(1 pair of 5 tokens)
        """
        columns = (source, target, source_answers, target_answers)
        for name, column in zip(COLUMNS, columns, strict=True):
            if isinstance(column, str):
                raise TokensError(f"{name} must be a list of texts, got the text {column!r}")
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            named = ", ".join(f"{name} {n}" for name, n in zip(COLUMNS, lengths, strict=True))
            raise TokensError(f"the lists of texts must be equally long, got {named}")
        pairs = [TextPair(*texts) for texts in zip(*columns, strict=True)]
        return cls._of(pairs, tokenizer, chat=chat, system=system, multi_token=multi_token)

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a DataFrame.

        Args:
            frame: has the columns `source`, `target`, `source_answer` and `target_answer`.
            tokenizer: a Hugging Face tokenizer.
            columns: other names for them, such as `{"source": "clean"}`.
            options: as for `from_texts`.

        Raises:
            TokensError: a column is missing.
        """
        names = _columns(columns, list(frame.columns))
        source, target, source_answers, target_answers = (frame[name].tolist() for name in names)
        return cls.from_texts(source, target, source_answers, target_answers, tokenizer, **options)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a CSV file (UTF-8, a header line); see `from_dataframe`.

        Raises:
            TokensError: a column is missing.
        """
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            names = _columns(columns, list(reader.fieldnames or ()))
        for number, row in enumerate(rows):
            # Under None stand the fields that no column is for: a comma was not quoted.
            if None in row:
                raise TokensError(f"row {number} has more fields than there are columns: {row}")
        source, target, source_answers, target_answers = (
            [row[name] for row in rows] for name in names
        )
        return cls.from_texts(source, target, source_answers, target_answers, tokenizer, **options)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        dropped = f", {len(self.dropped)} dropped" if self.dropped else ""
        pairs = "pair" if len(self) == 1 else "pairs"
        return f"PromptPairs({len(self)} {pairs} of {self.source_tokens.shape[1]} tokens{dropped})"

    def arguments(self) -> dict[str, Any]:
        """What `activation_patching` takes, by keyword."""
        left_out = ("pairs", "dropped")
        return {
            field.name: getattr(self, field.name)
            for field in attrs.fields(type(self))
            if field.name not in left_out
        }

    def ablation_arguments(self) -> dict[str, Any]:
        """What `ablation_patching` takes, by keyword: it runs the source prompts."""
        return {
            "tokens": self.source_tokens,
            "attention_mask": self.source_attention_mask,
            "answer_index": self.source_answer_index,
            "other_answer_index": self.target_answer_index,
            "tokenizer": self.tokenizer,
        }

    def swapped(self) -> PromptPairs:
        """Source and target exchanged: noising instead of denoising."""
        return PromptPairs(
            pairs=tuple(
                TextPair(pair.target, pair.source, pair.target_answer, pair.source_answer)
                for pair in self.pairs
            ),
            dropped=self.dropped,
            source_tokens=self.target_tokens,
            target_tokens=self.source_tokens,
            source_attention_mask=self.target_attention_mask,
            target_attention_mask=self.source_attention_mask,
            source_answer_index=self.target_answer_index,
            target_answer_index=self.source_answer_index,
            tokenizer=self.tokenizer,
        )

    @classmethod
    def _of(
        cls,
        pairs: Iterable[TextPair],
        tokenizer: Any,
        *,
        chat: bool,
        system: str | None,
        multi_token: str,
    ) -> PromptPairs:
        if multi_token not in _MULTI_TOKEN:
            raise UnknownNameError(
                f"unknown multi_token {multi_token!r}; there are {', '.join(_MULTI_TOKEN)}"
            )
        if system is not None and not chat:
            raise TokensError("system= means nothing without chat=True")
        if chat and getattr(tokenizer, "chat_template", None) is None:
            raise TokensError("chat=True needs a tokenizer with a chat template, and this has none")
        kept, dropped, problems = [], [], []
        for number, pair in enumerate(pairs):
            _check_text(number, pair)
            problem = _answer_problem(pair, tokenizer, first=multi_token == "first")
            if problem is None:
                kept.append(pair)
            else:
                dropped.append((pair, problem))
                problems.append(f"pair {number}: {problem}")
        if problems and multi_token != "drop":
            raise AnswerError("; ".join(problems))
        if not kept:
            raise TokensError(
                "there are no prompt pairs" + (": all were dropped" if dropped else "")
            )
        if not chat:
            _warn_of_spaces(kept, tokenizer)
        prompts = [pair.source for pair in kept] + [pair.target for pair in kept]
        tokens, mask = _tokenise(prompts, tokenizer, chat, system)
        n = len(kept)
        return cls(
            pairs=tuple(kept),
            dropped=tuple(dropped),
            source_tokens=tokens[:n],
            target_tokens=tokens[n:],
            source_attention_mask=mask[:n],
            target_attention_mask=mask[n:],
            source_answer_index=_first_tokens([pair.source_answer for pair in kept], tokenizer),
            target_answer_index=_first_tokens([pair.target_answer for pair in kept], tokenizer),
            tokenizer=tokenizer,
        )


def _columns(renamed: Mapping[str, str] | None, present: list[Any]) -> list[str]:
    renamed = renamed or {}
    unknown = sorted(set(renamed) - set(COLUMNS))
    if unknown:
        raise TokensError(f"columns= renames {unknown[0]!r}; it may rename {', '.join(COLUMNS)}")
    names = [renamed.get(name, name) for name in COLUMNS]
    missing = [name for name in names if name not in present]
    if missing:
        raise TokensError(f"no column {missing[0]!r}; there are {', '.join(map(str, present))}")
    return names


def _check_text(number: int, pair: TextPair) -> None:
    for name, text in zip(COLUMNS, attrs.astuple(pair), strict=True):
        if not isinstance(text, str) or not text:
            raise TokensError(f"{name} of pair {number} must be a non-empty text, got {text!r}")


def _ids(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_tokens(answers: list[str], tokenizer: Any) -> Tensor:
    return torch.tensor([_ids(answer, tokenizer)[0] for answer in answers])


def _answer_problem(pair: TextPair, tokenizer: Any, first: bool) -> str | None:
    """Why the answers of a pair cannot be compared, if they cannot."""
    ids = {answer: _ids(answer, tokenizer) for answer in (pair.source_answer, pair.target_answer)}
    unknown = getattr(tokenizer, "unk_token_id", None)
    problems = []
    for answer, tokens in ids.items():
        if not tokens or tokens[0] == unknown:
            problems.append(f"answer {answer!r} is not in the tokenizer's vocabulary")
        elif len(tokens) > 1 and not first:
            pieces = [tokenizer.decode([token]) for token in tokens]
            problems.append(f"answer {answer!r} is {len(tokens)} tokens: {pieces}")
    if problems:
        return ", ".join(problems)
    if len({tokens[0] for tokens in ids.values()}) == 1:
        return f"answers {pair.source_answer!r} and {pair.target_answer!r} begin with one token"
    return None


def _warn_of_spaces(pairs: Iterable[TextPair], tokenizer: Any) -> None:
    """An answer without its space is often a token too, but not the one the model would give."""
    for pair in pairs:
        for prompt, answer in (
            (pair.source, pair.source_answer),
            (pair.target, pair.target_answer),
        ):
            if prompt[-1].isspace() or not answer[0].isalnum():
                continue
            spaced = _ids(f" {answer}", tokenizer)
            if len(spaced) == 1 and spaced != _ids(answer, tokenizer):
                warn(
                    f"answer {answer!r} follows {prompt!r} without a space; {f' {answer}'!r} is "
                    "one token too and probably what is meant",
                    AnswerWarning,
                )
                return


def _tokenise(
    prompts: list[str], tokenizer: Any, chat: bool, system: str | None
) -> tuple[Tensor, Tensor]:
    """Tokens and mask, `[prompts, seq]`, left-padded."""
    if chat:
        opening = [] if system is None else [{"role": "system", "content": system}]
        texts = [
            tokenizer.apply_chat_template(
                [*opening, {"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
        rows = [_ids(text, tokenizer) for text in texts]
    else:
        rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if not row:
            raise TokensError(f"prompt {prompt!r} has no tokens")
    width = max(map(len, rows))
    filler = tokenizer.pad_token_id or 0
    tokens = [[filler] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(tokens), torch.tensor(mask)
