"""An answer is the token that follows its prompt, however it is spelled and whatever cuts it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core._upstream import PreTrainedTokenizerFast
from nnpatch_core.errors import AnswerError, AnswerWarning, PromptWarning, TokensError
from nnpatch_core.testing import tiny_model, tiny_tokenizer

COUNTRIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Greece": "Athens"}
PROMPTS = [f"The capital of {country} is" for country in COUNTRIES]
ANSWERS = list(COUNTRIES.values())
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def byte_level(texts: list[str] = PROMPTS, answers: list[str] = ANSWERS) -> Any:
    """A byte-level BPE such as GPT-2's, in which a word with its space is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    spaced = [f" {answer}" for answer in answers]
    tokenizer.train_from_iterator([*texts, *spaced] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def prefixing(texts: list[str] = PROMPTS, answers: list[str] = ANSWERS) -> Any:
    """Like Llama 2's: every text begins with a space, and so does an answer that stands alone."""
    words = [f"▁{word}" for text in [*texts, *answers] for word in text.split()]
    names = dict.fromkeys([*SPECIAL.values(), "▁", *words])
    vocabulary = {word: number for number, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def words() -> Any:
    return tiny_tokenizer([*PROMPTS, *(f" {answer}" for answer in ANSWERS), *ANSWERS, "\n"])


TOKENIZERS = {"words": words(), "byte level": byte_level(), "prefixing": prefixing()}


def around(tokenizer: Any, single: str) -> Any:
    """The tokenizer with special tokens around each text."""
    names = [name for name in SPECIAL.values() if name in single]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single,
        special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in names],
    )
    return tokenizer


def make(
    tokenizer: Any,
    answers: list[str] | None = None,
    prompts: list[str] | None = None,
    **options: Any,
) -> PromptPairs:
    """Each prompt against the next one."""
    prompts, answers = PROMPTS if prompts is None else prompts, answers or ANSWERS
    roll = [*prompts[1:], prompts[0]], [*answers[1:], answers[0]]
    return PromptPairs.from_texts(prompts, roll[0], answers, roll[1], tokenizer, **options)


def quietly(tokenizer: Any, *args: Any, **options: Any) -> PromptPairs:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (AnswerWarning, PromptWarning))
        return make(tokenizer, *args, **options)


def ids(pairs: PromptPairs) -> tuple[list[int], list[int]]:
    return pairs.source_answer_index.tolist(), pairs.target_answer_index.tolist()


spaces = st.lists(st.booleans(), min_size=4, max_size=4)
kinds = st.sampled_from(list(TOKENIZERS))


# The space --------------------------------------------------------------------------------------


@given(kinds, spaces)
def test_an_answer_with_and_without_its_space_is_one_token(kind: Any, spaced: Any) -> None:
    tokenizer = TOKENIZERS[kind]
    answers = [f"{' ' * space}{text}" for space, text in zip(spaced, ANSWERS, strict=True)]
    found, usual = quietly(tokenizer, answers), make(tokenizer, [f" {each}" for each in ANSWERS])
    assert ids(found) == ids(usual)
    for prompt, answer, token in zip(PROMPTS, ANSWERS, ids(found)[0], strict=True):
        whole = tokenizer(f"{prompt} {answer}", add_special_tokens=False)["input_ids"]
        assert whole[-1] == token


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_spelled_with_its_space_an_answer_is_silent(kind: str) -> None:
    make(TOKENIZERS[kind], [f" {answer}" for answer in ANSWERS])


def test_the_space_that_was_put_in_is_said_once_with_its_rows() -> None:
    with pytest.warns(AnswerWarning) as caught:
        make(TOKENIZERS["byte level"], ["Paris", " Tokyo", "Rome", "Athens"])
    (warning,) = caught
    for part in (
        "'Paris' follows 'The capital of France is' as ' Paris'",
        "(source_answer of pairs 0, 2 to 3 and target_answer of pairs 1 to 3)",
        "space=False",
    ):
        assert part in str(warning.message)
    assert warning.filename == __file__


