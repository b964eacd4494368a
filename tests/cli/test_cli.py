"""The command line: what it prints, for people and as JSON, and its exit code, whatever is wrong.

Most tests call `main` in this process; a few run the program, for real exit codes and pipes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import OWN, Command, Misused, adapters
from tests.helpers.distributions import Install

# Help, version, usage ---------------------------------------------------------------------------

OPTIONS = {
    (): ["plugins", "components", "check", "new-adapter", "--version", "Exit code"],
    ("plugins",): ["--json", "NNPATCH_PLUGINS", "Exit code 1"],
    ("components",): ["MODEL_OR_CONFIG", "--adapter", "--json", "module:attribute"],
    ("check",): [
        *("ADAPTER", "MODEL", "--only", "--known-failure", "--layers", "--json"),
        *("module:attribute", "Exit code 1"),
    ],
    ("new-adapter",): [
        *("NAME", "--model-type", "--output", "--config", "KEY=VALUE", "--json", "Exit code 1"),
    ],
}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", OPTIONS, ids=lambda command: "".join(command) or "nnpatch")
def test_help(nnpatch: Command, command: Any, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = nnpatch(*command, flag)
    assert done.code == 0
    assert done.err == ""
    assert done.out.strip().startswith(f"Usage: {' '.join(('nnpatch', *command))} ")
    for option in OPTIONS[command]:
        assert option in done.out


def test_help_has_every_option(nnpatch: Command) -> None:
    """A new option comes with a line in the tests above."""
    for command, expected in OPTIONS.items():
        options = set(re.findall(r"--[a-z-]+", nnpatch(*command, "--help").out))
        own = options - {"--help", "--install-completion", "--show-completion"}
        assert own == {part for part in expected if part.startswith("--")}


def words_of(nnpatch: Command, command: Any, columns: int) -> set[str]:
    """The words of a help, as wide as that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        done = nnpatch(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.lines)) <= columns
    # Without boxes a line may end at a hyphen.
    return set(re.findall(r"[A-Za-z]\w*…?", done.out))


@pytest.mark.parametrize(
    "command", [*OPTIONS, ("run",), ("plan",), ("show",), ("compare",)], ids=str
)
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_help_breaks_no_word(nnpatch: Command, command: Any, columns: int) -> None:
    assert words_of(nnpatch, command, columns) <= words_of(nnpatch, command, 1000)


def test_version(nnpatch: Command) -> None:
    done = nnpatch("--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"nnpatch-core {metadata.version('nnpatch-core')}\n"


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "Missing command"),
        (["sweep"], "'sweep'"),
        (["--json"], "No such option: --json"),
        (["plugins", "llama"], "llama"),
        (["plugins", "--yaml"], "--yaml"),
        (["--yaml", "plugins"], "--yaml"),
        (["components"], "MODEL_OR_CONFIG"),
        (["check"], "ADAPTER"),
        (["new-adapter", "gpt2"], "--model-type"),
        (["new-adapter", "--model-type", "gpt2"], "NAME"),
    ],
)
def test_misspelled_command(misused: Misused, arguments: list[str], part: str) -> None:
    misused(*arguments, parts=[part])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["componets", "llama"], "'components'"),
        (["new-adaptor"], "'new-adapter'"),
        (["components", "llama", "--jsno"], "--json"),
        (["check", "Llama3", "--layer5=0"], "--layers"),
    ],
)
def test_misspelled_command_that_is_like_another(
    misused: Misused, arguments: list[str], hint: str
) -> None:
    misused(*arguments, parts=[hint])


# The program ------------------------------------------------------------------------------------


def program(*arguments: Any, **options: Any) -> Any:
    """The installed program; where it is not installed, what it would run."""
    script = Path(sysconfig.get_path("scripts")) / "nnpatch"
    call = "import sys; from nnpatch_command import main; sys.exit(main())"
    command = [script] if script.exists() else [sys.executable, "-c", call]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**environment, **options.pop("env", {})},
        **options,
    )


def test_program_with_a_broken_plugin(install: Install) -> None:
    site_packages = install("broken-models", "raise SystemExit(0)").parent
    path = os.pathsep.join([str(site_packages), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = program("plugins", "--json", stdout=subprocess.PIPE, env={"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (1, "")
    found = json.loads(done.stdout)
    assert [failure["distribution"] for failure in found["failures"]] == ["broken-models"]
    assert set(OWN) <= set(adapters(found))


def test_program_without_the_model() -> None:
    done = program("components", "no/such-model", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("nnpatch: error: 'no/such-model' is no model type")


def test_program_whose_reader_has_gone() -> None:
    """What `| head -1` does to it, when head is the quicker one."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = program("components", "llama", stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
