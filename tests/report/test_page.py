"""The page: alone, safe, small, the same each time, and whole or not there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nnpatch_core import Outcome, Sites, activation_patching
from nnpatch_core.errors import OutcomeError
from nnpatch_core.report.svg import as_svg
from nnpatch_core.results import new_picture
from nnpatch_core.sites import Axis
from nnpatch_core.testing import tiny_model
from tests.helpers.made_up import STRANGE, outcome
from tests.helpers.pages import Page
from tests.helpers.paths import ROOT
from tests.helpers.samples import THREE

FEW = (Axis("layer", (0, 1, 2)), Axis("position", tuple(range(len(STRANGE)))))
#: What a text may do to a page: end it, load, run, turn its letters round.
ATTACKS = (
    "<script>alert(1)</script>",
    "</pre></td></table></section></main><img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &#x3c;",
    "\u202etxet\u202c \u200f\u061c",
    "\x1b[31mred\x00\x07",
    "one\ntwo\r\nthree\u2028four",
    "\ud800 alone",
    "👩‍👩‍👧 😀 é",
    "]]> --> <!-- $x$ \\(y\\) ",
    "javascript:alert(1)",
)


@pytest.fixture
def out() -> Outcome:
    return outcome({"mlp": FEW}, STRANGE, batch=12)


def page(out: Any, folder: Path, **asked: Any) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.report(folder / "report.html", **asked)
    found = Page(folder / "report.html")
    found.check()
    return found


def with_texts(out: Outcome, text: str) -> Outcome:
    """Everything that is a text in an outcome is this one."""
    prompts = attrs.evolve(
        out.prompts,
        strings=dict.fromkeys(out.prompts.strings, f" {text}"),
        columns={text: (text,) * out.count},
        answers={"source": (text,) * out.count, "target": (text,) * out.count},
    )
    (name,) = out.cells
    return attrs.evolve(
        out,
        kind=text,
        metric=text,
        prompts=prompts,
        cells={text: out.cells[name]},
        raw={text: {text: out.raw[out.metric][name]}},
        baselines={text: out.baseline},
        info={"model": text, text: text},
    )


@pytest.mark.parametrize("text", ATTACKS)
def test_texts_are_shown_as_they_are(tmp_path: Path, out: Outcome, text: str) -> None:
    found = page(
        with_texts(out, text),
        tmp_path,
        command=text,
        question=text,
        title=text,
        pages={text: "page.html"},
        warnings=[text],
    )
    assert "x" not in found.loaded
    # Each letter that prints is there, and what does not print has its number.
    shown = "".join(
        letter
        if letter.isprintable() or letter == "\n"
        else letter.encode("unicode_escape").decode()
        for letter in text
    )
    assert found.texts["code"] == [shown]
    assert found.texts["title"][0].strip() == shown.strip()
    assert all(letter.isprintable() or letter in "\n\t" for letter in found.source)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=40))
def test_any_text_is_safe(tmp_path: Path, out: Outcome, text: str) -> None:
    page(with_texts(out, text), tmp_path, command=text, title=text)


def test_a_page_says_what_there_is(tmp_path: Path, out: Outcome) -> None:
    found = page(out, tmp_path)
    headings = [text.strip() for text in found.texts["h2"]]
    assert headings == [
        "What was found",
        "Pictures",
        "The numbers",
        "Before you trust it",
        "The prompts",
        "How it was run",
        "Run it again",
    ]
    top = out.top(20)
    for row in top:
        assert f"{row['value']:.3f}" in found.text
    assert "logit_difference" in found.texts["p"][0]
    assert "12 pairs of prompts" in found.texts["p"][0]
    assert f"{float(out.baseline.source[3]):.3f}" in found.text
    assert "activation_patching(" in found.texts["code"][0]
    # Tokens that differ stand out, in each of the twelve pairs twice.
    assert found.tags.count("mark") == 24
    assert found.tags.count("svg") == 1


def test_what_the_caller_adds_is_there(tmp_path: Path, out: Outcome) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("be careful", UserWarning, stacklevel=1)
    found = page(
        out,
        tmp_path,
        command="nnpatch run pairs.csv --model m",
        question="Where is it?",
        title="My study",
        pages={"the heatmaps": "heat maps 100%.html", "web": "https://example.org/a?b=c"},
        warnings=[*caught, "be careful", "and so on"],
    )
    assert found.texts["h1"] == ["My study"]
    assert found.texts["p"][0] == "Where is it?"
    assert found.texts["code"] == ["nnpatch run pairs.csv --model m"]
    assert "heat%20maps%20100%25.html" in found.links
    assert "https://example.org/a?b=c" in found.links
    assert "Warnings on the way" in [text.strip() for text in found.texts["h2"]]
    # Once, though it was said twice.
    assert found.text.count("be careful") == 1


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "file:/etc", "a:b"])
def test_a_link_runs_nothing(tmp_path: Path, out: Outcome, address: str) -> None:
    found = page(out, tmp_path, pages={"page": address})
    (link,) = (each for each in found.links if each[:1] != "#" and "//" not in each)
    assert ":" not in link


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"command": 5}, "command must be a text, got 5"),
        ({"question": b"x"}, "question must be a text"),
        ({"title": ["x"]}, "title must be a text"),
        ({"pages": ["x"]}, "pages must be addresses by name"),
        ({"pages": {"x": 5}}, "pages must be addresses by name"),
        ({"pages": {"x": "http://[1"}}, r"pages\['x'\] is no address"),
        ({"warnings": "careful"}, "warnings must be a list of texts"),
        ({"warnings": 5}, "warnings must be a list of texts"),
    ],
)
def test_what_the_caller_adds_is_checked(
    tmp_path: Path, out: Outcome, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(OutcomeError, match=message):
        out.report(tmp_path / "report.html", **asked)
    assert [*tmp_path.iterdir()] == []


def test_a_large_sweep_is_a_small_page(tmp_path: Path) -> None:
    axes = (Axis("layer", tuple(range(30))), Axis("position", tuple(range(64))))
    tokens = [f" word{number}" for number in range(64)]
    names = ["logit_difference", "answer_probability"]
    large = outcome({"resid": axes, "attn": axes, "mlp": axes}, tokens, metrics=names)
    found = page(large, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 1_000_000
    assert found.tags.count("svg") == 2


def test_many_prompts_are_cut(tmp_path: Path) -> None:
    many = outcome({"mlp": (Axis("layer", (0, 1)),)}, batch=1000)
    found = page(many, tmp_path)
    assert "Of 1,000 prompts the first 200 are shown." in found.text
    assert (tmp_path / "report.html").stat().st_size < 500_000
    assert found.tags.count("details") == 2


def test_the_same_outcome_gives_the_same_bytes(tmp_path: Path, out: Outcome) -> None:
    out.report(tmp_path / "one.html")
    out.save(tmp_path / "out.safetensors")
    Outcome.load(tmp_path / "out.safetensors").report(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


OTHER_PROCESS = """
import sys
from nnpatch_core import Outcome
Outcome.load(sys.argv[1]).report(sys.argv[2])
"""


def test_and_in_another_process(tmp_path: Path, out: Outcome) -> None:
    out.save(tmp_path / "out.safetensors")
    out.report(tmp_path / "one.html")
    arguments = [str(tmp_path / "out.safetensors"), str(tmp_path / "two.html")]
    told = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LANG": "C"}
    subprocess.run([sys.executable, "-c", OTHER_PROCESS, *arguments], check=True, env=told)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_nothing_around_changes_it(tmp_path: Path, out: Outcome) -> None:
    import matplotlib as mpl

    out.report(tmp_path / "one.html")
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "x", "svg.image_inline": False}):
        before = dict(mpl.rcParams)
        out.report(tmp_path / "two.html")
        assert dict(mpl.rcParams) == before
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one.html", "two.html"]


def test_without_matplotlib_the_page_says_so(
    tmp_path: Path, out: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = page(out, tmp_path)
    assert found.tags.count("svg") == 0
    assert "pip install 'nnpatch-core[plot]'" in found.text
    assert found.text.count("Pictures are missing here") == 1


# Writing.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(options, capture_output=True).returncode:
        pytest.skip("this process cannot mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_old_page(disk: Path, out: Outcome) -> None:
    out.report(disk / "report.html")
    before = (disk / "report.html").read_bytes()
    with (disk / "big").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    with pytest.raises(OutcomeError, match=r"could not be written: .*No space left"):
        out.report(disk / "report.html", title="another")
    assert (disk / "report.html").read_bytes() == before
    with pytest.raises(OutcomeError, match="could not be written"):
        out.report(disk / "new.html")
    assert sorted(each.name for each in disk.iterdir()) == ["big", "report.html"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "denied")])
def test_a_write_that_fails_leaves_the_old_page(
    tmp_path: Path, out: Outcome, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    out.report(tmp_path / "report.html")
    before = (tmp_path / "report.html").read_bytes()
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "write_bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            with pytest.raises(OutcomeError, match="could not be written"):
                out.report(tmp_path / "report.html", title="another")
        assert (tmp_path / "report.html").read_bytes() == before
        assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("path", ["", "a\0b", 5, None, b"x", "nowhere/report.html", "."])
def test_a_path_that_is_none(
    tmp_path: Path, out: Outcome, monkeypatch: pytest.MonkeyPatch, path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutcomeError):
        out.report(path)
    assert [*tmp_path.iterdir()] == []


def test_a_bad_path_is_told_before_the_work(out: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outcome, "_study", lambda _: pytest.fail("it began"))
    with pytest.raises(OutcomeError, match="it is a folder"):
        out.report("/")


# Old outcomes.

FILES = sorted((ROOT / "tests" / "results" / "files").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_outcomes_that_earlier_versions_saved(tmp_path: Path, path: Path) -> None:
    found = page(Outcome.load(path), tmp_path)
    known = "-4-" not in path.stem
    assert ("The answers are not known" in found.text) is not (known or "means" in path.stem)
    assert ("' Paris'" in found.text) is (known and "means" not in path.stem)


# Pictures.


def test_pictures_beside_each_other_share_no_name() -> None:
    made = []
    for number in range(2):
        figure = new_picture(3.0, 2.0)
        axis = figure.subplots()
        axis.plot([1, 2], [3, 4], label="a")
        axis.legend()
        made.append(as_svg(figure, f"p{number}-", "a line & more"))
    one, other = made
    assert one.replace("p0-", "p1-") == other
    assert 'aria-label="a line &amp; more"' in one
    assert "<style" not in one
    assert "<!--" not in one
    assert "xmlns" not in one


def test_without_a_tokenizer_prompts_are_numbers(tmp_path: Path) -> None:
    out = activation_patching(
        tiny_model(), None, Sites("mlp", seq_pos_type="last"), *THREE[:2], *THREE.answers,
        progress=False,
    )  # fmt: skip
    found = page(out, tmp_path)
    assert "No tokenizer was at hand" in found.text
    assert "5 6 7 8 9 4" in " ".join(found.text.split())
    assert "'4'" in found.text