def test_what_the_warning_advises_silences_it() -> None:
    make(TOKENIZERS["byte level"], [f" {answer}" for answer in ANSWERS])
    tokenizer = tiny_tokenizer([*PROMPTS, *(f"is{answer}" for answer in ANSWERS)])
    with pytest.raises(AnswerError, match="changes the tokens of its prompt"):
        make(tokenizer, space=False)
    make(words(), prompts=[f"{prompt}\n" for prompt in PROMPTS], space=False)


def test_where_the_space_makes_no_difference_nothing_is_said() -> None:
    """Alone, such a tokenizer takes an answer for the same token as after its prompt."""
    make(TOKENIZERS["prefixing"], ANSWERS)


@pytest.mark.parametrize("end", ["\n", "\t", " "])
def test_no_space_after_white_space(end: str) -> None:
    """The white space is a token of its own here, so that it stays one."""
    tokenizer = tiny_tokenizer([*PROMPTS, *ANSWERS])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Split("\t", "isolated")]
    )
    if end == "\n":
        tokenizer = words()
    pairs = make(tokenizer, prompts=[prompt + end for prompt in PROMPTS])
    assert tokenizer.convert_ids_to_tokens(ids(pairs)[0]) == ANSWERS


def test_no_space_after_the_token_that_opens_a_turn() -> None:
    """A prompt that was rendered by a template may end in one, without white space."""
    tokenizer = tiny_tokenizer([*PROMPTS, *ANSWERS], additional_special_tokens=["<turn>"])
    pairs = make(tokenizer, prompts=[f"{prompt}<turn>" for prompt in PROMPTS])
    assert tokenizer.convert_ids_to_tokens(ids(pairs)[0]) == ANSWERS


def test_an_unknown_word_at_the_end_is_no_opening_of_a_turn() -> None:
    tokenizer = words()
    prompts = [f"{prompt} zzz" for prompt in PROMPTS]
    assert ids(quietly(tokenizer, prompts=prompts)) == ids(quietly(tokenizer))


def test_white_space_at_the_end_that_melts_into_the_answer_is_an_error() -> None:
    prompts = [f"{PROMPTS[0]} ", *PROMPTS[1:]]
    spaced = [f" {answer}" for answer in ANSWERS]
    answers = ["Paris", *spaced[1:]]
    with pytest.raises(AnswerError) as caught:
        make(TOKENIZERS["byte level"], answers, prompts=prompts)
    for part in (
        "source_answer of pair 0: 'Paris' changes the tokens of its prompt",
        "take the white space off the end of the prompt",
    ):
        assert part in str(caught.value)
    assert "pair 1" not in str(caught.value)
    stripped = [prompt.strip() for prompt in prompts]
    make(TOKENIZERS["byte level"], spaced, prompts=stripped)


def test_an_answer_that_is_one_token_without_the_space() -> None:
    """As a digit is, of tokenizers that cut numbers into digits."""
    tokenizer = tiny_tokenizer(["2 + 2 =", "2 + 3 =", "4", "5", " "])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.Digits(individual_digits=True)]
    )
    texts = [["2 + 2 ="], ["2 + 3 ="], ["4"], ["5"]]
    with pytest.raises(AnswerError, match="space=False joins answers as they are"):
        PromptPairs.from_texts(*texts, tokenizer)
    assert len(PromptPairs.from_texts(*texts, tokenizer, space=False)) == 1


# Errors and warnings about many rows --------------------------------------------------------------


def many(count: int) -> list[list[str]]:
    return [
        [f"The capital of {country} is" for country in ["France"] * count],
        [f"The capital of {country} is" for country in ["Japan"] * count],
        [" Quetzalcoatl"] * count,
        [" Tokyo"] * count,
    ]


@pytest.mark.parametrize(("count", "more"), [(1, 0), (10, 0), (11, 1), (29, 19)])
def test_an_error_about_many_rows_is_read_in_lines(count: int, more: int) -> None:
    with pytest.raises(AnswerError) as caught:
        PromptPairs.from_texts(*many(count), TOKENIZERS["byte level"])
    lines = str(caught.value).splitlines()
    listed = [line for line in lines if line.startswith("source_answer of pair ")]
    assert len(listed) == min(count, 10)
    assert (f"and {more} more" in lines) == bool(more)
    assert max(map(len, lines)) < 200
    assert any("multi_token='first'" in line for line in lines)
    assert any("faulty='drop'" in line for line in lines)


