"""From texts to everything that a sweep takes about its prompts, or a report of what is wrong."""

from __future__ import annotations

import csv
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core.errors import (
    AnswerError,
    AnswerWarning,
    PatchingError,
    PromptWarning,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.prompts import COLUMNS, TextPair
from nnpatch_core.testing import tiny_model, tiny_tokenizer

#: In the order of `COLUMNS`; the two prompts differ in length.
TEXTS = {
    "source": ["The capital of France is", "The old capital of Italy is"],
    "target": ["The capital of Japan is", "The old capital of Greece is"],
    "source_answer": [" Paris", " Rome"],
    "target_answer": [" Tokyo", " Athens"],
}
ALL_TEXTS = [text for texts in TEXTS.values() for text in texts]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT_WORDS = ["<user> The", "<system> Be brief.", "\n", "<assistant>", *ALL_TEXTS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer([*ALL_TEXTS, " New York Paris Rome New", "Paris", "\n"])


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    # As of a real model's, the token that opens the assistant's turn is never a part of a word.
    return tiny_tokenizer(
        CHAT_WORDS, chat_template=TEMPLATE, additional_special_tokens=["<assistant>"]
    )


def changed(**texts: Any) -> Any:
    return {**TEXTS, **texts}.values()


def decoded(tokens: torch.Tensor, mask: torch.Tensor, tokenizer: Any) -> Iterator[str]:
    """Each row's text, without its padding, which stands on the left."""
    for row, real in zip(tokens, mask.bool(), strict=True):
        padding = int((~real).sum())
        assert real[padding:].all()
        assert (row[:padding] == tokenizer.pad_token_id).all()
        yield "".join(tokenizer.convert_ids_to_tokens(row[padding:].tolist()))


def same(one: PromptPairs, other: PromptPairs) -> None:
    assert one.pairs == other.pairs
    expected: dict[str, Any] = {**other.arguments()}
    assert one.arguments().keys() == expected.keys()
    for name, value in one.arguments().items():
        if isinstance(value, torch.Tensor):
            assert value.equal(expected[name])


# Tokens -----------------------------------------------------------------------------------------


def test_from_texts(tokenizer: Any) -> None:
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    assert len(pairs) == 2
    assert repr(pairs) == "PromptPairs(2 pairs of 5 to 6 tokens)"
    assert pairs.dropped == ()
    assert pairs.pairs == tuple(TextPair(*texts) for texts in zip(*TEXTS.values(), strict=True))
    for run in ("source", "target"):
        tokens = getattr(pairs, f"{run}_tokens")
        mask = getattr(pairs, f"{run}_attention_mask")
        assert tokens.shape == mask.shape == (2, 6)
        assert tokens.dtype == mask.dtype == torch.int64
        # The shorter prompt is padded on the left, so that -1 is the last token of both.
        assert mask.tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]
        assert list(decoded(tokens, mask, tokenizer)) == TEXTS[run]
        answers = getattr(pairs, f"{run}_answer_index")
        assert answers.shape == (2,)
        assert answers.dtype == torch.int64
        assert [tokenizer.decode([answer]) for answer in answers] == TEXTS[f"{run}_answer"]


def test_source_and_target_have_one_width(tokenizer: Any) -> None:
    """The longest prompt of either run gives it."""
    pairs = PromptPairs.from_texts(
        ["The capital of France is"], ["The old capital of Greece is"], [" Paris"], [" Athens"],
        tokenizer,
    )  # fmt: skip
    assert pairs.source_attention_mask.tolist() == [[0, 1, 1, 1, 1, 1]]
    assert pairs.target_attention_mask.tolist() == [[1, 1, 1, 1, 1, 1]]


def test_other_sequences_than_lists(tokenizer: Any) -> None:
    same(
        PromptPairs.from_texts(*map(tuple, TEXTS.values()), tokenizer),
        PromptPairs.from_texts(*TEXTS.values(), tokenizer),
    )


def test_special_tokens_of_the_tokenizer_are_kept(tokenizer: Any) -> None:
    """A Llama's prompt begins with its BOS token, an answer does not."""
    with_bos = tiny_tokenizer(ALL_TEXTS)
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    pairs = PromptPairs.from_texts(*TEXTS.values(), with_bos)
    assert pairs.source_tokens[:, :2].tolist() == [[with_bos.pad_token_id, bos], [bos, 4]]
    assert bos not in pairs.source_answer_index


def test_tokenizer_without_a_padding_token() -> None:
    tokenizer = tiny_tokenizer(ALL_TEXTS)
    tokenizer.pad_token = None
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    assert pairs.source_attention_mask.tolist() == [[0, 1, 1, 1, 1, 1], [1] * 6]
    assert pairs.source_tokens.min() >= 0


def test_tokenizer_that_pads_and_truncates_by_itself(tokenizer: Any) -> None:
    """A tokenizer's own settings must neither cut a prompt nor count as its tokens."""
    eager = tiny_tokenizer(ALL_TEXTS)
    eager.backend_tokenizer.enable_padding(length=9)
    expected = PromptPairs.from_texts(*TEXTS.values(), tiny_tokenizer(ALL_TEXTS))
    same(PromptPairs.from_texts(*TEXTS.values(), eager), expected)


# Straight into a sweep --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")
def test_arguments_pass_straight_into_a_sweep(tokenizer: Any) -> None:
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    sites = Sites("resid", seq_pos_type="each")
    out = activation_patching(tiny_model(), None, sites, **pairs.arguments(), progress=False)
    assert out["resid"].shape == (3, 6)
    assert out["resid"][-1, -1] == pytest.approx(1)
    assert out.tokens[-2:] == (" France| Italy|…", " is")


def test_swapped(tokenizer: Any) -> None:
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    swapped = pairs.swapped()
    noising = PromptPairs.from_texts(
        TEXTS["target"], TEXTS["source"], TEXTS["target_answer"], TEXTS["source_answer"], tokenizer
    )
    same(swapped, noising)
    same(swapped.swapped(), pairs)
    assert swapped.tokenizer is tokenizer


def test_noising_is_denoising_the_other_way_round(tokenizer: Any) -> None:
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    model = tiny_model()
    runs = [
        activation_patching(model, None, Sites("resid"), **each.arguments(), progress=False)
        for each in (pairs, pairs.swapped())
    ]
    there, back = (run.baseline for run in runs)
    torch.testing.assert_close(there.source, -back.target)
    torch.testing.assert_close(there.target, -back.source)


# Answers ----------------------------------------------------------------------------------------


def test_answers_of_several_tokens_are_all_listed(tokenizer: Any) -> None:
    with pytest.raises(AnswerError) as caught:
        PromptPairs.from_texts(
            *changed(source_answer=[" New York", " Rome"], target_answer=[" Tokyo", " Rome New"]),
            tokenizer,
        )
    for part in (
        "pair 0: ",
        "' New York' is 2 tokens: [' New', ' York']",
        "pair 1: ",
        "' Rome New' is 2 tokens: [' Rome', ' New']",
    ):
        assert part in str(caught.value)


def test_both_answers_of_a_pair_are_listed(tokenizer: Any) -> None:
    """Whoever corrects the answers wants to see every one of them at once."""
    with pytest.raises(AnswerError) as caught:
        PromptPairs.from_texts(
            *changed(source_answer=[" New York", " Rome"], target_answer=[" York New", " Athens"]),
            tokenizer,
        )
    for answer in ("' New York'", "' York New'"):
        assert answer in str(caught.value)


def test_first_token_of_several(tokenizer: Any) -> None:
    with pytest.warns(AnswerWarning, match=r"' New' of ' New York' \(source_answer of pair 0\)"):
        pairs = PromptPairs.from_texts(
            *changed(source_answer=[" New York", " Rome"]), tokenizer, multi_token="first"
        )
    assert tokenizer.decode([pairs.source_answer_index[0]]) == " New"
    assert pairs.pairs[0].source_answer == " New York"
    assert pairs.dropped == ()


def test_drop_answers_of_several_tokens(tokenizer: Any) -> None:
    texts = list(changed(source_answer=[" New York", " Rome"]))
    with pytest.warns(PromptWarning, match="1 of 2 pairs was dropped\nsource_answer of pair 0: "):
        pairs = PromptPairs.from_texts(*texts, tokenizer, multi_token="drop")
    assert len(pairs) == 1
    assert repr(pairs) == "PromptPairs(1 pair of 6 tokens, 1 dropped)"
    ((pair, reason),) = pairs.dropped
    assert pair == TextPair(*(column[0] for column in texts))
    assert "' New York' is 2 tokens" in reason
    same(pairs, PromptPairs.from_texts(*(column[1:] for column in texts), tokenizer))
    # What was dropped is remembered when the runs are exchanged.
    assert len(pairs.swapped().dropped) == 1


def test_everything_dropped(tokenizer: Any) -> None:
    texts = changed(source_answer=[" New York", " New York"])
    with pytest.raises(TokensError, match=r"no prompt pairs.*dropped"):
        PromptPairs.from_texts(*texts, tokenizer, multi_token="drop")


@pytest.mark.parametrize("multi_token", ["raise", "first"])
@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        # Of the second one only the first token would count.
        ((" New", " New York"), ["' New'", "' New York'"]),
        ((" Rome", " Rome"), ["pair 0", "' Rome'", "one token"]),
        ((" Madrid", " Rome"), ["pair 0", "' Madrid'", "vocabulary"]),
        ((" Rome", " Madrid"), ["pair 0", "' Madrid'", "vocabulary"]),
    ],
)
def test_answers_that_cannot_be_compared(
    tokenizer: Any, multi_token: str, answers: tuple[str, str], parts: list[str]
) -> None:
    source, target = answers
    texts = changed(source_answer=[source, " Rome"], target_answer=[target, " Athens"])
    with pytest.raises(AnswerError) as caught:
        PromptPairs.from_texts(*texts, tokenizer, multi_token=multi_token)
    for part in parts:
        assert part in str(caught.value)
    assert "pair 1" not in str(caught.value)


