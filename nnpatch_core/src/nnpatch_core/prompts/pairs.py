"""Prompt pairs, tokenised: everything that `activation_patching` takes about its prompts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from nnpatch_core import _html
from nnpatch_core._arguments import check_flags
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError, UnknownNameError
from nnpatch_core.prompts.encoding import is_tokenizer, make_encoder
from nnpatch_core.prompts.reading import Reader, is_messages
from nnpatch_core.prompts.rows import COLUMNS, PROMPTS, Prompt, Table, TextPair, joined_places
from nnpatch_core.prompts.subsets import grouped, numbers_of, without_padding
from nnpatch_core.prompts.tables import from_file, from_frame, from_lists
from nnpatch_core.seq_pos import PromptBatch, Span

MultiToken = Literal["raise", "first", "drop"]
#: How many pairs a notebook shows.
_SHOWN = 5
#: Options of `pandas.read_csv` about how a file is written.
_OF_PANDAS = ("delimiter", "encoding", "quotechar", "sep", "skiprows")
_CHOICES = {
    "answers": ("auto", "ids"),
    "multi_token": ("raise", "first", "drop"),
    "faulty": ("raise", "drop"),
}


@attrs.frozen(eq=False, repr=False)
class PromptPairs:
    """Tokenised prompt pairs: everything `activation_patching` takes about its prompts.

    Make them with `from_texts`, `from_dataframe` or `from_csv`, and pass them on, in place of the
    tokens, as `activation_patching(nnmodel, api, sites, pairs)`.

    Args:
        pairs: the texts that were tokenised, as they were given.
        dropped: the pairs left out, each with the reason.
        source_tokens, target_tokens: `[batch, seq]`, int64, left-padded to one width.
        source_attention_mask, target_attention_mask: `[batch, seq]`, 1 for a token.
        source_answer_index, target_answer_index: `[batch]`.
        tokenizer: what made them.
        spans: parts of the prompts by name, as tokens of the left-padded batch.
        columns: the further columns of the table, by your names: one value for each pair.
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
    spans: Mapping[str, Span] = attrs.field(factory=dict)
    columns: Mapping[Any, tuple[Any, ...]] = attrs.field(factory=dict)

    @classmethod
    def from_texts(
        cls,
        source: Sequence[Prompt],
        target: Sequence[Prompt],
        source_answers: Sequence[str | int],
        target_answers: Sequence[str | int],
        tokenizer: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        answers: Literal["auto", "ids"] = "auto",
        space: bool = True,
        multi_token: MultiToken = "raise",
        faulty: Literal["raise", "drop"] = "raise",
        extra: Mapping[str, Sequence[Any]] | None = None,
    ) -> PromptPairs:
        """Tokenise prompt pairs.

        A tokenizer's opening tokens, such as Llama's beginning of sequence, are put in front of a
        prompt that does not begin with them; a chat template writes its own. An end token that the
        tokenizer would add is left out, so that the answer is read after the prompt.

        Args:
            source: the source prompts: texts, or lists of messages such as
                `[{"role": "user", "content": "Hi"}]`. The answer opens the assistant's next turn,
                or, where the last message is the assistant's, goes on with it.
            target: the target prompts, one for each.
            source_answers: how each source prompt goes on, as a text, or as a token id.
            target_answers: the same for the target prompts.
            tokenizer: a Hugging Face tokenizer.
            chat: put each text as a user's message into the tokenizer's chat template, followed
                by the beginning of the assistant's turn.
            system: a system message for the chat template, before each text. Messages have one
                of their own.
            chat_template_kwargs: options of the chat template, such as
                `{"enable_thinking": False}`.
            answers: `"auto"`: integers are token ids, and texts are texts, digits too; `"ids"`:
                digits are ids. Of a table whose column is called `*_idx` they always are.
            space: join an answer to its prompt by a space, unless the prompt ends with or the
                answer begins with white space, or it opens a turn. False joins them as they are.
            multi_token: what to do about an answer of several tokens: `"raise"`, take the
                `"first"` one, or `"drop"` the pair, as `faulty` does.
            faulty: what to do about pairs that cannot be used: `"raise"` one error that lists
                them, or `"drop"` them (`dropped` has them, with the reasons).
            extra: more about the pairs, such as `{"template": ["ABBA", "BABA"]}`, with one value
                for each; `columns` has it, and `groups` splits by it.

        Raises:
            TokensError: lists of different lengths, no pairs, a prompt without tokens, one that
                the chat template refuses, options that mean nothing, as `system` does to messages.
            AnswerError: answers that are not one token after their prompts, or that two answers of
                a pair are the same token.

        Warns:
            AnswerWarning: answers were joined by a space, or cut to their first token.
            PromptWarning: pairs or end tokens were left out; an option that the chat template does
                not read; with `chat`, texts that a template rendered already; without, texts that
                end a turn of the chat template and open none.

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
        return cls._of(
            from_lists((source, target, source_answers, target_answers), extra),
            tokenizer,
            chat=chat,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
            answers=answers,
            space=space,
            multi_token=multi_token,
            faulty=faulty,
        )

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
            frame: has the columns `source`, `target`, `source_answer` and `target_answer`; all
                others come along, as `columns`. A prompt that is JSON of messages,
                `[{"role": "user", "content": "Hi"}]`, is read as messages.
            tokenizer: a Hugging Face tokenizer.
            columns: other names for them, such as `{"source": "clean"}`.
            options: as for `from_texts`.

        Raises:
            TokensError: a column is missing or stands twice, or one is read as two.
            TypeError: an option that there is not.
            PatchingError: as for `from_texts`; a faulty row is named by its label in the index (and
                by its position, where labels stand twice) and by your name of the column.

        Warns:
            AnswerWarning: as for `from_texts`; integers in a column that is not called `*_idx`
                were taken as token ids, without `answers="ids"`.
            PromptWarning: as for `from_texts`; further columns have one name, and were left out.
        """
        _check_call("from_dataframe", "frame", frame, tokenizer, options)
        return cls._of(from_frame(frame, columns), tokenizer, **options)

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
            TokensError: the file cannot be read as one, as where its fields are separated by
                something else than commas; a column is missing or stands twice, or one is read as
                two.
            TypeError: an option that there is not; it is refused before the file is read.
            PatchingError: as for `from_texts`; a faulty row is named by the line that it begins
                in, of which the header is line 1, and by your name of the column.
        """
        _check_call("from_csv", "path", path, tokenizer, options)
        return cls._of(from_file(path, columns), tokenizer, **options)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        dropped = f", {len(self.dropped)} dropped" if self.dropped else ""
        pairs = "pair" if len(self) == 1 else "pairs"
        return f"PromptPairs({len(self)} {pairs} of {self.source_tokens.shape[1]} tokens{dropped})"

    def _repr_html_(self) -> str:
        rows = [[repr(text) for text in attrs.astuple(pair)] for pair in self.pairs[:_SHOWN]]
        left = len(self) - len(rows)
        return _html.block(
            _html.heading(repr(self)),
            _html.table(COLUMNS, rows),
            _html.heading(f"and {left} more") if left else "",
        )

    def arguments(self) -> dict[str, Any]:
        """The arguments of `activation_patching`, by keyword."""
        left_out = ("pairs", "dropped", "columns")
        return {
            field.name: getattr(self, field.name)
            for field in attrs.fields(type(self))
            if field.name not in left_out
        }

    def ablation_arguments(self) -> dict[str, Any]:
        """The arguments of `ablation_patching`, by keyword: it runs the source prompts."""
        return {
            "tokens": self.source_tokens,
            "attention_mask": self.source_attention_mask,
            "answer_index": self.source_answer_index,
            "other_answer_index": self.target_answer_index,
            "tokenizer": self.tokenizer,
            "spans": {name: Span(each.source, each.source) for name, each in self.spans.items()},
        }

    @property
    def batch(self) -> PromptBatch:
        """The prompts as position strategies see them."""
        return PromptBatch(
            Batch(self.target_tokens, self.target_attention_mask),
            Batch(self.source_tokens, self.source_attention_mask),
            self.spans,
        )

    def swapped(self) -> PromptPairs:
        """Source and target exchanged: noising instead of denoising."""
        return attrs.evolve(
            self,
            pairs=tuple(
                TextPair(pair.target, pair.source, pair.target_answer, pair.source_answer)
                for pair in self.pairs
            ),
            source_tokens=self.target_tokens,
            target_tokens=self.source_tokens,
            source_attention_mask=self.target_attention_mask,
            target_attention_mask=self.source_attention_mask,
            source_answer_index=self.target_answer_index,
            target_answer_index=self.source_answer_index,
            spans={name: span.swapped() for name, span in self.spans.items()},
        )

    def groups(self, name: str) -> dict[Any, PromptPairs]:
        """Split the pairs by a column: for each value those that have it, by first appearance.

        Each group is padded to its own width, so that it is what its prompts alone would be. None
        is the group of the pairs whose value is missing (None, nan, pandas' NA). Pairs that were
        dropped are in no group.

        Args:
            name: your name of the column.

        Raises:
            UnknownNameError: there is no such column.
            TokensError: its values make no groups, as lists do not.

        Examples:
            >>> from nnpatch_core.testing import tiny_tokenizer
            >>> prompts = ["The capital of France is", "Japan has the capital"]
            >>> pairs = PromptPairs.from_texts(
            ...     prompts,
            ...     ["The capital of Italy is", "Spain has the capital"],
            ...     [" Paris", " Tokyo"],
            ...     [" Rome", " Madrid"],
            ...     tiny_tokenizer([*prompts, "Italy Spain Paris Tokyo Rome Madrid"]),
            ...     extra={"template": ["is", "has"]},
            ... )
            >>> pairs.groups("template")
            {'is': PromptPairs(1 pair of 5 tokens), 'has': PromptPairs(1 pair of 4 tokens)}
        """
        return {
            value: self._picked(numbers) for value, numbers in grouped(self.columns, name).items()
        }

    def __getitem__(self, picked: Any) -> PromptPairs:
        """Some of the pairs, padded to their own width; `dropped` stays behind.

        Args:
            picked: a number, a slice, a list of numbers, or true or false for each pair.

        Raises:
            IndexError: a number that no pair has.
            TokensError: what is picked is no number, or nothing.
        """
        return self._picked(numbers_of(picked, len(self)))

    def _picked(self, numbers: list[int]) -> PromptPairs:
        tokens = self.source_tokens[numbers], self.target_tokens[numbers]
        masks = self.source_attention_mask[numbers], self.target_attention_mask[numbers]
        source, target, source_mask, target_mask = without_padding(tokens, masks)
        taken, index = self.source_tokens.shape[1] - source.shape[1], torch.tensor(numbers)
        return attrs.evolve(
            self,
            pairs=tuple(self.pairs[number] for number in numbers),
            dropped=(),
            source_tokens=source,
            target_tokens=target,
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            source_answer_index=self.source_answer_index[numbers],
            target_answer_index=self.target_answer_index[numbers],
            spans={name: span.rows(index).moved(-taken) for name, span in self.spans.items()},
            columns={
                name: tuple(values[number] for number in numbers)
                for name, values in self.columns.items()
            },
        )

    @classmethod
    def _of(
        cls,
        table: Table,
        tokenizer: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        answers: str = "auto",
        space: bool = True,
        multi_token: str = "raise",
        faulty: str = "raise",
    ) -> PromptPairs:
        check_flags(chat=chat, space=space)
        chosen = {"answers": answers, "multi_token": multi_token, "faulty": faulty}
        for name, value in chosen.items():
            if not isinstance(value, str) or value not in _CHOICES[name]:
                raise UnknownNameError(
                    f"unknown {name} {shown(value)}; there are {', '.join(_CHOICES[name])}"
                )
        messages = {
            name: [row for row in table.rows if is_messages(row.values[at])]
            for at, name in enumerate(PROMPTS)
        }
        encoder = make_encoder(
            tokenizer,
            chat=chat,
            system=system,
            options=chat_template_kwargs,
            messages=any(messages.values()),
        )
        if system is not None and any(messages.values()):
            raise TokensError(
                "system= is for prompts that are texts; messages have a system message of their "
                f"own: put it into them ({joined_places(table, messages)})"
            )
        names = zip(COLUMNS, table.names, strict=True)
        reader = Reader(
            encoder,
            ids=frozenset(
                name for name, own in names if answers == "ids" or str(own).endswith("_idx")
            ),
            space=space,
            first=multi_token == "first",
            drop=faulty == "drop" or multi_token == "drop",
        )
        kept, dropped = reader.read(table)
        prompts = [read.prompts[name].tokens for name in PROMPTS for read in kept]
        tokens, mask = _padded(prompts, getattr(tokenizer, "pad_token_id", None) or 0)
        n = len(kept)
        return cls(
            pairs=tuple(read.pair for read in kept),
            dropped=tuple(dropped),
            source_tokens=tokens[:n],
            target_tokens=tokens[n:],
            source_attention_mask=mask[:n],
            target_attention_mask=mask[n:],
            source_answer_index=torch.tensor(
                [read.answers["source"].token for read in kept], device="cpu"
            ),
            target_answer_index=torch.tensor(
                [read.answers["target"].token for read in kept], device="cpu"
            ),
            tokenizer=tokenizer,
            columns={name: tuple(read.row.others[name] for read in kept) for name in table.others},
        )


def _check_call(
    function: str, name: str, table: Any, tokenizer: Any, options: Mapping[str, Any]
) -> None:
    """Raise for a table and a tokenizer that changed places, and for unknown options."""
    if is_tokenizer(table) and not is_tokenizer(tokenizer):
        raise TokensError(
            f"{function}({name}, tokenizer) takes the tokenizer second, and got it first"
        )
    parameters = inspect.signature(PromptPairs.from_texts).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    # A table's further columns come along by themselves.
    names.remove("extra")
    for option in options:
        if option in names:
            continue
        hint = ""
        like = get_close_matches(option, [*names, "columns"], n=1)
        if function == "from_csv" and option in _OF_PANDAS:
            hint = (
                "; to read other files than UTF-8 with commas, use PromptPairs.from_dataframe("
                f"pandas.read_csv(path, {option}={shown(options[option])}, dtype=str), tokenizer)"
            )
        elif like:
            hint = f"; did you mean {like[0]!r}?"
        raise TypeError(f"{function}() got an unexpected keyword argument {option!r}{hint}")


def _padded(prompts: Sequence[Sequence[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left: tokens and mask, `[prompts, seq]`."""
    width = max(map(len, prompts))
    tokens = [[filler] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(tokens, device="cpu"), torch.tensor(mask, device="cpu")
