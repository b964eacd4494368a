"""Prompt pairs, tokenised: everything that `activation_patching` takes about its prompts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from nnpatch_core import _html
from nnpatch_core._arguments import listed
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError
from nnpatch_core.prompts.encoding import is_tokenizer
from nnpatch_core.prompts.files import raw_csv, raw_file, raw_json, raw_jsonl, raw_parquet
from nnpatch_core.prompts.keywords import AblationArguments, GivenSpans, PatchingArguments
from nnpatch_core.prompts.layouts import find_layout, with_own_spans
from nnpatch_core.prompts.making import tokenised
from nnpatch_core.prompts.rows import (
    COLUMNS,
    Answers,
    Prompt,
    Table,
    TextPair,
)
from nnpatch_core.prompts.subsets import (
    grouped,
    numbers_of,
    without_fill,
    without_padding,
)
from nnpatch_core.prompts.tables import (
    Raw,
    from_lists,
    raw_dataset,
    raw_frame,
    raw_rows,
    to_table,
)
from nnpatch_core.prompts.templates import TEMPLATE, check_used, fill_all, read_templates
from nnpatch_core.seq_pos import PromptBatch, Span

MultiToken = Literal["raise", "first", "drop", "all"]
Layout = Literal["counterfact", "greater-than"]
#: How many pairs a notebook shows.
_SHOWN = 5
#: Options of `pandas.read_csv` about how a file is written.
_OF_PANDAS = ("delimiter", "encoding", "quotechar", "sep", "skiprows")


@attrs.frozen(eq=False, repr=False)
class PromptPairs:
    """Tokenised prompt pairs: everything `activation_patching` takes about its prompts.

    Make them with `from_texts`, or off a table with `from_table` (or the reader of one kind, such
    as `from_csv`), and pass them on, in place of the tokens, as `activation_patching(nnmodel, api,
    sites, pairs)`.

    Args:
        pairs: the texts that were tokenised, as they were given.
        dropped: the pairs left out, each with the reason.
        source_tokens, target_tokens: `[batch, seq]`, int64, left-padded to one width.
        source_attention_mask, target_attention_mask: `[batch, seq]`, 1 for a token.
        source_answer_index, target_answer_index: `[batch]`, the first token of each answer; of a
            set of answers, of its first.
        tokenizer: what made them.
        spans: parts of the prompts by name, as tokens of the left-padded batch.
        columns: the further columns of the table, by your names: one value for each pair.
        source_answer_sets, target_answer_sets: `[batch, any]`, int64, the tokens of each pair's
            answers, behind them -1; None if no answer was given as a list.
        source_answer_tokens, target_answer_tokens: `[batch, n]`, int64, all tokens of each answer,
            behind them -1; None without `multi_token="all"`.
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
    source_answer_sets: Tensor | None = None
    target_answer_sets: Tensor | None = None
    source_answer_tokens: Tensor | None = None
    target_answer_tokens: Tensor | None = None
    # Whether they are a batch of several, whose means are compared together.
    _part: bool = attrs.field(default=False, kw_only=True)

    @classmethod
    def from_texts(
        cls,
        source: Sequence[Prompt],
        target: Sequence[Prompt],
        source_answers: Sequence[Answers],
        target_answers: Sequence[Answers],
        tokenizer: Any,
        *,
        chat: bool = False,
        system: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        answers: Literal["auto", "ids", "texts"] = "auto",
        space: bool = True,
        multi_token: MultiToken = "raise",
        faulty: Literal["raise", "drop"] = "raise",
        spans: Mapping[str, Any] | None = None,
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
            source_answers: how each source prompt goes on, as a text, or as a token id; or a list
                of either, a set of answers that count as one (`source_answer_sets` has them all).
            target_answers: the same for the target prompts.
            tokenizer: a Hugging Face tokenizer.
            chat: put each text as a user's message into the tokenizer's chat template, followed
                by the beginning of the assistant's turn.
            system: a system message for the chat template, before each text. Messages have one
                of their own.
            chat_template_kwargs: options of the chat template, such as
                `{"enable_thinking": False}`.
            answers: `"auto"`: integers are token ids, and texts are texts, digits too; `"ids"`:
                digits are ids, as they are in a table's column that is called `*_idx`; `"texts"`:
                integers are texts of digits, whatever the column is called.
            space: join an answer to its prompt by a space, unless the prompt ends with or the
                answer begins with white space, or it opens a turn. False joins them as they are.
            multi_token: what to do about an answer of several tokens: `"raise"`, take the
                `"first"` one, `"drop"` the pair, as `faulty` does, or keep `"all"` of them, as
                `source_answer_tokens`, for metrics of sequences.
            faulty: what to do about pairs that cannot be used: `"raise"` one error that lists
                them, or `"drop"` them (`dropped` has them, with the reasons).
            extra: more about the pairs, such as `{"template": ["ABBA", "BABA"]}`, with one value
                for each; `columns` has it, and `groups` splits by it.
            spans: parts of the prompts by name, for `seq_pos_type="spans"`: for each name one text
                for all pairs, or a list with a value for each. A value is a text that stands in
                both prompts, `(text, which)` where it stands several times (0 is the first place,
                -1 the last), `(start, stop)` letters, None where the pair lacks it, or two of
                these, for source and target. Of a table: the name of the column with the texts,
                `(column, which)`, or two of these. A token that a span covers in part belongs
                to it.

        Raises:
            TokensError: lists of different lengths, no pairs, a prompt without tokens, one that
                the chat template refuses, options that mean nothing, as `system` does to messages.
            AnswerError: answers that are not one token after their prompts, or that two answers of
                a pair are the same token (with `multi_token="all"`, the same tokens).

        Warns:
            AnswerWarning: answers were joined by a space, or cut to their first token; or they
                begin with one token, with `multi_token="all"`.
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
            spans=spans,
        )

    @classmethod
    def from_template(
        cls,
        template: str | Sequence[str],
        source_fills: Sequence[Mapping[str, str]],
        target_fills: Sequence[Mapping[str, str]],
        source_answers: Sequence[str | int],
        target_answers: Sequence[str | int],
        tokenizer: Any,
        *,
        extra: Mapping[str, Sequence[Any]] | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the prompts that a template gives; each filling is a span of its name.

        Args:
            template: a text with placeholders, as `"When {A} and {B} went to the {place}"`; or a
                list with one for each pair. A placeholder that stands twice has the spans `A[0]`
                and `A[1]`. The column `template` says which each pair has.
            source_fills: for each pair the texts of the source prompt, by placeholder.
            target_fills: the same of the target prompt.
            source_answers: how each source prompt goes on, as for `from_texts`.
            target_answers: the same for the target prompts.
            tokenizer: a Hugging Face tokenizer.
            extra: as for `from_texts`.
            options: as for `from_texts`, but `spans`.

        Raises:
            TokensError: a template that is none, a filling that is missing, empty or not used, or
                lists of different lengths.
            TypeError: an option that there is not.
            PatchingError: as for `from_texts`.

        Warns:
            PromptWarning: as for `from_texts`; a filling shares a token with the text around it.

        Examples:
            >>> from nnpatch_core import Spans
            >>> from nnpatch_core.testing import tiny_tokenizer
            >>> words = "Then , Mary Anne and Sue went home and gave a drink to"
            >>> pairs = PromptPairs.from_template(
            ...     "Then , {A} and {B} went home and {B} gave a drink to",
            ...     [{"A": "Mary Anne", "B": "Sue"}],
            ...     [{"A": "Sue", "B": "Anne"}],
            ...     [" Mary"],
            ...     [" Sue"],
            ...     tiny_tokenizer([words]),
            ... )
            >>> pairs
            PromptPairs(1 pair of 13 to 14 tokens)
            >>> {name: span.target.tolist() for name, span in pairs.spans.items()}
            {'A': [[3, 4]], 'B[0]': [[5, 6]], 'B[1]': [[9, 10]]}
        """
        if "spans" in options:
            raise TypeError(
                "from_template() takes no spans=: its placeholders are the spans. from_texts() "
                "takes texts and spans"
            )
        _check_options("from_template", options)
        fills = {"source_fills": listed(source_fills), "target_fills": listed(target_fills)}
        for name, given in fills.items():
            if given is None:
                raise TokensError(f"{name} must be a list of mappings, got {shown(given)}")
        count = len(fills["source_fills"] or ())
        if len(fills["target_fills"] or ()) != count:
            raise TokensError(
                f"source_fills and target_fills must be equally long, got {count} and "
                f"{len(fills['target_fills'] or ())}"
            )
        texts, templates = read_templates(template, count)
        filled = [fill_all(templates, given, name) for name, given in fills.items()]
        for name, given in fills.items():
            check_used(templates, given or (), name)
        every = dict.fromkeys(name for each in templates for name in each.names)
        spans = {
            name: [
                tuple(each.spans.get(name) for each in both) for both in zip(*filled, strict=True)
            ]
            for name in every
        }
        columns = (*([each.text for each in side] for side in filled), source_answers)
        return cls._of(
            from_lists((*columns, target_answers), {TEMPLATE: texts, **(extra or {})}),
            tokenizer,
            spans=spans,
            **options,
        )

    @classmethod
    def from_table(
        cls,
        table: Any,
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a table of any kind that there is a reader for.

        The columns are `source`, `target`, `source_answer` and `target_answer`. Where there is none
        of such a name, one that is called as people call it is taken, such as `clean`, `corrupted`,
        `answer` and `wrong_answer`; the page on prompts lists the names. All further columns come
        along, as `columns`. Objects inside of rows have columns such as `metadata.subject`.

        A prompt may be a list of messages, and an answer a list of answers; in a file without lists
        as JSON: `[{"role": "user", "content": "Hi"}]`, `["Paris", "Lyon"]`.

        Args:
            table: the path of a file that is called `*.csv`, `*.jsonl`, `*.json` or `*.parquet`, a
                DataFrame, a `datasets.Dataset`, or a list of mappings.
            tokenizer: a Hugging Face tokenizer.
            columns: your names of columns, such as `{"source": "question"}`; they come first.
            layout: a data set's own layout: `"counterfact"`, in which each fact is paired with the
                next one of the same sentence that has another answer; or `"greater-than"` (EAP-IG,
                MIB), in which a year makes two sets of answers, the tokens with which only later
                years begin, and those with which none does.
            options: as for `from_texts`.

        Raises:
            TokensError: it is no such table; a column is missing or stands twice, two may be one,
                or one is read as two.
            UnknownNameError: there is no such layout.
            TypeError: an option that there is not; it is refused before the table is read.
            PatchingError: as for `from_texts`; a faulty row is named by the line that it begins in
                (of a CSV file's header, 1), by its number from 0, or by its label in an index (and
                by its position, where labels stand twice), and by your name of the column.

        Warns:
            AnswerWarning: as for `from_texts`; integers in a column that is not called `*_idx`
                were taken as token ids, without `answers=`.
            PromptWarning: as for `from_texts`; further columns have one name, and were left out.

        Examples:
            >>> from nnpatch_core.testing import tiny_tokenizer
            >>> row = {
            ...     "clean": "The capital of France is",
            ...     "corrupted": "The capital of Japan is",
            ...     "answers": [" Paris", " Lyon"],
            ...     "wrong_answers": [" Tokyo"],
            ...     "kind": "capitals",
            ... }
            >>> words = tiny_tokenizer([*map(str, row.values()), " Paris Lyon Tokyo"])
            >>> pairs = PromptPairs.from_table([row], words)
            >>> pairs.columns
            {'kind': ('capitals',)}
            >>> [words.decode(answer) for answer in pairs.source_answer_sets[0]]
            [' Paris', ' Lyon']
        """
        found = "from_table", "table", _reader(table)
        return cls._read(found, table, tokenizer, columns, layout, options)

    @classmethod
    def from_dataframe(
        cls,
        frame: Any,
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a pandas or polars DataFrame; see `from_table`.

        Raises:
            PatchingError: as for `from_table`.
        """
        found = "from_dataframe", "frame", raw_frame
        return cls._read(found, frame, tokenizer, columns, layout, options)

    @classmethod
    def from_csv(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a CSV file (UTF-8, a header line); see `from_table`.

        Raises:
            TokensError: the file cannot be read as one, as where its fields are separated by
                something else than commas.
            PatchingError: as for `from_table`.
        """
        found = "from_csv", "path", raw_csv
        return cls._read(found, path, tokenizer, columns, layout, options)

    @classmethod
    def from_jsonl(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise a file with a JSON object in each line (UTF-8); see `from_table`.

        Raises:
            PatchingError: as for `from_table`; a line that is no object is a faulty row.
        """
        found = "from_jsonl", "path", raw_jsonl
        return cls._read(found, path, tokenizer, columns, layout, options)

    @classmethod
    def from_json(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise a JSON file (UTF-8), a list of objects or an object with one; see `from_table`.

        Raises:
            TokensError: the file cannot be read as one.
            PatchingError: as for `from_table`; a faulty item is named by its number from 0.
        """
        found = "from_json", "path", raw_json
        return cls._read(found, path, tokenizer, columns, layout, options)

    @classmethod
    def from_parquet(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a Parquet file; see `from_table`.

        Raises:
            TokensError: pyarrow is not installed (`pip install nnpatch-core[parquet]`), or the file
                cannot be read.
            PatchingError: as for `from_table`; a faulty row is named by its number from 0.
        """
        found = "from_parquet", "path", raw_parquet
        return cls._read(found, path, tokenizer, columns, layout, options)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise the rows of a `datasets.Dataset` of Hugging Face; see `from_table`.

        Raises:
            TokensError: it is none, but a stream or several splits.
            PatchingError: as for `from_table`; a faulty row is named by its number from 0.
        """
        found = "from_dataset", "dataset", raw_dataset
        return cls._read(found, dataset, tokenizer, columns, layout, options)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        *,
        columns: Mapping[str, str] | None = None,
        layout: Layout | None = None,
        **options: Any,
    ) -> PromptPairs:
        """Tokenise rows that are mappings, such as `{"clean": ..., "answer": ...}`.

        See `from_table`. All rows are read before the first is used.

        Raises:
            PatchingError: as for `from_table`; a faulty row is named by its number from 0.
        """
        found = "from_rows", "rows", raw_rows
        return cls._read(found, rows, tokenizer, columns, layout, options)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        dropped = f", {len(self.dropped)} dropped" if self.dropped else ""
        pairs = "pair" if len(self) == 1 else "pairs"
        masks = self.source_attention_mask, self.target_attention_mask
        ends = [int(end) for mask in masks for end in (mask.sum(1).min(), mask.sum(1).max())]
        sizes = " to ".join(map(str, dict.fromkeys((min(ends), max(ends)))))
        return f"PromptPairs({len(self)} {pairs} of {sizes} tokens{dropped})"

    def _repr_html_(self) -> str:
        rows = [[repr(text) for text in attrs.astuple(pair)] for pair in self.pairs[:_SHOWN]]
        left = len(self) - len(rows)
        return _html.block(
            _html.heading(repr(self)),
            _html.table(COLUMNS, rows),
            _html.heading(f"and {left} more") if left else "",
        )

    def arguments(self) -> PatchingArguments:
        """The arguments of `activation_patching`, by keyword; spans where there are some."""
        return {
            "source_tokens": self.source_tokens,
            "target_tokens": self.target_tokens,
            "source_attention_mask": self.source_attention_mask,
            "target_attention_mask": self.target_attention_mask,
            "source_answer_index": self.source_answer_index,
            "target_answer_index": self.target_answer_index,
            "tokenizer": self.tokenizer,
            **_given(self.spans),
        }

    def ablation_arguments(self) -> AblationArguments:
        """The arguments of `ablation_patching`, by keyword: it runs the source prompts."""
        spans = {name: Span(each.source, each.source) for name, each in self.spans.items()}
        return {
            "tokens": self.source_tokens,
            "attention_mask": self.source_attention_mask,
            "answer_index": self.source_answer_index,
            "other_answer_index": self.target_answer_index,
            "tokenizer": self.tokenizer,
            **_given(spans),
        }

    @property
    def metric_data(self) -> dict[str, Tensor]:
        """All answers, by the names under which metrics find them in `context.data`.

        `source_answers` and `target_answers` are the sets, `source_answer_tokens` and
        `target_answer_tokens` all tokens of each answer; what these pairs do not have is left out.
        A call that is given the pairs has it from them; with `arguments()` pass it as
        `metric_data=pairs.metric_data`.
        """
        known = {
            "source_answers": self.source_answer_sets,
            "target_answers": self.target_answer_sets,
            "source_answer_tokens": self.source_answer_tokens,
            "target_answer_tokens": self.target_answer_tokens,
        }
        return {name: ids for name, ids in known.items() if ids is not None}

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
            source_answer_sets=self.target_answer_sets,
            target_answer_sets=self.source_answer_sets,
            source_answer_tokens=self.target_answer_tokens,
            target_answer_tokens=self.source_answer_tokens,
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

    @property
    def is_part(self) -> bool:
        """Whether a sweep over several batches runs them, and compares means of all of these."""
        return self._part

    def as_part(self) -> PromptPairs:
        """The same pairs, as a batch of several."""
        return attrs.evolve(self, part=True)

    def batches(self, size: int) -> Iterator[PromptPairs]:
        """The pairs in their order, so many at a time, each batch at its own width.

        A sweep takes them in place of the pairs, one batch after the other.

        Args:
            size: the number of pairs of a batch; the last one may have fewer.

        Raises:
            TokensError: it is no number of pairs.
        """
        if strict_int(size, "the size of a batch", TokensError) < 1:
            raise TokensError(f"the size of a batch must be at least 1, got {size}")
        starts = range(0, len(self), size)
        return (self[start : start + size] for start in starts)

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
        taken, index = (
            self.source_tokens.shape[1] - source.shape[1],
            torch.tensor(numbers, device="cpu"),
        )
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
            source_answer_sets=without_fill(self.source_answer_sets, numbers),
            target_answer_sets=without_fill(self.target_answer_sets, numbers),
            source_answer_tokens=without_fill(self.source_answer_tokens, numbers),
            target_answer_tokens=without_fill(self.target_answer_tokens, numbers),
        )

    @classmethod
    def _read(
        cls,
        reader: tuple[str, str, Callable[[Any], Raw]],
        table: Any,
        tokenizer: Any,
        columns: Mapping[str, str] | None,
        layout: str | None,
        options: Mapping[str, Any],
    ) -> PromptPairs:
        """Read a table; `reader` is the function's name, its argument's, and what reads it."""
        function, name, read = reader
        _check_call(function, name, table, tokenizer, layout, options)
        made = with_own_spans(to_table(read(table), columns, layout, tokenizer), layout)
        return cls._of(made, tokenizer, **options)

    @classmethod
    def _of(cls, table: Table, tokenizer: Any, **options: Any) -> PromptPairs:
        return cls(**tokenised(table, tokenizer, **options))


def _given(spans: Mapping[str, Span]) -> GivenSpans:
    return {"spans": spans} if spans else {}


def _reader(table: Any) -> Callable[[Any], Raw]:
    """Find what reads a table, by its kind."""
    if isinstance(table, str | os.PathLike):
        return raw_file
    # The type is asked, for a frame that is not computed yet warns when it is.
    if hasattr(type(table), "columns"):
        return raw_frame
    return raw_dataset if hasattr(type(table), "column_names") else raw_rows


def _check_call(
    function: str,
    name: str,
    table: Any,
    tokenizer: Any,
    layout: str | None,
    options: Mapping[str, Any],
) -> None:
    """Raise for a table and a tokenizer that changed places, and for unknown options."""
    if is_tokenizer(table) and not is_tokenizer(tokenizer):
        raise TokensError(
            f"{function}({name}, tokenizer) takes the tokenizer second, and got it first"
        )
    _check_options(function, options)
    find_layout(layout)


def _check_options(function: str, options: Mapping[str, Any]) -> None:
    """Raise for unknown options of `from_texts`."""
    parameters = inspect.signature(PromptPairs.from_texts).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    # A table's further columns come along by themselves.
    names.remove("extra")
    for option in options:
        if option in names:
            continue
        hint = ""
        like = get_close_matches(option, [*names, "columns", "layout"], n=1)
        if function == "from_csv" and option in _OF_PANDAS:
            hint = (
                "; to read other files than UTF-8 with commas, use PromptPairs.from_dataframe("
                f"pandas.read_csv(path, {option}={shown(options[option])}, dtype=str), tokenizer)"
            )
        elif like:
            hint = f"; did you mean {like[0]!r}?"
        raise TypeError(f"{function}() got an unexpected keyword argument {option!r}{hint}")
