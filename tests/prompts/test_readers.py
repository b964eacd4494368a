"""Tables of every kind give the same pairs, and name their faulty rows all at once."""

from __future__ import annotations

import builtins
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

from nnpatch_core import PromptPairs
from nnpatch_core.errors import (
    AnswerError,
    AnswerWarning,
    PromptWarning,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.testing import tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = ["<user>", "<assistant>", "<system>", "<end>"]
CITIES = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome"}
FORMS = ["The capital of {} is", "{} has the capital"]
TOKENIZER = tiny_tokenizer(
    [
        *(form.format(country) for form in FORMS for country in CITIES),
        *(f"{space}{city}" for space in ("", " ") for city in [*CITIES.values(), "Lyon"]),
    ],
    chat_template=TEMPLATE,
    additional_special_tokens=TURNS,
)
NAMES = ("clean", "corrupted", "answer", "wrong_answer")
#: Reads rows, written as a table of some kind.
Kind = Callable[..., PromptPairs]


def as_csv(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    """Lists and objects are JSON in their cells."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {name: it if isinstance(it, str) else json.dumps(it) for name, it in row.items()}
        )
    path.with_suffix(".csv").write_text(file.getvalue(), encoding="utf-8")
    return PromptPairs.from_csv(path.with_suffix(".csv"), TOKENIZER, **options)


def as_jsonl(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return PromptPairs.from_jsonl(path.with_suffix(".jsonl"), TOKENIZER, **options)


def as_json(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    path.with_suffix(".json").write_text(json.dumps({"seed": 3, "rows": rows}), encoding="utf-8")
    return PromptPairs.from_json(path.with_suffix(".json"), TOKENIZER, **options)


def as_frame(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    return PromptPairs.from_dataframe(pd.DataFrame(rows), TOKENIZER, **options)


def as_rows(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    return PromptPairs.from_rows(iter(rows), TOKENIZER, **options)


def as_parquet(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path.with_suffix(".parquet"))
    return PromptPairs.from_parquet(path.with_suffix(".parquet"), TOKENIZER, **options)


def as_arrow(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    return PromptPairs.from_table(table, TOKENIZER, **options)


def as_polars(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    frame = pytest.importorskip("polars").DataFrame(rows)
    return PromptPairs.from_dataframe(frame, TOKENIZER, **options)


def as_dataset(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    dataset = pytest.importorskip("datasets").Dataset.from_list(rows)
    return PromptPairs.from_dataset(dataset.with_format("numpy"), TOKENIZER, **options)


class Split:
    """What is used of a `datasets.Dataset`."""

    features: Mapping[str, Any] = {}

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.form: Any = "torch"

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0])

    def with_format(self, form: Any) -> Split:
        self.form = form
        return self

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.form is None
        return iter(self.rows)


def as_split(rows: list[dict[str, Any]], path: Path, **options: Any) -> PromptPairs:
    return PromptPairs.from_dataset(Split(rows), TOKENIZER, **options)


KINDS: dict[str, Kind] = {
    its.__name__: its
    for its in (
        as_csv,
        as_jsonl,
        as_json,
        as_frame,
        as_rows,
        as_split,
        as_parquet,
        as_arrow,
        as_polars,
        as_dataset,
    )
}


def pair(form: int, one: str = "France", other: str = "Japan", **more: Any) -> dict[str, Any]:
    prompts = [FORMS[form].format(country) for country in (one, other)]
    return dict(zip(NAMES, [*prompts, f" {CITIES[one]}", f" {CITIES[other]}"], strict=True)) | more


def assert_same(one: PromptPairs, other: PromptPairs) -> None:
    assert one.pairs == other.pairs
    assert one.columns == other.columns
    for name in ("tokens", "attention_mask", "answer_index", "answer_sets"):
        for side in ("source", "target"):
            mine, its = (getattr(pairs, f"{side}_{name}") for pairs in (one, other))
            assert (mine is None and its is None) or torch.equal(mine, its)


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from("xyz")), min_size=1, max_size=5))
@settings(max_examples=10, deadline=None)
def test_tables_of_all_kinds_give_the_same_pairs(
    tmp_path_factory: Any, kind: str, drawn: list[tuple[int, str]]
) -> None:
    rows = [pair(form, template=letter) for form, letter in drawn]
    found = KINDS[kind](rows, tmp_path_factory.mktemp("kinds") / "table")
    columns = ([row[name] for row in rows] for name in NAMES)
    extra = {"template": [letter for _, letter in drawn]}
    assert_same(found, PromptPairs.from_texts(*columns, TOKENIZER, extra=extra))


def asked(country: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": FORMS[0].format(country)}]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_and_lists_of_answers_in_tables_of_all_kinds(kind: str, tmp_path: Path) -> None:
    rows = [
        {
            "clean": asked("France"),
            "corrupted": asked("Japan"),
            "answer": ["Paris", "Lyon"],
            "wrong_answer": ["Tokyo"],
        }
        for _ in range(2)
    ]
    found = KINDS[kind](rows, tmp_path / "table")
    columns = ([row[name] for row in rows] for name in NAMES)
    assert_same(found, PromptPairs.from_texts(*columns, TOKENIZER))
    # The answer opens the assistant's turn.
    assert found.source_tokens[0, -1] == TOKENIZER.convert_tokens_to_ids("<assistant>")
    names = [TOKENIZER.decode(token) for token in found.source_answer_sets[0]]
    assert names == ["Paris", "Lyon"]


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "as_csv"])
def test_objects_inside_of_rows_are_columns(kind: str, tmp_path: Path) -> None:
    rows = [pair(0, about={"kind": "a", "of": {"n": 1}}), pair(1, about={"kind": "b", "of": None})]
    found = KINDS[kind](rows, tmp_path / "table")
    assert found.columns["about.kind"] == ("a", "b")
    assert found.columns["about.of.n"][0] == 1
    assert {key: len(its) for key, its in found.groups("about.of.n").items()} == {1: 1, None: 1}


PLACES = {
    "as_csv": ("2 of 3 lines", "line 3, ", "line 4, "),
    "as_jsonl": ("2 of 3 lines", "line 2, ", "line 3, "),
    "as_json": ("2 of 3 items", "item 1, ", "item 2, "),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_faulty_rows_are_told_at_once_by_their_place(kind: str, tmp_path: Path) -> None:
    rows = [pair(0), pair(0, answer=" New York"), {**pair(0), "clean": "", "answer": " Quito"}]
    with pytest.raises(TokensError) as caught:
        KINDS[kind](rows, tmp_path / "table")
    count, second, third = PLACES.get(kind, ("2 of 3 rows", "row 1, ", "row 2, "))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{count} cannot be used"
    assert lines[1].startswith(f"{second}column answer: ' New York' is ")
    assert lines[2].startswith(f"{third}column clean: must be a non-empty text, got ''")
    with pytest.warns(PromptWarning, match=f"{count} were dropped"):
        assert len(KINDS[kind](rows, tmp_path / "table", faulty="drop")) == 1


@pytest.mark.parametrize("kind", ["as_jsonl", "as_json", "as_rows", "as_split"])
def test_what_a_row_lacks_hides_no_other_fault_of_it(kind: str, tmp_path: Path) -> None:
    lacking = pair(0, wrong_answer=" New York")
    del lacking["answer"]
    with pytest.raises(TokensError) as caught:
        KINDS[kind]([pair(0), {**lacking, "clean": ""}], tmp_path / "table")
    faults = str(caught.value).splitlines()[0].split("; ")
    assert [fault.partition("column ")[2].partition(" is ")[0] for fault in faults] == [
        "answer:",
        "clean: must be a non-empty text, got ''",
        "wrong_answer: ' New York'",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_integers_in_a_table_are_ids_and_told(kind: str, tmp_path: Path) -> None:
    rows = [pair(0, answer=7, wrong_answer=9)]
    if kind == "as_csv":
        assert len(KINDS[kind](rows, tmp_path / "table", answers="ids")) == 1
        return
    with pytest.warns(AnswerWarning, match="integers were taken as token ids: 7 is the token"):
        found = KINDS[kind](rows, tmp_path / "table")
    assert found.source_answer_index.tolist() == [7]
    KINDS[kind](rows, tmp_path / "table", answers="ids")
    renamed = [{"clean": row["clean"], "corrupted": row["corrupted"]} for row in rows]
    named = [{**row, "correct_idx": 7, "incorrect_idx": 9} for row in renamed]
    assert_same(KINDS[kind](named, tmp_path / "named"), found)
    with pytest.raises(AnswerError, match="column answer: ' 7' is not in the tokenizer's vocab"):
        KINDS[kind](rows, tmp_path / "table", answers="texts")


# from_table chooses -----------------------------------------------------------------------------


def test_a_table_is_read_by_its_kind(tmp_path: Path) -> None:
    rows = [pair(0, template="x"), pair(1, template="y")]
    expected = as_rows(rows, tmp_path)
    for kind in (as_csv, as_jsonl, as_json):
        kind(rows, tmp_path / "table")
    path = tmp_path / "table"
    path.with_suffix(".ndjson").write_bytes(path.with_suffix(".jsonl").read_bytes())
    tables: list[Any] = [
        path.with_suffix(f".{kind}") for kind in ("csv", "jsonl", "json", "ndjson")
    ]
    tables += [str(path.with_suffix(".csv")), pd.DataFrame(rows), rows, iter(rows), Split(rows)]
    for table in tables:
        assert_same(PromptPairs.from_table(table, TOKENIZER), expected)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("pairs.txt", "pairs.txt: which kind of table it is, its name does not say: it may end"),
        ("pairs", "from_csv, from_jsonl, from_json and from_parquet read files of any name"),
        ("missing.csv", "missing.csv cannot be read: "),
        (None, "rows must be a list of mappings"),
        (5, "rows must be a list of mappings"),
        ({"clean": ["a"]}, "rows must be a list of mappings"),
        ([5, "a"], "2 of 2 rows cannot be used\nrow 0: must name its values, got 5\nrow 1: must"),
        ([], "there are no prompt pairs"),
    ],
)
def test_what_is_no_table(table: Any, message: str) -> None:
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_table(table, TOKENIZER)
    assert message in str(caught.value)


def test_options_are_checked_before_a_table_is_read() -> None:
    with pytest.raises(TypeError, match=r"from_table\(\) got an unexpected .* did you mean 'layo"):
        PromptPairs.from_table("missing.csv", TOKENIZER, layuot="counterfact")
    with pytest.raises(UnknownNameError) as caught:
        PromptPairs.from_table("missing.csv", TOKENIZER, layout="counter-fact")
    assert str(caught.value) == (
        "unknown layout 'counter-fact' (did you mean counterfact?); there are counterfact, "
        "greater-than"
    )
    for name in ("jsonl", "json", "parquet", "rows", "dataset", "table"):
        with pytest.raises(TokensError, match=rf"^from_{name}\(\w+, tokenizer\) takes the token"):
            getattr(PromptPairs, f"from_{name}")(TOKENIZER, "missing.csv")


# JSON -------------------------------------------------------------------------------------------


def test_faulty_lines_of_jsonl_are_told_at_once(tmp_path: Path) -> None:
    good = json.dumps(pair(0))
    lines = [
        good.encode(),
        b'{"clean": "The",',
        b"",
        b"[1]",
        '{"clean": "é"}'.encode("latin-1"),
        b'{"clean": "a", "clean": "b"}',
        good.replace('"answer"', '"reply"').encode(),
        b"[" * 100_000,
        good.encode(),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\n")
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_jsonl(path, TOKENIZER)
    told = str(caught.value).splitlines()
    assert told[0] == "6 of 8 lines cannot be used"
    for found, part in zip(
        told[1:],
        (
            "line 2: is no JSON: Expecting property name enclosed in double quotes (character 17)",
            "line 4: must name its values, got [1]",
            'line 5: is not UTF-8: b\'{"clean": "\\xe9"}\'',
            "line 6: is no JSON: an object has two values for 'clean'",
            "line 7, column answer: is missing",
            "line 8: is no JSON: ",
            "save the file as UTF-8",
            "faulty='drop' leaves them out",
        ),
        strict=True,
    ):
        assert found.startswith(part)
        # A line that is no object lacks no columns besides.
        assert "; " not in found
    with pytest.warns(PromptWarning, match="6 of 8 lines were dropped"):
        assert len(PromptPairs.from_jsonl(path, TOKENIZER, faulty="drop")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: it is no JSON: Expecting value (character 1)"),
        ('[{"a": 1},\n]', "line 2: it is no JSON: "),
        ('{"a": 1}\n{"a": 2}', "Extra data (character 1); from_jsonl reads an object in each line"),
        ('[{"a": 1, "a": 2}]', "it is no JSON: an object has two values for 'a'"),
        ("5", "must be a list of objects, or an object with one such list, got 5; pandas writes"),
        ('{"clean": {"0": "a"}}', "pandas writes one with orient='records'"),
        ('{"a": [{}], "b": [{}]}', "'a' and 'b' are lists of objects: pass one to PromptPairs.fro"),
        ("[]", "there are no prompt pairs"),
        ("[{}]", "item 0, column source: must be a non-empty text, or a list of messages, got"),
        ('[{"a": 1}]', "\nsource may also be called clean, "),
        ("[" * 100_000, "it is no JSON: "),
    ],
)
def test_files_that_are_no_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_json(path, TOKENIZER)
    assert message in str(caught.value)


def test_json_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_bytes('[{"clean": "é"}]'.encode("latin-1"))
    with pytest.raises(TokensError, match=r"pairs.json is not UTF-8: save the file as UTF-8"):
        PromptPairs.from_json(path, TOKENIZER)


def test_an_empty_jsonl(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(TokensError, match=r"pairs.jsonl: no column 'source', .*; there are none"):
        PromptPairs.from_jsonl(tmp_path / "pairs.jsonl", TOKENIZER)


def test_one_name_for_two_values() -> None:
    row = pair(0, about={"kind": "a"}) | {"about.kind": "b"}
    with pytest.raises(TokensError, match=r"row 0: has two values for 'about.kind'"):
        PromptPairs.from_rows([row], TOKENIZER)


# Libraries --------------------------------------------------------------------------------------


def test_without_pyarrow_the_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(builtins, "__import__", imported)
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_parquet(tmp_path / "pairs.parquet", TOKENIZER)
    assert str(caught.value) == "this needs pyarrow: pip install 'nnpatch-core[parquet]'"


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "pairs.parquet").write_bytes(b"PAR2")
    for path in (tmp_path / "pairs.parquet", tmp_path / "missing.parquet"):
        with pytest.raises(TokensError, match=r"\.parquet cannot be read as Parquet: "):
            PromptPairs.from_parquet(path, TOKENIZER)


class Stream:
    features = None
    column_names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"train": 1, "test": 2}, "one split, such as dataset['train']: it has 'train', 'test'"),
        (Stream(), "take some of it, as PromptPairs.from_rows(dataset.take(1000), tokenizer)"),
        ("mib-bench/ioi", "one split of what datasets.load_dataset gives, got 'mib-bench"),
        ([pair(0)], "dataset must be a datasets.Dataset"),
    ],
)
def test_what_is_no_data_set(dataset: Any, message: str) -> None:
    with pytest.raises(TokensError) as caught:
        PromptPairs.from_dataset(dataset, TOKENIZER)
    assert message in str(caught.value)


def test_streams_and_splits_of_the_library() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([pair(0), pair(1)])
    with pytest.raises(TokensError, match=r"it has 'train'$"):
        PromptPairs.from_table(datasets.DatasetDict(train=dataset), TOKENIZER)
    stream = dataset.to_iterable_dataset()
    with pytest.raises(TokensError, match="dataset is a stream"):
        PromptPairs.from_table(stream, TOKENIZER)
    assert len(PromptPairs.from_rows(stream.take(1), TOKENIZER)) == 1


def test_a_frame_that_is_not_computed_yet() -> None:
    polars = pytest.importorskip("polars")
    with pytest.raises(TokensError, match=r"pass frame.collect\(\)"):
        PromptPairs.from_table(polars.DataFrame([pair(0)]).lazy(), TOKENIZER)
