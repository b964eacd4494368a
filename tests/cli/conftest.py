"""Commands in this process, and plugins, modules and models to give to them."""

from __future__ import annotations

import json
import logging
import sys
import textwrap

import pytest

from nnpatch_core.cli import main
from tests.helpers.commands import SWAPPED, Done


@pytest.fixture(autouse=True)
def quiet_transformers():
    """The program lowers the level of a logger, which is not to outlast a test."""
    logger = logging.getLogger("transformers")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def nnpatch(capsys):
    """Runs a command in this process."""

    def nnpatch(*arguments):
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Done(code, out, err)

    return nnpatch


@pytest.fixture
def refused(nnpatch):
    """Runs a command that cannot be carried out; it says why in one line that has all the parts."""

    def refused(*arguments, parts=()):
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
def misused(nnpatch):
    """Runs a command that is spelled wrongly: usage, and what is wrong with it."""

    def misused(*arguments, parts=()):
        done = nnpatch(*arguments)
        assert done.code == 2
        assert done.out == ""
        assert done.err.startswith("usage: nnpatch")
        last = done.err.splitlines()[-1]
        assert "error: " in last
        for part in parts:
            assert part in last

    return misused


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Puts a module on the path, for `module:attribute`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    made = []

    def module(code, name="martians"):
        (folder / f"{name}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        monkeypatch.syspath_prepend(str(folder))
        made.append(name)
        return name

    yield module
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts throw-away distributions on the path, as an installer would."""
    modules = []

    def install(distribution, code, *, version="1.2.3", value=None):
        module = distribution.replace("-", "_")
        site_packages = tmp_path / f"site-{len(modules)}"
        info = site_packages / f"{module}-{version}.dist-info"
        info.mkdir(parents=True)
        (site_packages / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[nnpatch]\n{module} = {value or module}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(site_packages))
        modules.append(module)
        return info

    yield install
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def model_folder(tmp_path):
    """Writes a config.json, of settings or of any text, into a folder of its own."""

    def model_folder(config, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text, encoding="utf-8")
        return folder

    return model_folder


@pytest.fixture
def wrong(module):
    """A module of adapters that are wrong."""
    return module(SWAPPED)