def test_its_advice_can_be_followed() -> None:
    tokenizer = TOKENIZERS["byte level"]
    texts = [column + more for column, more in zip(many(3), _good(), strict=True)]
    with pytest.warns(AnswerWarning, match=r"\(source_answer of pairs 0 to 2\)") as caught:
        assert len(PromptPairs.from_texts(*texts, tokenizer, multi_token="first")) == 4
    assert len(caught) == 1
    with pytest.warns(PromptWarning, match="3 of 4 pairs were dropped"):
        assert len(PromptPairs.from_texts(*texts, tokenizer, faulty="drop")) == 1


def _good() -> list[list[str]]:
    return [[PROMPTS[0]], [PROMPTS[1]], [" Paris"], [" Tokyo"]]


#: A row that can be used, and some that cannot, each for another reason.
ROWS = [
    (PROMPTS[0], PROMPTS[1], " Paris", " Tokyo"),
    (PROMPTS[0], PROMPTS[1], " Quetzalcoatl", " Tokyo"),
    (PROMPTS[0], PROMPTS[1], " Paris", " Paris"),
    (PROMPTS[0], "", " Paris", " Tokyo"),
    (None, PROMPTS[1], 10**9, " Tokyo"),
    ([{"role": "user"}], PROMPTS[1], " Paris", 5.0),
]


@functools.cache
def byte_level_with_template() -> Any:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


@given(st.lists(st.sampled_from(ROWS), min_size=1, max_size=8))
def test_a_row_dropped_is_a_row_listed(rows: Any) -> None:
    columns = [list(column) for column in zip(*rows, strict=True)]
    good = [number for number, row in enumerate(rows) if row is ROWS[0]]
    bad = [number for number in range(len(rows)) if number not in good]
    tokenizer = byte_level_with_template()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not good:
            with pytest.raises(TokensError, match=r"no prompt pairs.*dropped"):
                PromptPairs.from_texts(*columns, tokenizer, faulty="drop")
            return
        pairs = PromptPairs.from_texts(*columns, tokenizer, faulty="drop")
    assert len(pairs) == len(good)
    # Messages may be told by how they were written, which is why they are compared as they are.
    shown = [pair.source for pair, _ in pairs.dropped]
    assert shown == [rows[number][0] for number in bad]
    for number, (_, reason) in zip(bad, pairs.dropped, strict=True):
        assert f" of pair {number}: " in reason
    if bad:
        (warning,) = caught
        listed = str(warning.message).splitlines()[1:]
        assert listed == [reason for _, reason in pairs.dropped]
        with pytest.raises((AnswerError, TokensError)) as error:
            PromptPairs.from_texts(*columns, tokenizer)
        for line in listed:
            assert line in str(error.value)
    else:
        assert not caught


def test_one_fault_does_not_hide_another() -> None:
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_texts(
            ["", *PROMPTS[:1]],
            [PROMPTS[1], None],
            [" Quetzalcoatl", 10**9],
            [" Quetzalcoatl", True],
            TOKENIZERS["byte level"],
        )
    for part in (
        "2 of 2 pairs cannot be used",
        "source of pair 0: must be a non-empty text",
        "target_answer of pair 0: ' Quetzalcoatl' is ",
        "target of pair 1: must be a non-empty text",
        "source_answer of pair 1: the id 1000000000 is not in the tokenizer's vocabulary, 0 to ",
        "target_answer of pair 1: must be a non-empty text or a token id, got True (bool)",
    ):
        assert part in str(caught.value)


