"""Commands in this process, and plugins, modules and models to give to them."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nnpatch_core.cli import main
from tests.helpers.commands import (
    SWAPPED,
    Command,
    Done,
    Misused,
    ModelFolder,
    Module,
    Refused,
)


@pytest.fixture(autouse=True)
def quiet_transformers() -> Iterator[None]:
    """The program lowers the level of a logger, which is not to outlast a test."""
    logger = logging.getLogger("transformers")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def nnpatch(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process."""

    def nnpatch(*arguments: object) -> Done:
        capsys.readouterr()
        code: Any
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return nnpatch


@pytest.fixture
def refused(nnpatch: Command) -> Refused:
    """Runs a command that cannot be carried out; it says why in one line that has all the parts."""

    def refused(*arguments: object, parts: Iterable[str] = ()) -> str:
        done = nnpatch(*arguments)
        assert done.code == 2
        assert done.out == ""
        (line,) = done.err.splitlines()
        assert line.startswith("nnpatch: error: ")
        for part in parts:
            assert part in line
        return line

    return refused


@pytest.fixture
def misused(nnpatch: Command) -> Misused:
    """Runs a command that is spelled wrongly: usage, and what is wrong with it."""

    def misused(*arguments: object, parts: Iterable[str] = ()) -> None:
        done = nnpatch(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("Usage: nnpatch")
        last = done.err.splitlines()[-1]
        assert "error: " in last
        for part in parts:
            assert part in last

    return misused


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    """Puts a module on the path, for `module:attribute`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    made: list[str] = []

    def module(code: str, name: str = "martians") -> str:
        (folder / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        made.append(name)
        return name

    yield module
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def model_folder(tmp_path: Path) -> ModelFolder:
    """Writes a config.json, of settings or of any text, into a folder of its own."""

    def model_folder(config: str | dict[str, Any], name: str = "model") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return model_folder


@pytest.fixture
def wrong(module: Module) -> str:
    """A module of adapters that are wrong."""
    return module(SWAPPED)
