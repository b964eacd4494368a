"""Sets of answers, and answers of several tokens, as tensors."""

from __future__ import annotations

import warnings
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core._upstream import PreTrainedTokenizerFast
from nnpatch_core.errors import AnswerError, AnswerWarning, MetricError, PromptWarning, TokensError
from nnpatch_core.testing import tiny_model, tiny_tokenizer

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
WORDS = [" Paris", " Lyon", " Nice", " Lille", " Tokyo", " Kyoto", " Osaka", " Nara"]
TOKENIZER = tiny_tokenizer([FRANCE, JAPAN, *WORDS])


def byte_level() -> Any:
    """A byte-level BPE without merges of words, so that answers have several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=259,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" New"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


BYTES = byte_level()


def make(source: Any, target: Any, tokenizer: Any = TOKENIZER, **options: Any) -> PromptPairs:
    """One pair for each of the answers."""
    count = len(source)
    return PromptPairs.from_texts(
        [FRANCE] * count, [JAPAN] * count, source, target, tokenizer, **options
    )


def says(error: type[Exception], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        make(*args, **options)
    return str(caught.value)


def token(word: str) -> int:
    """The last token of the sentence that the word ends."""
    found: int = TOKENIZER(FRANCE + word, add_special_tokens=False)["input_ids"][-1]
    return found


def rows(tensor: Any) -> list[list[int]]:
    """The rows of a filled tensor; what fills stands behind."""
    found = [row[row >= 0].tolist() for row in tensor]
    assert tensor.dtype == torch.int64
    assert tensor.shape[1] == max(map(len, found))
    for row, its in zip(tensor.tolist(), found, strict=True):
        assert row == its + [-1] * (tensor.shape[1] - len(its))
    return found


split = st.lists(st.permutations(WORDS), min_size=1, max_size=4).flatmap(
    lambda orders: st.tuples(
        st.just(orders),
        st.lists(
            st.tuples(st.integers(1, 7), st.integers(1, 7)),
            min_size=len(orders),
            max_size=len(orders),
        ),
    )
)


@given(split, st.booleans(), st.sampled_from([list, tuple]))
@settings(max_examples=60)
def test_sets_are_the_tokens_of_their_answers(drawn: Any, ids: bool, kind: Any) -> None:
    orders, cuts = drawn
    source = [list(order[:cut]) for order, (cut, _) in zip(orders, cuts, strict=True)]
    target = [list(order[cut : cut + n]) for order, (cut, n) in zip(orders, cuts, strict=True)]
    expected = [[[token(word) for word in its] for its in each] for each in (source, target)]
    given = expected if ids else (source, target)
    pairs = make(*([kind(its) for its in each] for each in given))
    assert rows(pairs.source_answer_sets) == expected[0]
    assert rows(pairs.target_answer_sets) == expected[1]
    assert pairs.source_answer_index.tolist() == [its[0] for its in expected[0]]
    assert pairs.target_answer_index.tolist() == [its[0] for its in expected[1]]
    assert pairs.source_answer_tokens is None
    swapped = pairs.swapped()
    assert torch.equal(swapped.source_answer_sets, pairs.target_answer_sets)
    assert torch.equal(swapped.target_answer_sets, pairs.source_answer_sets)
    for number in range(len(pairs)):
        alone = make(*([kind(each[number])] for each in given))
        assert torch.equal(pairs[number].source_answer_sets, alone.source_answer_sets)
        assert torch.equal(pairs[number].target_answer_sets, alone.target_answer_sets)
    assert not {"source_answer_sets", "source_answer_tokens"} & set(pairs.arguments())


def test_single_answers_make_no_sets() -> None:
    pairs = make([" Paris"], [" Tokyo"])
    assert pairs.source_answer_sets is None
    assert pairs.target_answer_sets is None
    # One list is enough, of either kind.
    pairs = make([" Paris", token(" Lyon")], [" Tokyo", [" Nara", token(" Osaka")]])
    assert rows(pairs.source_answer_sets) == [[token(" Paris")], [token(" Lyon")]]
    assert rows(pairs.target_answer_sets) == [[token(" Tokyo")], [token(" Nara"), token(" Osaka")]]
    assert pairs.pairs[1].target_answer == (" Nara", token(" Osaka"))


def test_each_answer_of_a_set_is_checked_as_one_is() -> None:
    faults = says(
        TokensError,
        [[" Paris", " Quito", 10**9, "", 5.0], [" Paris"], [], [[" Paris"]], [" Paris"]],
        [[" Tokyo"], [" Tokyo", None], [" Tokyo"], [" Tokyo"], [" Tokyo"]],
    ).splitlines()
    assert faults[0] == "4 of 5 pairs cannot be used"
    for place in (
        "source_answer of pair 0, answer 1: ' Quito' is not in the tokenizer's vocabulary",
        "source_answer of pair 0, answer 2: the id 1000000000 is not in the tokenizer's vocabulary",
        "source_answer of pair 0, answer 3: must be a non-empty text or a token id, got ''",
        "source_answer of pair 0, answer 4: must be a non-empty text or a token id, got 5.0 (float",
    ):
        assert place in faults[1]
    assert "target_answer of pair 1, answer 1: must be a non-empty text" in faults[2]
    assert faults[3] == "source_answer of pair 2: must be a non-empty list, got []"
    assert "source_answer of pair 3, answer 0: must be a non-empty text or a token id" in faults[4]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([" Paris", " Lyon"], [" Nara", " Lyon"], "source_answer of pair 0: answers ' Lyon' and"),
        ([" Paris", "Paris"], [" Tokyo"], "source_answer of pair 0: answers ' Paris' and 'Paris'"),
        ([" Paris"], [" Nara", "Nara"], "target_answer of pair 0: answers ' Nara' and 'Nara' beg"),
        (" Paris", [" Nara", token(" Paris")], "source_answer of pair 0: answers ' Paris' and "),
    ],
)
def test_two_answers_that_are_one_token_are_refused(source: Any, target: Any, message: str) -> None:
    found = says(AnswerError, [source], [target])
    assert found.startswith(message)
    assert "begin with one token" in found


def test_a_warning_about_an_answer_of_a_set_names_it() -> None:
    tokenizer = tiny_tokenizer([FRANCE, JAPAN, *WORDS, "Lyon"])
    with pytest.warns(AnswerWarning) as caught:
        make([[" Paris", "Lyon"]], [[" Tokyo"]], tokenizer)
    (warning,) = caught
    assert "'Lyon' follows 'The capital of France is' as ' Lyon' (source_answer of pair 0)" in str(
        warning.message
    )


# Answers of several tokens ------------------------------------------------------------------------

names = st.text("abcdef", min_size=1, max_size=5).map(lambda text: f" {text}")


@given(st.lists(st.tuples(names, names), min_size=1, max_size=4))
@settings(max_examples=60)
def test_all_tokens_of_an_answer_are_kept(drawn: list[tuple[str, str]]) -> None:
    drawn = [(one, other) for one, other in drawn if one != other]
    if not drawn:
        return
    source, target = map(list, zip(*drawn, strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = make(source, target, BYTES, multi_token="all")
    # Alone a text of bytes has the tokens that it has behind another.
    expected = [[BYTES(text)["input_ids"] for text in texts] for texts in (source, target)]
    assert rows(pairs.source_answer_tokens) == expected[0]
    assert rows(pairs.target_answer_tokens) == expected[1]
    assert pairs.source_answer_index.tolist() == [its[0] for its in expected[0]]
    assert torch.equal(pairs.swapped().source_answer_tokens, pairs.target_answer_tokens)
    assert rows(pairs[-1].source_answer_tokens) == expected[0][-1:]
    alike = [one[0] == other[0] for one, other in zip(*expected, strict=True)]
    assert len(caught) == any(alike)


def test_answers_that_begin_with_one_token_are_told_where_all_are_kept() -> None:
    answers = [" New York", " Paris"], [" New Delhi", " Tokyo"]
    with pytest.warns(AnswerWarning) as caught:
        pairs = make(*answers, BYTES, multi_token="all")
    told = [str(each.message) for each in caught]
    assert told == [
        "answers ' New York' and ' New Delhi' begin with one token (source_answer of pairs 0 to 1)"
        ": only metrics of all their tokens tell them apart, and no metric of one token, such as "
        "the logit difference"
    ]
    assert caught[0].filename == __file__
    # A metric of one token would divide by 0: it says so, and gives no number.
    model = tiny_model(vocab_size=len(BYTES))
    with (
        pytest.warns(AnswerWarning, match="'logit_difference' sees the first token of each"),
        pytest.raises(MetricError, match="logit_difference"),
    ):
        activation_patching(model, None, Sites("resid"), pairs, progress=False)


def test_one_answer_twice_is_refused_where_all_tokens_are_kept() -> None:
    found = says(AnswerError, [" New York"], ["New York"], BYTES, multi_token="all")
    assert found.startswith(
        "source_answer of pair 0: answers ' New York' and 'New York' are the same tokens"
    )


def test_a_set_has_no_answers_of_several_tokens() -> None:
    found = says(TokensError, [[" Paris"]], [" Tokyo"], BYTES, multi_token="all")
    assert found.startswith(
        "source_answer of pair 0: multi_token='all' takes one answer a prompt, got [' Paris']"
    )
    with pytest.warns(PromptWarning, match="1 of 2 pairs was dropped"):
        pairs = make(
            [[" Paris"], " Paris"], [" Tokyo"] * 2, TOKENIZER, multi_token="all", faulty="drop"
        )
    assert rows(pairs.source_answer_tokens) == [[token(" Paris")]]


def test_ids_are_answers_of_one_token() -> None:
    pairs = make([7, " Paris"], [9, " Tokyo"], multi_token="all")
    assert rows(pairs.source_answer_tokens) == [[7], [token(" Paris")]]


def test_a_token_that_is_unknown_anywhere_is_refused_where_all_are_kept() -> None:
    found = says(AnswerError, [" Paris Quito"], [" Tokyo"], multi_token="all")
    assert "' Paris Quito' is not in the tokenizer's vocabulary" in found


def test_all_is_no_longer_cut() -> None:
    for kept in ("first", "all"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pairs = make([" Paris Lyon"], [" Tokyo"], multi_token=kept)
        assert len(caught) == (kept == "first")
        assert (pairs.source_answer_tokens is None) == (kept == "first")
        assert pairs.source_answer_index.tolist() == [token(" Paris")]


# Integers as texts --------------------------------------------------------------------------------


def test_integers_may_be_texts() -> None:
    tokenizer = tiny_tokenizer(["2 + 2 =", "2 + 3 =", " 4 5 6"])
    texts = {"clean": "2 + 2 =", "corrupted": "2 + 3 ="}
    for names in (("answer", "wrong_answer"), ("correct_idx", "incorrect_idx")):
        row = {**texts, names[0]: 4, names[1]: [5, "6"]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AnswerWarning)
            pairs = PromptPairs.from_rows([row], tokenizer, answers="texts")
        assert pairs.pairs[0].source_answer == "4"
        assert tokenizer.decode(pairs.source_answer_index) == " 4"
        assert [tokenizer.decode(its) for its in pairs.target_answer_sets[0]] == [" 5", " 6"]