# Token ids ----------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=30)
def test_ids_in_are_ids_out(data: Any) -> None:
    tokenizer = TOKENIZERS["byte level"]
    numbers = st.integers(0, len(tokenizer) - 1)
    answers = data.draw(st.lists(numbers, min_size=4, max_size=4, unique=True))
    kind = data.draw(st.sampled_from([list, np.array, torch.tensor]))
    rolled = [*answers[1:], answers[0]]
    texts = PROMPTS, [*PROMPTS[1:], PROMPTS[0]]
    pairs = PromptPairs.from_texts(*texts, kind(answers), kind(rolled), tokenizer)
    assert ids(pairs) == (answers, rolled)
    digits = [str(answer) for answer in answers], [f" {answer}\n" for answer in rolled]
    assert ids(PromptPairs.from_texts(*texts, *digits, tokenizer, answers="ids")) == ids(pairs)
    frame = pd.DataFrame({"clean": texts[0], "corrupted": texts[1]})
    frame["correct_idx"], frame["incorrect_idx"] = digits[0], rolled
    renamed = dict(zip(("source", "target", "source_answer", "target_answer"), frame, strict=True))
    assert ids(PromptPairs.from_dataframe(frame, tokenizer, columns=renamed)) == ids(pairs)
    assert [pair.source_answer for pair in pairs.pairs] == answers


def test_digits_as_text_are_text() -> None:
    tokenizer = tiny_tokenizer(["2 + 2 =", "2 + 3 =", " 4 5"])
    pairs = PromptPairs.from_texts(["2 + 2 ="], ["2 + 3 ="], [" 4"], [" 5"], tokenizer)
    assert tokenizer.convert_ids_to_tokens([*ids(pairs)[0], *ids(pairs)[1]]) == [" 4", " 5"]


def test_ids_of_a_file_in_the_layout_of_eap_ig(tmp_path: Path) -> None:
    path = tmp_path / "ioi.csv"
    path.write_text(
        f"clean,corrupted,correct_idx,incorrect_idx\n{PROMPTS[0]},{PROMPTS[1]},7,9\n"
        f"{PROMPTS[2]},{PROMPTS[3]},x,90000\n",
        encoding="utf-8",
    )
    columns = {
        "source": "clean",
        "target": "corrupted",
        "source_answer": "correct_idx",
        "target_answer": "incorrect_idx",
    }
    tokenizer = words()
    with pytest.raises(AnswerError) as caught:
        PromptPairs.from_csv(path, tokenizer, columns=columns)
    for part in (
        "line 3, column correct_idx: must be a token id, got 'x'",
        f"line 3, column incorrect_idx: the id 90000 is not in the tokenizer's vocabulary, "
        f"0 to {len(tokenizer) - 1}",
    ):
        assert part in str(caught.value)
    with pytest.warns(PromptWarning, match="1 of 2 lines was dropped\nline 3, column"):
        pairs = PromptPairs.from_csv(path, tokenizer, columns=columns, faulty="drop")
    assert ids(pairs) == ([7], [9])


def test_integers_of_a_frame_are_said_to_be_ids() -> None:
    """Of digits in a file, pandas makes integers: 4 would be token 4 and not '4'."""
    tokenizer = words()
    columns = "source", "target", "source_answer", "target_answer"
    rows = [(PROMPTS[0], PROMPTS[1], 7, " Tokyo"), (PROMPTS[2], PROMPTS[3], 8, " Rome")]
    frame = pd.DataFrame(rows, columns=columns)
    with pytest.warns(AnswerWarning) as caught:
        pairs = PromptPairs.from_dataframe(frame, tokenizer)
    assert ids(pairs)[0] == [7, 8]
    (warning,) = caught
    for part in (
        f"integers were taken as token ids: 7 is the token {tokenizer.decode([7])!r} "
        "(rows 0 to 1, column source_answer)",
        "answers='ids'",
        "dtype=str",
    ):
        assert part in str(warning.message)
    assert warning.filename == __file__
    # What it advises silences it, and so does a name; a list of one's own was meant.
    numbers = frame.assign(target_answer=[9, 10])
    PromptPairs.from_dataframe(numbers, tokenizer, answers="ids")
    renamed = frame.rename(columns={"source_answer": "correct_idx"})
    PromptPairs.from_dataframe(renamed, tokenizer, columns={"source_answer": "correct_idx"})
    PromptPairs.from_texts(*(list(frame[name]) for name in columns), tokenizer)