@pytest.mark.parametrize("answers", [(" Rome", " Rome"), (" Madrid", " Rome")])
def test_answers_that_cannot_be_compared_are_dropped(
    tokenizer: Any, answers: tuple[str, str]
) -> None:
    source, target = answers
    texts = changed(source_answer=[source, " Rome"], target_answer=[target, " Athens"])
    with pytest.warns(PromptWarning, match="1 of 2 pairs was dropped"):
        pairs = PromptPairs.from_texts(*texts, tokenizer, multi_token="drop")
    assert [pair.source_answer for pair in pairs.pairs] == [" Rome"]
    assert source.strip() in pairs.dropped[0][1]


def test_answer_whose_later_token_is_unknown(tokenizer: Any) -> None:
    """ " New Madrid" begins with a known token, but it is not what the model would say."""
    texts = list(changed(source_answer=[" New Madrid", " Rome"]))
    with pytest.raises(AnswerError, match="' New Madrid'"):
        PromptPairs.from_texts(*texts, tokenizer)


def test_unknown_multi_token(tokenizer: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"'last'; there are raise, first, drop"):
        PromptPairs.from_texts(*TEXTS.values(), tokenizer, multi_token="last")


# Answers without their space --------------------------------------------------------------------


def test_answer_without_its_space_is_a_warning(tokenizer: Any) -> None:
    with pytest.warns(AnswerWarning, match=r"'Paris' follows .*France is'.*' Paris'") as caught:
        PromptPairs.from_texts(*changed(source_answer=["Paris", " Rome"]), tokenizer)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize(
    "texts",
    [
        {},
        # The prompt ends with white space.
        {"source": ["The capital of France is\n", "The old capital of Italy is"]},
    ],
)
def test_no_warning_where_the_space_is_in_its_place(texts: dict[Any, Any]) -> None:
    tokenizer = tiny_tokenizer([*ALL_TEXTS, "Paris", "The capital of France is\n"])
    answers = texts.get("source_answer", ["Paris" if "source" in texts else " Paris", " Rome"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptPairs.from_texts(*changed(**{**texts, "source_answer": answers}), tokenizer)


def _without_spaces() -> Any:
    """A tokenizer that drops whitespace, as some do."""
    tokenizer = tiny_tokenizer(["The", "Paris", "Rome"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_no_warning_where_the_space_makes_no_difference() -> None:
    pairs = PromptPairs.from_texts(["The"], ["The"], ["Paris"], ["Rome"], _without_spaces())
    assert pairs.source_answer_index.tolist() == [5]


# Chat templates ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "opening"), [(None, ""), ("Be brief.", "<system> Be brief.\n")], ids=["", "system"]
)
def test_chat(chat_tokenizer: Any, system: str | None, opening: str) -> None:
    # In a chat the answer opens the assistant's turn: it has no space, and that is no warning.
    texts = changed(source_answer=["<user>", " Rome"])
    pairs = PromptPairs.from_texts(*texts, chat_tokenizer, chat=True, system=system)
    for run in ("source", "target"):
        found = decoded(
            getattr(pairs, f"{run}_tokens"), getattr(pairs, f"{run}_attention_mask"), chat_tokenizer
        )
        assert list(found) == [f"{opening}<user> {text}\n<assistant>" for text in TEXTS[run]]
    assert [pair.source for pair in pairs.pairs] == TEXTS["source"]


def test_chat_has_one_bos_token() -> None:
    """The template writes the BOS token; the tokenizer must not add a second one."""
    tokenizer = tiny_tokenizer(CHAT_WORDS, chat_template="{{ bos_token }}" + TEMPLATE)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    pairs = PromptPairs.from_texts(*TEXTS.values(), tokenizer, chat=True)
    assert (pairs.source_tokens == tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


def test_system_message_without_chat(chat_tokenizer: Any) -> None:
    with pytest.raises(TokensError, match=r"system= means nothing without chat=True"):
        PromptPairs.from_texts(*TEXTS.values(), chat_tokenizer, system="Be brief.")


def test_chat_with_a_tokenizer_that_has_no_template(tokenizer: Any) -> None:
    with pytest.raises(PatchingError, match="chat"):
        PromptPairs.from_texts(*TEXTS.values(), tokenizer, chat=True)


# Malformed texts --------------------------------------------------------------------------------


NO_TEXTS: list[Any] = ["", None, True, 5.0, float("nan"), []]


@pytest.mark.parametrize(
    ("column", "text"),
    # Of an answer, a list of texts is a set.
    [*itertools.product(COLUMNS, NO_TEXTS), *itertools.product(COLUMNS[:2], [["The"]])],
    ids=repr,
)
def test_texts_that_are_none(tokenizer: Any, column: str, text: bool | float | str | None) -> None:
    texts = changed(**{column: [TEXTS[column][0], text]})
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_texts(*texts, tokenizer)
    for part in (f"{column} of pair 1", "non-empty", repr(text)):
        assert part in str(caught.value)


def test_lists_of_different_lengths(tokenizer: Any) -> None:
    with pytest.raises(TokensError, match=r"source 2, target 1, source_answer 2, target_answer 3"):
        PromptPairs.from_texts(
            *changed(target=TEXTS["target"][:1], target_answer=[" a", " b", " c"]), tokenizer
        )


def test_no_pairs(tokenizer: Any) -> None:
    with pytest.raises(TokensError, match="no prompt pairs"):
        PromptPairs.from_texts([], [], [], [], tokenizer)


@pytest.mark.parametrize("column", COLUMNS)
def test_one_text_in_place_of_a_list(tokenizer: Any, column: str) -> None:
    """A string is a sequence of strings too: taken by its letters it would report nonsense."""
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_texts(*changed(**{column: TEXTS[column][0]}), tokenizer)
    for part in (column, "list", repr(TEXTS[column][0])):
        assert part in str(caught.value)


def test_prompt_without_tokens() -> None:
    """Where whitespace is no token, nothing of such a prompt is left."""
    tokenizer = _without_spaces()
    with pytest.raises(TokensError, match="' ' has no tokens"):
        PromptPairs.from_texts([" "], ["The "], ["Paris"], ["Rome"], tokenizer)


# Tables -----------------------------------------------------------------------------------------


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(TEXTS)


def test_from_dataframe(tokenizer: Any, frame: pd.DataFrame) -> None:
    expected = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    same(PromptPairs.from_dataframe(frame, tokenizer), expected)
    # Neither the order of the columns, nor others, nor the index matter.
    shuffled = frame[list(frame.columns[::-1])].assign(note="x").set_index(pd.Index([7, 7]))
    same(PromptPairs.from_dataframe(shuffled, tokenizer), expected)


def test_from_dataframe_with_other_names(tokenizer: Any, frame: pd.DataFrame) -> None:
    names = {"source": "clean", "target_answer": "wrong"}
    renamed = frame.rename(columns=names)
    pairs = PromptPairs.from_dataframe(renamed, tokenizer, columns=names)
    same(pairs, PromptPairs.from_texts(*TEXTS.values(), tokenizer))


def test_from_dataframe_with_options(tokenizer: Any, frame: pd.DataFrame) -> None:
    frame.loc[0, "source_answer"] = " New York"
    with pytest.raises(AnswerError, match="' New York' is 2 tokens"):
        PromptPairs.from_dataframe(frame, tokenizer)
    with pytest.warns(
        PromptWarning, match="1 of 2 rows was dropped\nrow 0, column source_answer: "
    ):
        assert len(PromptPairs.from_dataframe(frame, tokenizer, multi_token="drop")) == 1


def test_from_dataframe_with_a_missing_value(tokenizer: Any, frame: pd.DataFrame) -> None:
    frame.loc[1, "target"] = None
    with pytest.raises(TokensError, match=r"row 1, column target: must be .*, got (nan|None)"):
        PromptPairs.from_dataframe(frame, tokenizer)


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (None, ["'target'", "source, goal, source_answer, target_answer"]),
        ({"target": "aim"}, ["'aim'", "goal"]),
        ({"goal": "target"}, ["'goal'", "source, target, source_answer, target_answer"]),
    ],
)
def test_columns_that_are_missing(
    tokenizer: Any,
    frame: pd.DataFrame,
    tmp_path: Path,
    columns: dict[str, str] | None,
    parts: list[str],
) -> None:
    renamed = frame.rename(columns={"target": "goal"})
    path = tmp_path / "pairs.csv"
    renamed.to_csv(path, index=False)
    for make, table in ((PromptPairs.from_dataframe, renamed), (PromptPairs.from_csv, path)):
        with pytest.raises(TokensError) as caught:
            make(table, tokenizer, columns=columns)
        for part in parts:
            assert part in str(caught.value)


def test_from_csv(tokenizer: Any, frame: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    frame.assign(note="x").to_csv(path, index=False)
    expected = PromptPairs.from_texts(*TEXTS.values(), tokenizer)
    same(PromptPairs.from_csv(path, tokenizer), expected)
    same(PromptPairs.from_csv(str(path), tokenizer), expected)


def test_from_csv_with_other_names_and_options(
    tokenizer: Any, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    frame.loc[0, "source_answer"] = " New York"
    frame.rename(columns={"source": "clean"}).to_csv(path, index=False)
    with pytest.warns(AnswerWarning, match=r"\(line 2, column source_answer\)"):
        pairs = PromptPairs.from_csv(
            path, tokenizer, columns={"source": "clean"}, multi_token="first"
        )
    assert tokenizer.decode([pairs.source_answer_index[0]]) == " New"


def test_warnings_point_at_the_line_that_asked(
    tokenizer: Any, frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.loc[0, "source_answer"] = "Paris"
    path = tmp_path / "pairs.csv"
    frame.to_csv(path, index=False)
    for make, table in ((PromptPairs.from_dataframe, frame), (PromptPairs.from_csv, path)):
        with pytest.warns(AnswerWarning) as caught:
            make(table, tokenizer)
        assert [warning.filename for warning in caught] == [__file__]


def test_from_csv_with_commas_quotes_and_line_breaks(tmp_path: Path) -> None:
    """What a spreadsheet writes: the space before an answer, and every character, are kept."""
    prompts = ['The "old" capital,\nof Italy is', 'The "new" capital,\r\nof Japan is']
    answers = [" Rome", " Tokyo"]
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, [*prompts, *answers]])
    tokenizer = tiny_tokenizer([*prompts, *answers])
    pairs = PromptPairs.from_csv(path, tokenizer)
    assert pairs.pairs == (TextPair(*prompts, *answers),)
    found = decoded(pairs.source_tokens, pairs.source_attention_mask, tokenizer)
    assert list(found) == prompts[:1]


def test_from_csv_in_other_scripts(tmp_path: Path) -> None:
    texts = [["日本 の 首都 は", "Κάτω η πρωτεύουσα είναι", " 東京", " Αθήνα"]]
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *texts])
    pairs = PromptPairs.from_csv(path, tiny_tokenizer(texts[0]))
    assert pairs.pairs == (TextPair(*texts[0]),)


def test_from_csv_with_a_byte_order_mark(
    tokenizer: Any, frame: pd.DataFrame, tmp_path: Path
) -> None:
    """Excel puts one before the first column's name when it saves a CSV as UTF-8."""
    path = tmp_path / "pairs.csv"
    frame.to_csv(path, index=False, encoding="utf-8-sig")
    same(PromptPairs.from_csv(path, tokenizer), PromptPairs.from_texts(*TEXTS.values(), tokenizer))


def test_from_csv_with_a_row_that_is_too_short(
    tokenizer: Any, frame: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    frame.to_csv(path, index=False)
    with path.open("a", encoding="utf-8") as file:
        file.write("The capital of France is,The capital of Japan is\n")
    with pytest.raises(TokensError, match=r"line 4, column source_answer: is missing: .* 2 fields"):
        PromptPairs.from_csv(path, tokenizer)


def test_from_csv_with_a_row_that_is_too_long(tokenizer: Any, tmp_path: Path) -> None:
    """A comma in a prompt that nobody quoted shifts the answers by one column."""
    path = tmp_path / "pairs.csv"
    path.write_text(
        ",".join(COLUMNS) + "\nThe old capital, of Italy is,The capital of Japan is, Rome, Tokyo\n",
        encoding="utf-8",
    )
    with pytest.raises(TokensError, match=r"5 fields|Tokyo"):
        PromptPairs.from_csv(path, tokenizer, multi_token="first")


@pytest.mark.parametrize("content", ["", ",".join(COLUMNS) + "\n"], ids=["empty", "header"])
def test_from_csv_without_rows(tokenizer: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokensError, match=r"no (column 'source'|prompt pairs)"):
        PromptPairs.from_csv(path, tokenizer)
