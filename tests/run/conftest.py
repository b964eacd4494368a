"""A tiny model and a table, and the command line, for runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnpatch_core.cli import main
from tests.helpers.commands import Command, Done
from tests.helpers.runs import Files, make_files


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """The program lowers the level of a logger, which is not to outlast a test."""
    logger = logging.getLogger("transformers")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """They lie in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    return make_files(tmp_path)


@pytest.fixture
def nnpatch(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def nnpatch(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return nnpatch
