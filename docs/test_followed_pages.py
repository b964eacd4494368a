"""The pages with files and commands are done from their first step to their last."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import follow
import pytest

from nnpatch_core.cli.main import _parser

DOCS = Path(__file__).resolve().parent
#: Has a test of its own.
OWN = "write-an-adapter.md"


@pytest.mark.parametrize("name", [name for name in follow.PAGES if name != OWN])
def test_page(name: str, tmp_path: Path) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert list(follow.steps(page))
    folder = tmp_path / "reader"
    folder.mkdir()
    follow.follow(page, folder, follow.environment(tmp_path / "environment"))


def commands() -> dict[str, argparse.ArgumentParser]:
    """Each command of `nnpatch`, by its name."""
    return dict(_parser()[1])


@pytest.mark.parametrize("command", commands())
def test_command_has_its_heading_and_options(command: str) -> None:
    page = (DOCS / "command-line.md").read_text(encoding="utf-8")
    _, found, text = page.partition(f"\n## nnpatch {command}\n")
    assert found
    text = re.split(r"^## ", text, flags=re.MULTILINE)[0]
    for action in commands()[command]._actions:
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"`{option}" in text or f" {option}" in text, option
