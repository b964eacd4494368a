"""The program before its libraries are loaded: Ctrl-C is heard, and some help comes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from typing import Any

import pytest

from nnpatch_command import main
from nnpatch_command.root import COMMANDS
from nnpatch_core.cli.main import app
from tests.helpers.commands import Command
from tests.helpers.paths import ROOT

#: A process that says when it imports torch, and then takes its time. `swallow` is a library that
#: catches whatever comes while it is imported.
SLOW = """
import signal, sys, time
from importlib.metadata import EntryPoint

class Slow:
    def find_spec(self, name, *_):
        if name == "torch":
            print("importing", flush=True)
            try:
                time.sleep(300)
            except {caught}:
                pass

sys.meta_path.insert(0, Slow())
# What runs in the background of a shell is started without it.
signal.signal(signal.SIGINT, signal.default_int_handler)
main = EntryPoint("nnpatch", {value!r}, "console_scripts").load()
sys.exit(main(["plugins"]))
"""
#: None of it may be loaded for a word of help.
HEAVY = ("torch", "transformers", "nnsight", "numpy", "nnpatch_core", "nnpatch")


def value() -> str:
    """The function that makes the program `nnpatch`."""
    text = (ROOT / "nnpatch_core/pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["scripts"]["nnpatch"])


@pytest.mark.parametrize("caught", ["ImportError", "BaseException"])
def test_ctrl_c_during_the_imports(caught: str) -> None:
    code = SLOW.format(value=value(), caught=caught)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=120)
    assert (out, told) == ("", "nnpatch: error: interrupted; nothing was begun\n")
    assert process.returncode == 130


def run(code: str, **options: Any) -> Any:
    return subprocess.run(
        [sys.executable, "-c", code], text=True, timeout=120, check=False, **options
    )


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["-h"]])
def test_what_comes_at_once(arguments: list[str], nnpatch: Command) -> None:
    """It is what the program says when all is loaded."""
    code = (
        f"import sys; from nnpatch_command import main; code = main({arguments!r}); "
        f"sys.exit(code or [name for name in {HEAVY!r} if name in sys.modules] or None)"
    )
    found = run(code, capture_output=True, env={**os.environ, "COLUMNS": "90"})
    assert (found.returncode, found.stderr) == (0, "")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "90")
        assert nnpatch(*arguments).out == found.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_whose_reader_has_gone(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        code = f"import sys; from nnpatch_command import main; sys.exit(main({arguments!r}))"
        done = run(code, stdout=write, stderr=subprocess.PIPE)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_program_leads_to_what_is_tested_here() -> None:
    assert metadata.EntryPoint("nnpatch", value(), "console_scripts").load() is main
    assert main(["plugins"]) == 0


def test_a_signal_that_others_handle_is_left_to_them(nnpatch: Command) -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["plugins"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_app_has_the_commands_of_the_list() -> None:
    assert [each.name for each in app.registered_commands] == [*COMMANDS]
