"""Faulty tables, models and settings: each fault is named by its place, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import Command
from tests.helpers.runs import HEADER, Files, lines, row

GOOD = lines(2)

#: A table, and parts of what is said of it.
TABLES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["line 1", "empty"]),
    "header alone": (HEADER.encode(), ["no"]),
    "no column": (b"clean,corrupted,answer\na,b,c\n", ["line 1", "target_answer"]),
    "no columns": (b"clean,right,wrong\na,b,c\n,b,c\n", [
        "line 1", "no column 'target', 'source_answer' or 'target_answer'", "line 3, column clean",
    ]),
    "no columns that are chosen": ("\n".join([*GOOD, ",x, Oslo, Cairo", "a,b"]).encode(), [
        "line 1", "no column 'a' or 'b'", "line 4, column clean", "line 5, column answer",
        "column 'c'"]),
    "two columns": (b"clean,clean,corrupted,answer,wrong_answer\n", ["line 1", "clean"]),
    "semicolons": ("\n".join(GOOD).replace(",", ";").encode(), ["line 1", ";"]),
    "UTF-16": ("\n".join(GOOD).encode("utf-16"), ["UTF-8"]),
    "Latin-1": ("\n".join([*GOOD, row("Cuba", "Spain")]).replace("Now Cuba", "Caf\xe9 Cuba")
                .encode("latin-1"), ["line 4, column clean", "UTF-8"]),
    "too few fields": ("\n".join([*GOOD, "a,b,c"]).encode(), ["line 4, column wrong_answer"]),
    "too many fields": ("\n".join([*GOOD, "a,b,c,d,e"]).encode(), ["line 4", "quotes"]),
    "empty prompt": ("\n".join([*GOOD, ",Now Cuba is, Paris, Oslo"]).encode(),
                     ["line 4, column clean"]),
    "empty answer": ("\n".join([*GOOD, "Now Cuba is,Now Spain is,, Oslo"]).encode(),
                     ["line 4, column answer"]),
    "an answer of several tokens": ("\n".join(
        [*GOOD, "Now Cuba is,Now Spain is, Paris Oslo, Oslo"]).encode(),
        ["line 4, column answer", "--multi-token first"]),
    "one answer for both": ("\n".join([*GOOD, "Now Cuba is,Now Spain is, Oslo, Oslo"]).encode(),
                            ["line 4, column answer", "--faulty drop"]),
    "several faults": ("\n".join([*GOOD, ",x, Oslo, Cairo", *GOOD[1:], "a,b"]).encode(),
                       ["line 4, column clean", "line 7, column answer"]),
    "an open quote": ("\n".join([*GOOD, '"Now Cuba is,b,c,d']).encode(), ["line 4"]),
    "a NUL": ("\n".join([*GOOD, "Now\0Cuba,b,c,d"]).encode(), ["line 4"]),
}  # fmt: skip
#: Columns that are in no table.
CHOSEN = ["--columns", "target=a,target_answer=b", "--spans", "noun=c"]
#: The same of files of other kinds.
OTHERS: dict[str, tuple[str, bytes, list[str]]] = {
    "no JSON": ("t.jsonl", b'{"clean": "a"\n', ["line 1", "JSON"]),
    "no objects": ("t.json", b'["a", "b"]', ["item 0"]),
    "no Parquet": ("t.parquet", b"PAR1", ["Parquet"]),
    "another kind": ("t.xlsx", b"PK", [".csv", ".parquet"]),
    "no such column": ("t.jsonl", b'{"clean": "a"}\n', ["column"]),
}


def refused(nnpatch: Command, *arguments: object) -> list[str]:
    done = nnpatch(*arguments)
    assert done.code == 2
    assert done.out == ""
    told = done.err.splitlines()
    assert told[0].startswith("nnpatch: error: ")
    return told


@pytest.mark.parametrize("name", TABLES)
def test_faulty_csv(files: Files, nnpatch: Command, name: str) -> None:
    content, parts = TABLES[name]
    files.table.write_bytes(content)
    options = CHOSEN if name == "no columns that are chosen" else []
    told = "\n".join(refused(nnpatch, "run", *files.arguments, *options))
    for part in parts:
        assert part in told
    assert not Path("nnpatch-pairs").exists()


@pytest.mark.parametrize("name", OTHERS)
def test_faulty_tables_of_other_kinds(files: Files, nnpatch: Command, name: str) -> None:
    path, content, parts = OTHERS[name]
    Path(path).write_bytes(content)
    told = "\n".join(refused(nnpatch, "run", path, "--model", files.model))
    for part in parts:
        assert part in told


def test_faults_of_table_and_sites_come_together(files: Files, nnpatch: Command) -> None:
    files.table.write_text("\n".join([*GOOD, "a,b,c"]), "utf-8")
    told = refused(nnpatch, "run", *files.arguments, "--sites", "residual")
    assert any("line 4, column wrong_answer" in line for line in told)
    assert any("'residual'" in line for line in told)


def test_all_faults_of_a_run_come_together(files: Files, nnpatch: Command) -> None:
    """Of the folder, the table, metrics and nodes, each of them once."""
    Path("o").mkdir()
    Path("o/thesis.tex").write_text("dear", "utf-8")
    files.table.write_text(files.table.read_text("utf-8").replace("clean,", "Clean,"), "utf-8")
    options = ["--method", "edges", "--metrics", "a,b", "--senders", "a9.h0,m77", "--out", "o"]
    told = refused(nnpatch, "run", *files.arguments, *options)
    for part in ("has other files", "'a'", "'b'", "a9.h0", "m77"):
        assert sum(part in line for line in told) == 1, part
    renaming = "--columns source=Clean,target=corrupted,source_answer=answer,"
    assert any(f"did you mean {renaming}target_answer=wrong_answer?" in line for line in told)
    faulty = refused(nnpatch, "run", *files.arguments, "--layers", "a", "--heads", "2-1")
    assert [line.removeprefix("nnpatch: error:").strip().partition(":")[0] for line in faulty] == [
        "--layers",
        "--heads",
    ]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--layers", "9"], "layer"),
        (["--layers", "a"], "layers: 'a' is no number"),
        (["--layers", "3-1"], "layers: '3-1' is no range"),
        (["--sites", "o", "--heads", "77"], "head"),
        (["--heads", "1"], "heads: say of which sites"),
        (["--method", "activaton"], "--method: there is no 'activaton'"),
        (["--method", "path"], "--senders: a path needs senders and receivers"),
        (["--metrics", "logit_diference"], "logit_difference"),
        (["--method", "edges", "--senders", "a9.h0"], "a9.h0"),
        (["--method", "edges", "--receivers", "a0.h7<k>"], "a0.h7<k>"),
        (["--senders", "m0"], "--senders: means nothing with method 'activation'"),
        (["--top-k", "3"], "--top-k: means nothing without screen"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--level", "1"], "--level: must lie between 0 and 1"),
        (["--columns", "question"], "columns: 'question' is not NAME=COLUMN"),
        (["--sites", "o", "--positions", "lats"], "last"),
        (["--positions", "last"], "positions: say of which sites"),
        (["--at", "2"], "--at: means nothing without positions"),
        (["--sites", "o,,q"], "--sites: has an empty part"),
        (["--quantize", "4bit"], "bitsandbytes"),
        (["--api", "Lama3"], "Llama3"),
        (["--tokenizer", "./nix"], "tokenizer: there is no ./nix"),
        (["--top-k", "many"], "--top-k"),
    ],
)
def test_faulty_options(files: Files, nnpatch: Command, arguments: list[str], part: str) -> None:
    done = nnpatch("run", *files.arguments, *arguments)
    assert (done.code, done.out) == (2, "")
    assert "nnpatch: error: " in done.err
    assert part in done.err
    assert not Path("nnpatch-pairs").exists()


def test_without_a_table_or_a_model(files: Files, nnpatch: Command) -> None:
    told = refused(nnpatch, "run")
    assert told == ["nnpatch: error: --model: name a model", "  TABLE: name a table"]


@pytest.mark.parametrize("value", ["{model}/nix", "./nix", "nobody/such-a-model"])
def test_no_model(files: Files, nnpatch: Command, value: str) -> None:
    name = value.format(model=files.model)
    told = "\n".join(refused(nnpatch, "run", files.table, "--model", name))
    assert name in told


def test_a_model_that_is_none(files: Files, nnpatch: Command) -> None:
    (files.model / "config.json").write_text("{", "utf-8")
    told = "\n".join(refused(nnpatch, "run", *files.arguments))
    assert str(files.model) in told


CONFIGS: dict[str, tuple[str, str]] = {
    "no TOML": ("table = = 1", "line 1"),
    "no such setting": ("table = 'x'\nmodle = 'y'\n", "line 2, modle: there is no such setting"),
    "a number": ("table = 'x'\n\nmodel = 3\n", "line 3, model: must be a text, got 3"),
    "a text": ("model = 'y'\nlimit = 'all'\n", "line 2, limit: must be a whole number"),
    "a table": (
        "model = 'y'\n[sites]\no = 1\n",
        "line 2, sites: must be a text or a list of texts",
    ),
    "a choice": ("model = 'y'\ntop-k = -1\n", "line 2, top_k: must be at least 0"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_faulty_config(files: Files, nnpatch: Command, name: str) -> None:
    text, part = CONFIGS[name]
    Path("run.toml").write_text(text, "utf-8")
    told = "\n".join(refused(nnpatch, "run", "--config", "run.toml"))
    assert "run.toml" in told
    assert part in told


@pytest.mark.parametrize("name", ["nix.toml", "."])
def test_no_config(files: Files, nnpatch: Command, name: str) -> None:
    told = refused(nnpatch, "run", "--config", name)
    assert f"{name} cannot be read" in told[0]


def test_folders_that_are_in_use(files: Files, nnpatch: Command) -> None:
    given: list[Any] = ["run", *files.arguments, "--sites", "mlp", "--out", "o"]
    Path("o").mkdir()
    Path("o/thesis.tex").write_text("dear", "utf-8")
    assert "has other files" in refused(nnpatch, *given)[0]
    Path("o/thesis.tex").unlink()
    assert nnpatch(*given).code == 0
    before = {each: each.read_bytes() for each in Path("o").iterdir()}
    assert "has a finished run" in refused(nnpatch, *given)[0]
    assert "has a finished run" in refused(nnpatch, *given, "--resume")[0]
    assert {each: each.read_bytes() for each in Path("o").iterdir()} == before
    assert nnpatch(*given, "--overwrite").code == 0
    assert "is not a folder" in refused(nnpatch, *given[:-1], files.table)[0]
