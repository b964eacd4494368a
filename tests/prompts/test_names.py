"""Columns are found under the names that people give them, by one table."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from nnpatch_core import PromptPairs
from nnpatch_core.errors import TokensError
from nnpatch_core.prompts import COLUMNS
from nnpatch_core.prompts.names import NAMES, find_names
from nnpatch_core.testing import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "prompt-details.md"
ROW = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
TOKENIZER = tiny_tokenizer(list(ROW))


def read(names: Any, **options: Any) -> PromptPairs:
    return PromptPairs.from_rows([dict(zip(names, ROW, strict=True))], TOKENIZER, **options)


def says(names: Any, **options: Any) -> str:
    with pytest.raises(TokensError) as caught:
        read(names, **options)
    return str(caught.value)


@given(st.tuples(*(st.sampled_from([column, *NAMES[column]]) for column in COLUMNS)))
def test_any_name_of_each_column_is_found(names: tuple[str, ...]) -> None:
    assert find_names(None, names) == names
    (pair,) = read(names).pairs
    assert (pair.source, pair.target, pair.source_answer, pair.target_answer) == ROW


@pytest.mark.parametrize("column", COLUMNS[2:])
def test_ids_are_found_under_each_name_of_an_answer(column: str) -> None:
    at = COLUMNS.index(column)
    for name in (column, *NAMES[column]):
        names = [*COLUMNS[:at], f"{name}_idx", *COLUMNS[at + 1 :]]
        row = {**dict(zip(names, ROW, strict=True)), f"{name}_idx": "7"}
        (pair,) = PromptPairs.from_rows([row], TOKENIZER).pairs
        assert getattr(pair, column) == 7


def test_no_name_is_that_of_two_columns() -> None:
    names = [name for column in COLUMNS for name in (column, *NAMES[column])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("column", COLUMNS)
def test_two_names_of_one_column_are_not_chosen_from(column: str) -> None:
    at = COLUMNS.index(column)
    for one, other in itertools.combinations(NAMES[column], 2):
        names = [*COLUMNS[:at], one, *COLUMNS[at + 1 :], other]
        row = dict(zip(names, [*ROW, "neither"], strict=True))
        with pytest.raises(TokensError) as caught:
            PromptPairs.from_rows([row], TOKENIZER)
        remedy = {column: one}
        assert str(caught.value) == (
            f"{column} may be {one!r} or {other!r}: choose by columns=, such as columns={remedy}"
        )
        pairs = PromptPairs.from_rows([row], TOKENIZER, columns=remedy)
        assert pairs.columns == {other: ("neither",)}


def test_a_columns_own_name_comes_before_others() -> None:
    row = {**dict(zip(COLUMNS, ROW, strict=True)), "clean": "not this", "label": "nor this"}
    pairs = PromptPairs.from_rows([row], TOKENIZER)
    assert pairs.pairs[0].source == ROW[0]
    assert pairs.columns == {"clean": ("not this",), "label": ("nor this",)}


def test_columns_come_before_all_names() -> None:
    row = dict(zip(COLUMNS, ["not this", *ROW[1:]], strict=True)) | {"mine": ROW[0]}
    pairs = PromptPairs.from_rows([row], TOKENIZER, columns={"source": "mine"})
    assert pairs.pairs[0].source == ROW[0]
    # What is chosen for one column is no candidate for another.
    row = dict(zip(("clean", "corrupted", "answer", "label"), ROW, strict=True))
    pairs = PromptPairs.from_rows([row], TOKENIZER, columns={"target_answer": "label"})
    assert pairs.pairs[0].target_answer == ROW[3]


def test_a_missing_column_is_told_its_names() -> None:
    found = says(("clean", "corrupted", "answer", "other"))
    assert found == (
        "no column 'target_answer'; there are clean, corrupted, answer, other; it may also be "
        f"called {', '.join(NAMES['target_answer'])}, and columns= names any other"
    )


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        (("Clean", "corrupted", "answer", "wrong_answer"), {"source": "Clean"}),
        (("clean", "corupted", "answer", "wrong answer"), None),
    ],
)
def test_a_name_that_is_nearly_one_is_meant(
    names: tuple[str, ...], meant: dict[str, str] | None
) -> None:
    found = says(names)
    every = dict(zip(COLUMNS, names, strict=True))
    assert found.endswith(f"; did you mean columns={every!r}?")
    assert meant is None or set(meant.items()) <= set(every.items())
    assert len(read(names, columns=every)) == 1


def test_a_prompt_inside_of_an_object_brings_its_answer() -> None:
    row = {
        "clean": {"prompt": ROW[0], "answer": ROW[2], "kind": "a"},
        "corrupted": {"prompt": ROW[1], "label": ROW[3], "kind": "b"},
        "label": "of neither",
    }
    pairs = PromptPairs.from_rows([row], TOKENIZER)
    (pair,) = pairs.pairs
    assert (pair.source, pair.target, pair.source_answer, pair.target_answer) == ROW
    kept = {"clean.kind": ("a",), "corrupted.kind": ("b",), "label": ("of neither",)}
    assert pairs.columns == kept
    chosen = {"source": "clean", "target": "corrupted", "target_answer": "corrupted.label"}
    assert PromptPairs.from_rows([row], TOKENIZER, columns=chosen).pairs == pairs.pairs


def test_the_page_lists_the_names() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for column in COLUMNS:
        [line] = re.findall(rf"^\| `{column}` \|(.*)\|$", page, re.MULTILINE)
        assert re.findall(r"`(\w+)`", line) == list(NAMES[column])
