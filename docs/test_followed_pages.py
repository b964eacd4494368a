"""The pages with files and commands are done from their first step to their last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import follow
import pytest
import smollm2
from typer.main import get_command

from nnpatch_core.cli.main import app

DOCS = Path(__file__).resolve().parent
#: Has a test of its own.
OWN = "write-an-adapter.md"


@pytest.mark.parametrize("name", [name for name in follow.PAGES if name != OWN])
def test_page(name: str, tmp_path: Path) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert list(follow.steps(page))
    folder = tmp_path / "reader"
    folder.mkdir()
    if follow.SMOLLM2 in page:
        smollm2.load()
        follow.place(smollm2.default_cache(), folder)
    follow.follow(page, folder, follow.environment(tmp_path / "environment"))


def commands() -> dict[str, Any]:
    """Each command of `nnpatch`, by its name."""
    return dict(get_command(app).commands)  # type: ignore[attr-defined]


def options(command: str) -> set[str]:
    """The options of a command, but for those that all have."""
    found = {option for each in commands()[command].params for option in each.opts}
    return {option for option in found if option.startswith("--") and option != "--help"}


@pytest.mark.parametrize("command", commands())
def test_command_has_its_heading_and_options(command: str) -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    _, found, text = page.partition(f"\n## nnpatch {command}\n")
    assert found
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    # A plan takes the settings of a run, which stand there.
    own = options(command) - (options("run") if command == "plan" else set())
    for option in own:
        assert re.search(rf"[` ]{option}\b", text), option
