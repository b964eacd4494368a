"""Samples in the layouts of EAP-IG, auto-circuit, MIB and CounterFact are read as they are.

They were made for these tests: the formats are those of the data sets, the sentences are not.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from nnpatch_core import PromptPairs
from nnpatch_core._upstream import PreTrainedTokenizerFast
from nnpatch_core.errors import AnswerWarning, PromptWarning, TokensError
from nnpatch_core.testing import tiny_tokenizer

SAMPLES = Path(__file__).parent / "layouts"
NAMES = " Ada Ben Cleo Dora her him them Oslo Bern Rome flute harp A B C D 7 8 9"
TOKENIZER = tiny_tokenizer([*(path.read_text("utf-8") for path in SAMPLES.iterdir()), NAMES])


def by_digits(count: int) -> Any:
    """A tokenizer that cuts numbers into pieces of some digits, from the left."""
    pattern = rf"\d{{1,{count}}}| ?[^\d ]+| "
    texts = [*(path.read_text("utf-8") for path in SAMPLES.iterdir())]
    numbers = [f"{number:0{width}}" for width in (1, 2) for number in range(10**width)]
    pieces = [*(number for number in numbers if len(number) <= count)]
    pieces += [piece for text in texts for piece in re.findall(pattern, text)]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(["<unk>", "<pad>", *pieces]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def read(name: str, tokenizer: Any = TOKENIZER, **options: Any) -> PromptPairs:
    with warnings.catch_warnings():
        # Their answers have no spaces, which is told elsewhere.
        warnings.filterwarnings("ignore", "answers without their space", AnswerWarning)
        return PromptPairs.from_table(SAMPLES / name, tokenizer, **options)


def texts(pairs: PromptPairs) -> list[tuple[Any, ...]]:
    return [(its.source, its.target, its.source_answer, its.target_answer) for its in pairs.pairs]


def first(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((SAMPLES / name).read_text("utf-8").splitlines()[0])
    return content


def test_eap_ig_indirect_objects() -> None:
    pairs = read("eap_ig_ioi.csv")
    assert pairs.source_answer_index.tolist() == [5, 7]
    assert pairs.target_answer_index.tolist() == [7, 5]
    assert pairs.columns[""] == ("12", "3")
    hard = read("eap_ig_ioi.csv", columns={"target": "corrupted_hard"})
    assert hard.pairs[0].target == pairs.columns["corrupted_hard"][0]


@pytest.mark.parametrize("sample", ["eap_ig_greater_than.csv", "mib_greater_than.jsonl"])
def test_greater_than_by_tokens_of_two_digits(sample: str) -> None:
    tokenizer = by_digits(2)
    pairs = read(sample, tokenizer, layout="greater-than")
    for at, start in enumerate((45, 4)):
        later = {tokenizer.convert_tokens_to_ids(f"{year:02}") for year in range(start + 1, 100)}
        other = {tokenizer.convert_tokens_to_ids(f"{year:02}") for year in range(start + 1)}
        found = [sets[at] for sets in (pairs.source_answer_sets, pairs.target_answer_sets)]
        assert [sets[sets >= 0].tolist() for sets in found] == [sorted(later), sorted(other)]
    assert [str(label) for label in pairs.columns["label"]] == ["45", "4"]
    assert pairs.pairs[0].source.endswith("from the year 1445 to the year 14")


def test_greater_than_by_single_digits_leaves_out_what_is_undecided() -> None:
    tokenizer = by_digits(1)
    with pytest.raises(TokensError) as caught:
        read("eap_ig_greater_than.csv", tokenizer, layout="greater-than")
    assert str(caught.value).startswith(
        "line 3, column label, later years: no token is of other years alone, for '4'"
    )
    with pytest.warns(PromptWarning, match="1 of 2 lines was dropped"):
        pairs = read("eap_ig_greater_than.csv", tokenizer, layout="greater-than", faulty="drop")
    # After 1445 a 5 begins later years alone, and a 4 both kinds.
    digits = [tokenizer.convert_ids_to_tokens(its.tolist()[0]) for its in sets_of(pairs)]
    assert [sorted(its) for its in digits] == [list("56789"), list("0123")]


def sets_of(pairs: PromptPairs) -> list[Any]:
    return [pairs.source_answer_sets, pairs.target_answer_sets]


def test_greater_than_that_cannot_be_read() -> None:
    with pytest.raises(TokensError, match="has no token with which a year's last two digits beg"):
        read("eap_ig_greater_than.csv", layout="greater-than")
    row = {"clean": "1445 to 14", "corrupted": "1401 to 14", "label": "soon"}
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_rows([row, {**row, "label": 99}], by_digits(2), layout="greater-than")
    told = str(caught.value).splitlines()
    assert told[1].startswith("row 0, column label, later years: must be a year, or its last two")
    assert told[2].startswith("row 1, column label, later years: no token is of later years alone")
    with pytest.raises(TokensError, match="must be a Hugging Face tokenizer"):
        PromptPairs.from_rows([row], None, layout="greater-than")


def test_auto_circuit() -> None:
    pairs = read("auto_circuit.json")
    assert pairs.pairs[1].target_answer == (" Dora", " him", " them")
    names = [
        [[TOKENIZER.decode(token) for token in row[row >= 0]] for row in sets]
        for sets in sets_of(pairs)
    ]
    assert names == [[[" Ben"], [" Cleo", " her"]], [[" Ada"], [" Dora", " him", " them"]]]


def test_mib_indirect_objects() -> None:
    with pytest.raises(TokensError) as caught:
        read("mib_ioi.jsonl")
    chosen = {"target": "s2_io_flip_counterfactual"}
    assert str(caught.value).endswith(
        "target may be 's2_io_flip_counterfactual.prompt' or 'abc_counterfactual.prompt': choose "
        f"by columns=, such as columns={chosen}"
    )
    pairs = read("mib_ioi.jsonl", columns=chosen)
    row = first("mib_ioi.jsonl")
    assert texts(pairs)[0] == (row["prompt"], row[chosen["target"]]["prompt"], "Ben", "Ada")
    assert pairs.columns["metadata.indirect_object"] == ("Ben", "Cleo")
    assert list(map(len, pairs.groups("template").values())) == [2]
    other = read("mib_ioi.jsonl", columns={**chosen, "target_answer": "metadata.random_c"})
    assert [pair.target_answer for pair in other.pairs] == ["Cleo", "Ben"]


def test_mib_multiple_choice() -> None:
    pairs = read("mib_mcqa.jsonl")
    assert [answers[2:] for answers in texts(pairs)] == [("B", "D"), ("A", "C")]
    assert pairs.columns["choices.text"][0] == ["blue", "red"]


def test_mib_arithmetic() -> None:
    with pytest.warns(PromptWarning, match="line 2, column random_counterfactual.prompt: is mis"):
        pairs = read("mib_arithmetic.jsonl", answers="texts", faulty="drop")
    row = first("mib_arithmetic.jsonl")
    other = row["random_counterfactual"]["prompt"]
    assert texts(pairs) == [(row["prompt"], other, "7", "9")]


@pytest.mark.parametrize("key", [2, -1, True, None, "C"])
def test_an_answer_that_is_none_of_its_choices(key: int | str | None) -> None:
    row = {**first("mib_mcqa.jsonl"), "answerKey": key}
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_rows([row], TOKENIZER)
    message = f"row 0, column answer: the answerKey {key!r} is none of its 2 choices"
    assert message in str(caught.value)


def test_an_answer_key_may_be_a_label() -> None:
    row = {**first("mib_mcqa.jsonl"), "answerKey": "A"}
    with pytest.warns(AnswerWarning, match=r"column answer and row 0, column symbol_counterfact"):
        pairs = PromptPairs.from_rows([row], TOKENIZER)
    assert pairs.pairs[0].source_answer == "A"


def test_counterfact() -> None:
    with pytest.raises(TokensError, match=r"; layout='counterfact' reads tables like this one$"):
        read("counterfact.json")
    with pytest.raises(TokensError, match="leave out columns="):
        read("counterfact.json", layout="counterfact", columns={"source": "case_id"})
    alone = "item 1, column target's requested_rewrite.prompt: no other fact has this sentence"
    with pytest.warns(PromptWarning, match=f"1 of 4 items was dropped\n{alone}"):
        pairs = read("counterfact.json", layout="counterfact", faulty="drop")
    born = "{} was born in the town of"
    assert texts(pairs) == [
        (born.format("Old Ada"), born.format("Dora"), "Bern", "Rome"),
        (born.format("Cleo"), born.format("Dora"), "Bern", "Rome"),
        (born.format("Dora"), born.format("Old Ada"), "Rome", "Bern"),
    ]
    assert pairs.columns["subject"] == ("Old Ada", "Cleo", "Dora")
    assert pairs.columns["target_subject"] == ("Dora", "Dora", "Old Ada")
    assert pairs.columns["target_case_id"] == (13, 13, 10)
    assert pairs.columns["requested_rewrite.target_new.str"] == ("Oslo", "Rome", "Bern")
    assert list(pairs.groups("template")) == [born]


def test_counterfact_that_is_none() -> None:
    facts = json.loads((SAMPLES / "counterfact.json").read_text("utf-8"))
    with pytest.raises(TokensError, match=r"layout='counterfact' needs .* no requested_rewrite.pr"):
        PromptPairs.from_rows([{"prompt": "a"}], TOKENIZER, layout="counterfact")
    for fact in facts:
        fact["requested_rewrite"]["prompt"] = "Someone was born in the town of"
    with pytest.raises(TokensError, match=r"must hold \{\} once, for its subject, got 'Someone"):
        PromptPairs.from_rows(facts, TOKENIZER, layout="counterfact")
    facts[0]["requested_rewrite"]["target_true"] = None
    with pytest.raises(TokensError, match=r"row 0, column requested_rewrite\.target_true\.str: is"):
        PromptPairs.from_rows(facts, TOKENIZER, layout="counterfact")
