"""Files that earlier versions wrote are read as they were, or say which version reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nnpatch_core import Outcome
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.file import FORMAT
from tests.helpers.outcome_files import numbers
from tests.helpers.paths import ROOT

FOLDER = ROOT / "tests" / "results" / "files"
FILES = sorted(FOLDER.glob("*.safetensors"))


def header(path: Path) -> Any:
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["nnpatch"])


def alike(found: Any, expected: Any) -> bool:
    """Equal, with nan where there was nan."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            alike(found[name], value) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    if isinstance(expected, float) and expected != expected:
        return bool(found != found)
    # Sums may round another way on another machine, of values near 1.
    if isinstance(expected, float):
        return bool(found == pytest.approx(expected, rel=1e-6, abs=1e-7))
    return bool(found == expected)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_read_as_it_was(path: Path) -> None:
    assert path.stat().st_size < 20_000
    expected = json.loads(path.with_suffix(".json").read_text("utf-8"))
    # What a later version adds to these is no business of an old file.
    found = json.loads(json.dumps(numbers(Outcome.load(path))))
    for added in found.keys() - expected.keys():
        assert not found.pop(added), added
    assert alike(found, expected)


def test_the_numbers_beside_a_file_are_looked_at() -> None:
    (path,) = (each for each in FILES if each.stem.startswith("activation-5-"))
    expected = json.loads(path.with_suffix(".json").read_text("utf-8"))
    expected["metrics"]["p"]["k"]["values"][0][1][1] += 1e-3
    assert not alike(json.loads(json.dumps(numbers(Outcome.load(path)))), expected)


def test_there_are_files_of_every_kind_in_the_format_of_today() -> None:
    today = [path.stem.partition("-")[0] for path in FILES if header(path)["format"] == FORMAT]
    assert sorted(today) == ["activation", "attribution", "listed", "means", "screened"], (
        "the format has changed: run python -m tests.helpers.outcome_files, and commit its files"
    )


@pytest.mark.parametrize(("number", "told"), [("99", True), ("1", False), ("x", False)])
def test_a_file_of_a_later_format_says_to_upgrade(tmp_path: Path, number: str, told: bool) -> None:
    path = tmp_path / "f"
    content = json.dumps({"format": f"nnpatch outcome {number}", "writer": "9.8.7"})
    save_file({"x": torch.zeros(1)}, path, metadata={"nnpatch": content})
    with pytest.raises(OutcomeError, match=r"it was written by nnpatch-core '9\.8\.7'") as caught:
        Outcome.load(path)
    assert ("pip install --upgrade nnpatch-core" in str(caught.value)) is told
