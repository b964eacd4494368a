"""A faulty row of a table is named by its line and column, and so is a faulty file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pandas as pd
import pytest
from hypothesis import given, settings

from nnpatch_core import PromptPairs
from nnpatch_core.errors import AnswerError, AnswerWarning, PromptWarning, TokensError
from nnpatch_core.prompts import COLUMNS
from nnpatch_core.testing import tiny_tokenizer

ROW = ("The capital of France is", "The capital of Japan is", " Paris", " Tokyo")
HEADER = ",".join(COLUMNS)
LINE = ",".join(ROW)
OWN = {"source": "clean", "source_answer": "right answer"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer([*ROW, " New York", "\n", "é"])


#: Writes a table.
Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(content: str | bytes) -> Path:
        path = tmp_path / "pairs.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def says(error: type[Exception], make: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        make(*args, **options)
    return str(caught.value)


def test_rows_are_named_by_line_and_own_column_all_at_once(tokenizer: Any, write: Write) -> None:
    header = "clean,target,right answer,target_answer"
    bad = LINE.replace(" Paris", " New York")
    path = write("\n".join([header, LINE, bad, "", LINE, bad, "," + LINE.split(",", 1)[1], ""]))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns=OWN)
    lines = found.splitlines()
    assert lines[0] == "3 of 5 lines cannot be used"
    assert lines[1].startswith("line 3, column right answer: ' New York' is 2 tokens")
    # The blank line counts, though it is no row.
    assert lines[2].startswith("line 6, column right answer: ' New York' is 2 tokens")
    assert lines[3].startswith("line 7, column clean: must be a non-empty text, got ''")
    with pytest.warns(PromptWarning, match="3 of 5 lines were dropped\nline 3, column right"):
        pairs = PromptPairs.from_csv(path, tokenizer, columns=OWN, faulty="drop")
    assert len(pairs) == 2
    assert [reason.split(",")[0] for _, reason in pairs.dropped] == ["line 3", "line 6", "line 7"]


@given(data=st.data())
@settings(max_examples=40)
def test_a_row_is_named_by_the_line_that_it_begins_in(tmp_path_factory: Any, data: Any) -> None:
    """Whatever line breaks stand in the quoted texts above it, and whichever end the lines."""
    breaks = st.sampled_from(["", "\n", "\r\n", "\n\n"])
    ends = data.draw(st.sampled_from(["\n", "\r\n"]))
    above = data.draw(st.lists(st.tuples(breaks, st.booleans()), max_size=4))
    tokenizer = tiny_tokenizer([*ROW, "\n", "\r"])
    path = tmp_path_factory.mktemp("tables") / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=ends)
        writer.writerow(COLUMNS)
        for inside, blank in above:
            writer.writerow([f"The{inside} capital of France is", *ROW[1:]])
            if blank:
                file.write(ends)
        written = path.read_bytes() if file.flush() is None else b""
        writer.writerow([*ROW[:2], "", ROW[3]])
    line = written.decode().replace("\r\n", "\n").count("\n") + 1
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer)
    assert found.startswith(f"line {line}, column source_answer: must be a non-empty text")


@pytest.mark.parametrize(
    ("labels", "place"),
    [(None, "row 1, "), (["a", "b"], "row 'b', "), ([7, 7], "row 7 (position 1), ")],
)
def test_rows_of_a_frame_are_named_by_their_label(
    tokenizer: Any, labels: list[int | str] | None, place: str
) -> None:
    frame = pd.DataFrame([ROW, (*ROW[:2], " New York", ROW[3])], columns=COLUMNS, index=labels)
    frame = frame.rename(columns=OWN)
    found = says(AnswerError, PromptPairs.from_dataframe, frame, tokenizer, columns=OWN)
    assert found.startswith(f"{place}column right answer: ' New York' is 2 tokens")


def test_ragged_rows_are_faults_of_their_rows(tokenizer: Any, write: Write) -> None:
    path = write("\n".join([HEADER, LINE, "The, old " + LINE, ",".join(ROW[:3]), LINE]))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer)
    for part in (
        "2 of 4 lines cannot be used",
        "line 3, column 5: the line has 5 fields, and the header 4",
        "line 4, column target_answer: is missing: the line has 3 fields, and the header 4",
    ):
        assert part in found
    with pytest.warns(PromptWarning, match="2 of 4 lines were dropped"):
        assert len(PromptPairs.from_csv(path, tokenizer, faulty="drop")) == 2


def test_bytes_that_are_no_utf_8_are_found_in_their_cell(tokenizer: Any, write: Write) -> None:
    latin = LINE.replace(" Paris", " é").encode("latin-1")
    path = write(b"\n".join([HEADER.encode(), LINE.encode(), latin, LINE.encode()]))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer)
    assert found.startswith("line 3, column source_answer: is not UTF-8: b' \\xe9'")
    with pytest.warns(PromptWarning, match="1 of 3 lines was dropped"):
        assert len(PromptPairs.from_csv(path, tokenizer, faulty="drop")) == 2


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["line 1: the file is empty, ", "no column 'source'"]),
        ("\n\n", ["line 1: ", "no column 'source'"]),
        (
            LINE + "\n" + LINE,
            ["line 1: no column 'source', 'target', ", "; there are The capital of France is, "],
        ),
        (HEADER.replace("target,", "source,"), ["line 1: no column 'target'"]),
        (HEADER + ",source\n" + LINE + ",x", ["line 1: column 'source' stands 2 times"]),
        (f'{HEADER}\n{LINE}\n"The {LINE}\n', ["the row that begins in line 3", "end of data"]),
        (f'{HEADER}\n"The" capital{LINE}\n', ["the row that begins in line 2"]),
        (f"{HEADER}\n{LINE}".encode("utf-16"), ["line 1: it is UTF-16; save it as UTF-8"]),
        (f"{HEADER}\n{'x' * 200_000}{LINE}", ["the row that begins in line 2", "limit"]),
    ],
)
def test_files_that_are_no_table(
    tokenizer: Any, write: Write, content: str, parts: list[str]
) -> None:
    found = says(TokensError, PromptPairs.from_csv, write(content), tokenizer)
    for part in ["pairs.csv", *parts]:
        assert part in found


def test_a_header_that_is_no_utf_8(tokenizer: Any, write: Write) -> None:
    path = write(f"{HEADER},é\n{LINE},x".encode("latin-1"))
    assert len(PromptPairs.from_csv(path, tokenizer)) == 1
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns={"source": "é"})
    assert "no column 'é'" in found
    found.encode()


def test_a_file_with_a_header_alone(tokenizer: Any, write: Write) -> None:
    assert says(TokensError, PromptPairs.from_csv, write(HEADER), tokenizer) == (
        "there are no prompt pairs"
    )


@pytest.mark.parametrize("path", ["missing.csv", ".", "no\0name", None, 5, 10**9])
def test_paths_that_cannot_be_read(tokenizer: Any, tmp_path: Path, path: int | str) -> None:
    given = tmp_path / path if isinstance(path, str) else path
    found = says(TokensError, PromptPairs.from_csv, given, tokenizer)
    assert "cannot be read: " in found or "must be a path" in found


def test_a_column_of_a_frame_that_stands_twice(tokenizer: Any) -> None:
    frame = pd.DataFrame([[*ROW, "x"]], columns=[*COLUMNS, "target"])
    found = says(TokensError, PromptPairs.from_dataframe, frame, tokenizer)
    assert "column 'target' stands 2 times in the table" in found


@pytest.mark.parametrize("frame", [None, [ROW], {"source": ["a"]}, "pairs.csv"])
def test_what_is_no_frame(tokenizer: Any, frame: Any) -> None:
    found = says(TokensError, PromptPairs.from_dataframe, frame, tokenizer)
    assert "must be a pandas DataFrame" in found


def test_columns_that_are_no_mapping(tokenizer: Any, write: Write) -> None:
    path = write(f"{HEADER}\n{LINE}")
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns=["source"])
    assert "columns must be a mapping" in found


def test_columns_renamed_that_are_none(tokenizer: Any, write: Write) -> None:
    path = write(f"{HEADER}\n{LINE}")
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns={1: "a", "b": "c"})
    assert "columns= renames 'b'" in found


def test_lists_that_are_none(tokenizer: Any) -> None:
    for bad in (None, 5, {"a": 1}, b"ab"):
        found = says(TokensError, PromptPairs.from_texts, bad, ["b"], [" c"], [" d"], tokenizer)
        assert "source must be a list of texts, got" in found


@pytest.mark.parametrize(
    "kind", [lambda text: pd.Series([text], index=[9]), lambda text: iter([text])]
)
def test_other_lists_than_lists(tokenizer: Any, kind: Callable[..., Any]) -> None:
    assert len(PromptPairs.from_texts(*map(kind, ROW), tokenizer)) == 1


def test_warnings_about_rows_of_one_label_name_their_positions(tokenizer: Any) -> None:
    answers = [" Paris", "Paris", "Paris"]
    frame = pd.DataFrame(
        [(*ROW[:2], answer, ROW[3]) for answer in answers], columns=COLUMNS, index=["a"] * 3
    )
    tokenizer = tiny_tokenizer([*ROW, "Paris"])
    with pytest.warns(AnswerWarning, match=r"rows at position 1 to 2, column source_answer"):
        PromptPairs.from_dataframe(frame, tokenizer)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("told", [False, True])
def test_another_separator_than_commas_is_named(
    tokenizer: Any, write: Write, separator: str, quote: str, told: bool
) -> None:
    rows = [separator.join(f"{quote}{text}{quote}" for text in row) for row in (COLUMNS, ROW)]
    path = write("\n".join([*([f"sep={separator}"] * told), *rows]))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer)
    assert f"line 1: the fields are separated by {separator!r}: save the file with comma" in found
    read = pd.read_csv(path, sep=separator, dtype=str, **({"skiprows": 1} if told else {}))
    assert len(PromptPairs.from_dataframe(read, tokenizer)) == 1
    skipped = ", skiprows=1" if told else ""
    assert f"from_dataframe(pandas.read_csv(path, sep={separator!r}{skipped}, dtype=str)" in found


def test_a_line_that_names_the_comma_is_no_header(tokenizer: Any, write: Write) -> None:
    found = says(TokensError, PromptPairs.from_csv, write(f"sep=,\n{HEADER}\n{LINE}"), tokenizer)
    assert "line 1: it is 'sep=,' and no header; take this line out" in found


def test_options_that_there_are_not_are_refused_before_the_file_is_read(tokenizer: Any) -> None:
    for options, hint in (
        ({"delimiter": ";"}, r"pandas.read_csv\(path, delimiter=';', dtype=str\), tokenizer\)"),
        ({"multitoken": "drop"}, r"did you mean 'multi_token'\?$"),
        ({"zzz": 1}, "unexpected keyword argument 'zzz'$"),
    ):
        with pytest.raises(TypeError, match=hint):
            PromptPairs.from_csv("missing.csv", tokenizer, **options)
    with pytest.raises(TypeError, match=r"did you mean 'columns'\?"):
        PromptPairs.from_dataframe(None, tokenizer, column={})


def test_what_is_no_utf_8_has_advice(tokenizer: Any, write: Write) -> None:
    latin = LINE.replace(" Paris", " é").encode("latin-1")
    path = write(b"\n".join([HEADER.encode(), latin]))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer)
    assert "save the file as UTF-8" in found.splitlines()
    path = write(HEADER.replace("target", "é").encode("latin-1"))
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns={"target": "é"})
    assert found.endswith("; it is not UTF-8: save the file as UTF-8")


@pytest.mark.parametrize(
    ("header", "columns", "meant"),
    [
        ("Source,target,source_answer,target_answer", None, {"source": "Source"}),
        (HEADER.replace(",", ", "), None, {name: f" {name}" for name in COLUMNS[1:]}),
        (HEADER.replace("_", " "), None, {name: name.replace("_", " ") for name in COLUMNS[2:]}),
        (
            "clean,target,source_answer,target_answers",
            {"source": "Clean"},
            {"source": "clean", "target_answer": "target_answers"},
        ),
    ],
)
def test_a_column_that_is_nearly_there_is_meant(
    tokenizer: Any,
    write: Write,
    header: str,
    columns: Any,
    meant: dict[str, str],
) -> None:
    path = write(f"{header}\n{LINE}")
    frame = pd.DataFrame([ROW], columns=header.split(","))
    for make, table in ((PromptPairs.from_csv, path), (PromptPairs.from_dataframe, frame)):
        found = says(TokensError, make, table, tokenizer, columns=columns)
        assert found.endswith(f"; did you mean columns={meant!r}?")
        assert len(make(table, tokenizer, columns=meant)) == 1


def test_a_column_that_is_far_from_any_is_not_guessed(tokenizer: Any, write: Write) -> None:
    path = write(f"clean,corrupted,right,wrong\n{LINE}")
    assert "did you mean" not in says(TokensError, PromptPairs.from_csv, path, tokenizer)


@pytest.mark.parametrize(
    ("columns", "hint"),
    [
        ({"clean": "source"}, "; it is the wrong way round: columns={'source': 'clean'}"),
        (
            {"clean": "source", "target": "x"},
            "; it is the wrong way round: columns={'source': 'clean', 'target': 'x'}",
        ),
        ({"sorce": "target"}, "; did you mean 'source'?"),
        ({"clean": "x"}, "it may rename source, target, source_answer, target_answer"),
        ({5: "x", "y": "z"}, "it may rename source, target, source_answer, target_answer"),
        ({"source": "target"}, "columns= reads source and target from one column, 'target'"),
    ],
)
def test_renamings_that_cannot_be_meant(
    tokenizer: Any, write: Write, columns: dict[str, str], hint: str
) -> None:
    path = write(f"{HEADER}\n{LINE}")
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, columns=columns)
    assert found.endswith(hint)


def test_arguments_that_changed_places(tokenizer: Any, write: Write) -> None:
    path, frame = write(f"{HEADER}\n{LINE}"), pd.DataFrame([ROW] * 99, columns=COLUMNS)
    for make, args, expected in (
        (PromptPairs.from_csv, (tokenizer, path), "from_csv(path, tokenizer) takes the tokenizer"),
        (PromptPairs.from_dataframe, (tokenizer, frame), "(frame, tokenizer) takes the tokenizer"),
        (PromptPairs.from_csv, (frame, tokenizer), "from_dataframe takes a DataFrame"),
        (PromptPairs.from_csv, (tokenizer, tokenizer), "path must be a path, got "),
        (PromptPairs.from_dataframe, (path, tokenizer), "from_csv reads a file"),
        (PromptPairs.from_csv, (path, frame), "tokenizer must be a Hugging Face tokenizer"),
    ):
        found = says(TokensError, make, *args)
        assert expected in found
        assert len(found) < 230
        assert "\n" not in found


def test_all_that_is_wrong_is_told_at_once(tokenizer: Any, write: Write) -> None:
    """Columns that are missing or stand twice, spans without one, and rows."""
    lines = ["source,wrong,source,answer", "a,b,c, Paris", "a,b,c,"]
    found = says(
        TokensError, PromptPairs.from_csv, write("\n".join(lines)), tokenizer, spans={"x": "y"}
    )
    for part in (
        "line 1: no column 'target' or 'target_answer'; there are source, wrong, source, answer",
        "target may also be called corrupt, ",
        "column 'source' stands 2 times in the table",
        "span 'x' is to stand in column 'y'",
        "line 3, column answer: must be a non-empty text",
    ):
        assert any(part in line for line in found.splitlines()), part


def test_rows_that_are_dropped_do_not_mend_a_table(tokenizer: Any, write: Write) -> None:
    path = write("source,source_answer\n, Paris\n")
    found = says(TokensError, PromptPairs.from_csv, path, tokenizer, faulty="drop")
    assert "no column 'target' or 'target_answer'" in found
    assert "line 2" not in found