@pytest.mark.parametrize("bad", [True, np.True_, 7.0, float("nan"), None, -1, torch.tensor([7])])
def test_what_is_no_id(bad: Any) -> None:
    columns = PROMPTS[:1], PROMPTS[1:2], [bad], [9]
    with pytest.raises((TokensError, AnswerError), match="source_answer of pair 0: "):
        PromptPairs.from_texts(*columns, words())


def test_the_same_id_twice() -> None:
    with pytest.raises(AnswerError, match="answers 7 and 7 begin with one token"):
        PromptPairs.from_texts(PROMPTS[:1], PROMPTS[1:2], [7], [7], words())


# What the tokenizer puts around a text ------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("single", ["<bos> $A", "$A <eos>", "<bos> $A <eos>", "$A <eos> <eos>"])
def test_special_tokens_around_a_text(kind: str, single: str) -> None:
    plain = {"words": words, "byte level": byte_level, "prefixing": prefixing}[kind]
    tokenizer, expected = around(plain(), single), make(plain(), [f" {each}" for each in ANSWERS])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = make(tokenizer, [f" {each}" for each in ANSWERS])
    assert ids(pairs) == ids(expected)
    start = int("<bos>" in single)
    assert pairs.source_tokens[:, start:].tolist() == expected.source_tokens.tolist()
    assert (pairs.source_tokens == tokenizer.bos_token_id).sum(1).tolist() == [start] * 4
    ends = [str(each.message) for each in caught if each.category is PromptWarning]
    assert len(ends) == len(caught) == int("<eos>" in single)
    assert all("'<eos>'" in end and "left out" in end for end in ends)


@pytest.mark.parametrize("kind", ["words", "byte level"])
def test_a_prompt_that_begins_with_its_opening_token_gets_no_second_one(kind: str) -> None:
    """As a chat template renders it with `tokenize=False`."""
    plain = {"words": words, "byte level": byte_level}[kind]
    tokenizer = around(plain(), "<bos> $A")
    spaced = [f" {each}" for each in ANSWERS]
    rendered = make(tokenizer, spaced, prompts=[f"<bos>{prompt}" for prompt in PROMPTS])
    expected = make(tokenizer, spaced)
    assert rendered.source_tokens.tolist() == expected.source_tokens.tolist()
    assert rendered.target_tokens.tolist() == expected.target_tokens.tolist()
    assert ids(rendered) == ids(expected)


def test_the_answer_is_read_after_the_prompt_and_not_after_the_end_token() -> None:
    """The logit difference is that of the model after the prompt's own last token."""
    tokenizer, model = around(words(), "$A <eos>"), tiny_model()
    with pytest.warns(PromptWarning, match="left out"):
        pairs = make(tokenizer, [f" {each}" for each in ANSWERS])
    out = activation_patching(
        model, None, Sites("resid", seq_pos_type="last"), **pairs.arguments(), progress=False
    )
    own = [tokenizer(prompt, add_special_tokens=False, return_tensors="pt") for prompt in PROMPTS]
    with torch.no_grad():
        logits = torch.stack([model(**each).logits[0, -1] for each in own])
    answers = torch.tensor(ids(pairs))
    differences = logits.gather(1, answers.T)
    torch.testing.assert_close(out.baseline.source, differences[:, 0] - differences[:, 1])


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    class Odd:
        unk_token_id = pad_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1, 9, 3] if add_special_tokens else [1, 2, 3]}

        def decode(self, ids: list[int]) -> str:
            return str(ids)

    with pytest.raises(TokensError, match="differently with its special tokens"):
        PromptPairs.from_texts(["a"], ["b"], [" c"], [" d"], Odd())


@pytest.mark.parametrize("bad", [None, "gpt2", tiny_model])
def test_what_is_no_tokenizer(bad: str | Callable[..., Any] | None) -> None:
    with pytest.raises(TokensError, match="must be a Hugging Face tokenizer"):
        make(bad)
