"""Further columns of the user's table stay beside the pairs, and split them into groups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from nnpatch_core import PromptPairs
from nnpatch_core.errors import PromptWarning, TokensError, UnknownNameError
from nnpatch_core.prompts import COLUMNS
from nnpatch_core.testing import tiny_tokenizer

CITIES = {"France": " Paris", "Japan": " Tokyo", "Italy": " Rome"}
FORMS = ["The capital of {} is", "{} has the capital", "So the capital city of {} is"]
TOKENIZER = tiny_tokenizer([form.format("France Japan Italy Paris Tokyo Rome") for form in FORMS])


def rows(forms: list[int]) -> list[tuple[str, str, str, str]]:
    """A pair of each form, all of the same two countries."""
    return [
        (FORMS[form].format("France"), FORMS[form].format("Japan"), " Paris", " Tokyo")
        for form in forms
    ]


def made(forms: list[int], **extra: Any) -> PromptPairs:
    lists = [list(column) for column in zip(*rows(forms), strict=True)]
    return PromptPairs.from_texts(*lists, TOKENIZER, extra=extra)


def assert_same(one: PromptPairs, other: PromptPairs) -> None:
    assert one.pairs == other.pairs
    assert one.columns == other.columns
    others: dict[str, Any] = {**other.arguments()}
    for name, value in one.arguments().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, others[name]), name
            assert value.dtype == others[name].dtype


Make = Callable[[pd.DataFrame, Path], PromptPairs]
MAKERS: dict[str, Make] = {
    "texts": lambda frame, _: PromptPairs.from_texts(
        *(frame[name].tolist() for name in COLUMNS),
        TOKENIZER,
        extra={name: frame[name] for name in frame if name not in COLUMNS},
    ),
    "frame": lambda frame, _: PromptPairs.from_dataframe(frame, TOKENIZER),
    "csv": lambda frame, path: PromptPairs.from_csv(
        (frame.to_csv(path / "pairs.csv", index=False), path / "pairs.csv")[1], TOKENIZER
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_further_columns_come_along(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows([0, 1]), columns=COLUMNS)
    frame.insert(0, "template", ["a", "b"])
    frame["some note"] = ["x, y", "é"]
    pairs = MAKERS[kind](frame, tmp_path)
    assert pairs.columns == {"template": ("a", "b"), "some note": ("x, y", "é")}
    assert list(pairs.columns) == ["template", "some note"]
    assert pairs.swapped().columns == pairs.columns
    assert not {"columns", "template"} & set(pairs.arguments())


@pytest.mark.parametrize("kind", MAKERS)
def test_dropped_pairs_take_their_values_along(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame(rows([0, 1, 2]), columns=COLUMNS)
    frame["template"] = ["a", "b", "c"]
    frame.loc[1, "target"] = ""
    makers: dict[str, Make] = {
        "texts": lambda frame, _: PromptPairs.from_texts(
            *(frame[name].tolist() for name in COLUMNS),
            TOKENIZER,
            extra={"template": frame["template"]},
            faulty="drop",
        ),
        "frame": lambda frame, _: PromptPairs.from_dataframe(frame, TOKENIZER, faulty="drop"),
        "csv": lambda frame, path: PromptPairs.from_csv(
            (frame.to_csv(path / "pairs.csv", index=False), path / "pairs.csv")[1],
            TOKENIZER,
            faulty="drop",
        ),
    }
    with pytest.warns(PromptWarning, match="1 of 3"):
        pairs = makers[kind](frame, tmp_path)
    assert pairs.columns == {"template": ("a", "c")}
    assert list(pairs.groups("template")) == ["a", "c"]
    assert all(group.dropped == () for group in pairs.groups("template").values())


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["x", "y", None, 3])), min_size=1))
@settings(max_examples=60)
def test_a_group_is_what_its_pairs_alone_would_be(drawn: list[tuple[int, Any]]) -> None:
    forms, values = [form for form, _ in drawn], [value for _, value in drawn]
    groups = made(forms, kind=values, form=forms).groups("kind")
    assert list(groups) == list(dict.fromkeys(values))
    for value, group in groups.items():
        alone = [form for form, its in drawn if its == value]
        assert_same(group, made(alone, kind=[value] * len(alone), form=alone))


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NA, pd.NaT])
def test_missing_values_are_a_group_of_their_own(missing: Any) -> None:
    pairs = made([0, 0, 0, 0], kind=["a", missing, "None", float("nan")])
    groups = pairs.groups("kind")
    assert list(groups) == ["a", None, "None"]
    assert list(map(len, groups.values())) == [1, 2, 1]


def test_of_a_frame_a_missing_value_is_one_too() -> None:
    frame = pd.DataFrame(rows([0, 1, 2]), columns=COLUMNS)
    frame["kind"] = ["a", None, "a"]
    assert {key: len(it) for key, it in frame_groups(frame).items()} == {"a": 2, None: 1}
    frame["kind"] = pd.array([1, None, 1], dtype="Int64")
    assert {key: len(it) for key, it in frame_groups(frame).items()} == {1: 2, None: 1}


def frame_groups(frame: pd.DataFrame) -> dict[Any, PromptPairs]:
    return PromptPairs.from_dataframe(frame, TOKENIZER).groups("kind")


def test_an_unknown_column_is_told_which_there_are() -> None:
    pairs = made([0], template=["a"], number=[1])
    with pytest.raises(UnknownNameError) as caught:
        pairs.groups("templates")
    assert str(caught.value) == (
        "no column 'templates' (did you mean template?); there are template, number"
    )
    with pytest.raises(UnknownNameError, match="no column 5; there are template, number"):
        pairs.groups(5)
    with pytest.raises(UnknownNameError, match="no column 'template'; there are none"):
        made([0]).groups("template")


def test_values_that_make_no_groups() -> None:
    with pytest.raises(TokensError, match=r"column names makes no groups: pair 1 has \['Al'\]"):
        made([0, 0], names=["a", ["Al"]]).groups("names")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["template"], "extra must be a mapping, such as"),
        ({"template": "ab"}, "template must be a list, with one value for each pair, got 'ab'"),
        ({"template": 5}, "template must be a list, with one value for each pair, got 5"),
        ({"template": ["a"]}, "target_answer 2, template 1"),
        ({"target": ["a", "b"]}, "extra names 'target', which is an argument of its own"),
    ],
)
def test_extra_that_cannot_be_meant(extra: Any, message: str) -> None:
    lists = [list(column) for column in zip(*rows([0, 1]), strict=True)]
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_texts(*lists, TOKENIZER, extra=extra)
    assert message in str(caught.value)


def test_a_table_takes_no_extra(tmp_path: Path) -> None:
    for make in (PromptPairs.from_csv, PromptPairs.from_dataframe):
        with pytest.raises(TypeError, match="unexpected keyword argument 'extra'"):
            make(tmp_path, TOKENIZER, extra={})


# Some of the pairs ------------------------------------------------------------------------------

PICKS: list[Any] = [
    0,
    -1,
    np.int64(2),
    torch.tensor(1),
    slice(1, None),
    slice(None, None, -1),
    [2, 0],
    [-1, -1],
    (1,),
    np.array([0, 2]),
    torch.tensor([2, 1]),
    [True, False, True],
    np.array([False, True, True]),
    torch.tensor([True, False, False]),
]


@pytest.mark.parametrize("picked", PICKS, ids=repr)
def test_picked_pairs_are_what_they_would_be_alone(picked: Any) -> None:
    forms = [0, 1, 2]
    expected = np.array(forms)[
        picked.tolist() if isinstance(picked, torch.Tensor) else picked
    ].reshape(-1)
    pairs = made(forms, form=forms)[picked]
    alone = [int(form) for form in expected]
    assert_same(pairs, made(alone, form=alone))


@pytest.mark.parametrize(
    ("picked", "message"),
    [
        ([3], "there is no pair 3; there are 3"),
        ([0, -4], "there is no pair -4; there are 3"),
        ([True, False], "a mask of 2 picks of 3 pairs; give one for each"),
        ([False] * 3, "picks none of 3 pairs"),
        ([], "picks none of 3 pairs"),
        (slice(3, None), "picks none of 3 pairs"),
        (slice("a", None), "picks no pairs"),
        ("template", "the number of a pair must be an integer, got 'template'"),
        (1.0, "the number of a pair must be an integer, got 1.0"),
        (True, "the number of a pair must be an integer, got True"),
        ([1, 2.5], "the number of a pair must be an integer, got 2.5"),
        ([True, 1, 2], "the number of a pair must be an integer, got True"),
        (None, "the number of a pair must be an integer, got None"),
    ],
)
def test_what_picks_no_pairs(picked: Any, message: str) -> None:
    with pytest.raises(TokensError) as caught:
        made([0, 1, 2])[picked]
    assert message in str(caught.value)


def test_a_loop_over_pairs_ends() -> None:
    pairs = made([0, 1], form=[0, 1])
    assert [pair.columns["form"] for pair in pairs] == [(0,), (1,)]
    with pytest.raises(IndexError, match="there is no pair 2; there are 2"):
        pairs[2]


def test_parts_share_no_memory() -> None:
    pairs = made([0, 0])
    part = pairs[:1]
    part.source_tokens[0, 0] += 1
    assert not torch.equal(part.source_tokens[0], pairs.source_tokens[0])


# Files ------------------------------------------------------------------------------------------

HEADER = ",".join(COLUMNS)
LINE = ",".join(rows([0])[0])


def read(path: Path, content: str | bytes, **options: Any) -> PromptPairs:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return PromptPairs.from_csv(path, TOKENIZER, **options)


def test_columns_of_one_name_are_left_out_and_told(tmp_path: Path) -> None:
    with pytest.warns(PromptWarning, match="columns of one name are left out: 'note'"):
        pairs = read(tmp_path / "a.csv", f"{HEADER},note,x,note\n{LINE},1,2,3\n")
    assert pairs.columns == {"x": ("2",)}
    frame = pd.DataFrame([[*rows([0])[0], 1, 2]], columns=[*COLUMNS, "note", "note"])
    with pytest.warns(PromptWarning, match="columns of one name are left out: 'note'"):
        assert PromptPairs.from_dataframe(frame, TOKENIZER).columns == {}


def test_columns_without_a_name_behind_the_table_are_none(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", f"{HEADER},,\n{LINE},,\n").columns == {}
    assert read(tmp_path / "a.csv", f",{HEADER}\n7,{LINE}\n").columns == {"": ("7",)}


def test_a_renamed_column_is_no_further_one(tmp_path: Path) -> None:
    content = f"{HEADER.replace('source,', 'clean,')},source\n{LINE},mine\n"
    pairs = read(tmp_path / "a.csv", content, columns={"source": "clean"})
    assert pairs.columns == {"source": ("mine",)}


def test_bytes_that_are_no_utf_8_stay_printable(tmp_path: Path) -> None:
    content = f"{HEADER},nöte\n{LINE},é\n".encode("latin-1")
    (name,) = read(tmp_path / "a.csv", content).columns
    assert name == r"n\xf6te"
    assert read(tmp_path / "a.csv", content).columns[name] == (r"\xe9",)


def test_a_row_with_too_few_fields_lacks_the_further_ones_last(tmp_path: Path) -> None:
    pairs = read(tmp_path / "a.csv", f"{HEADER},note\n{LINE}\n{LINE},x\n")
    assert pairs.columns == {"note": (None, "x")}
    assert list(pairs.groups("note")) == [None, "x"]
