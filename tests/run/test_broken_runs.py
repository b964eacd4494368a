"""Runs that are killed, stopped, cut off from their reader, or have no room: nothing is lost."""

from __future__ import annotations

import fcntl
import os
import pty
import shlex
import signal
import struct
import termios
import time
from pathlib import Path

import pytest

from nnpatch_core import Outcome
from nnpatch_core.cli.main import INTERRUPTED
from tests.helpers.commands import Command
from tests.helpers.faults import broken_after
from tests.helpers.forked import Forked
from tests.helpers.runs import Files

pytestmark = pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")

SCRIPT = """
import signal
import sys
# What runs in the background of a shell is started without it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from nnpatch_core.cli import main
from tests.helpers.faults import slow_down
{before}
sys.exit(main({arguments!r}))
"""
#: So that there is time to break it off.
SLOW = "slow_down(0.03, 'full')"
OPTIONS = ["--batch-size", "1", "--engine", "full"]


def start(arguments: list[str], before: str = SLOW, **files: int) -> Forked:
    """The program in a process of its own, whose traces take a while."""
    code = SCRIPT.format(arguments=arguments, before=before)
    return Forked(code, {**os.environ, "HF_HUB_OFFLINE": "1"}, **files)


def wait_for(path: Path, process: Forked, *, since: float = 0) -> None:
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_mtime > since):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run_arguments(files: Files, out: str) -> list[str]:
    return ["run", *files.arguments, *OPTIONS, "--sites", "mlp,o", "--out", out]


def test_killed_at_five_moments(files: Files, nnpatch: Command) -> None:
    """Before the weights, as the sweep begins, and three times on the way."""
    assert nnpatch(*run_arguments(files, "whole")).code == 0
    folder, since = Path("killed"), 0.0
    for moment in range(5):
        more = ["--resume"] if folder.exists() else []
        process = start([*run_arguments(files, "killed"), *more])
        if moment == 1:
            wait_for(folder / "run.toml", process)
        elif moment > 1:
            wait_for(folder / "checkpoint", process, since=since)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "outcome.safetensors").exists()
        if (folder / "checkpoint").exists():
            since = (folder / "checkpoint").stat().st_mtime
    done = nnpatch(*run_arguments(files, "killed"), "--resume")
    assert (done.code, done.err) == (0, "")
    one, two = (Path(out, "outcome.safetensors").read_bytes() for out in ("whole", "killed"))
    assert one == two
    assert not [each for each in folder.iterdir() if not (Path("whole") / each.name).exists()]


def test_stopped_by_ctrl_c(files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nnpatch(*run_arguments(files, "whole")).code == 0
    mend = broken_after(monkeypatch, 5, "full")
    stopped = nnpatch(*run_arguments(files, "o"))
    mend()
    assert stopped.code == INTERRUPTED
    (line,) = stopped.err.splitlines()
    told = "nnpatch: error: interrupted; go on with nnpatch run --config o/run.toml --resume"
    assert line == told
    command = line.partition("nnpatch run ")[2].split()
    assert nnpatch("run", *command).code == 0
    one, two = (Path(out, "outcome.safetensors").read_bytes() for out in ("whole", "o"))
    assert one == two


def test_stopped_before_anything_was_measured(
    files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_after(monkeypatch, 0, "full")
    stopped = nnpatch(*run_arguments(files, "o"))
    assert stopped.code == INTERRUPTED
    assert "nothing was measured yet" in stopped.err


def test_stopped_where_another_run_had_ended(
    files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the other one passes for what this one has found; a folder may have a space."""
    given = [*run_arguments(files, "my run"), "--overwrite"]
    assert nnpatch(*given).code == 0
    mend = broken_after(monkeypatch, 0, "full")
    stopped = nnpatch(*given, "--swap")
    mend()
    assert stopped.code == INTERRUPTED
    assert nnpatch("show", "my run").code == 2
    command = stopped.err.partition("nnpatch run ")[2]
    assert nnpatch("run", *shlex.split(command)).code == 0
    assert nnpatch(*run_arguments(files, "whole"), "--swap").code == 0
    one, two = (Path(out, "outcome.safetensors").read_bytes() for out in ("whole", "my run"))
    assert one == two


def test_signal_of_a_terminal(files: Files) -> None:
    process = start(run_arguments(files, "o"))
    wait_for(Path("o/checkpoint"), process)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED
    assert told.splitlines()[-1].startswith("nnpatch: error: interrupted; go on with nnpatch run")


def test_resume_with_other_settings(
    files: Files, nnpatch: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    mend = broken_after(monkeypatch, 5, "full")
    assert nnpatch(*run_arguments(files, "o")).code == INTERRUPTED
    mend()
    arguments = run_arguments(files, "o")
    again = nnpatch(*arguments)
    assert again.code == 2
    assert "--resume goes on with it" in again.err
    other = nnpatch(*arguments, "--resume", "--swap")
    assert other.code == 2
    assert other.err.splitlines()[1] == "  swap: None there, True now"
    assert nnpatch(*arguments, "--overwrite").code == 0


@pytest.mark.parametrize("room", [100, 3_000, 30_000])
def test_full_disk(files: Files, nnpatch: Command, room: int) -> None:
    """No file may grow beyond some bytes, as where a disk is full."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"
    process = start(run_arguments(files, "o"), limit)
    _, told = process.communicate(timeout=300)
    assert "Traceback" not in told
    assert process.returncode == 2
    assert "could not be written" in told
    # What is there is whole.
    if Path("o/outcome.safetensors").exists():
        Outcome.load("o/outcome.safetensors")
    assert not [each for each in Path("o").rglob("*") if each.suffix == ".part"]
    onwards = "nnpatch run --config o/run.toml --resume"
    left = "go on" if Path("o/checkpoint").exists() else "nothing is kept: begin again"
    advised = told.splitlines()[-1].endswith(f"; {left} with {onwards}")
    assert advised is Path("o/run.toml").exists() is (room > 100)
    told_so = shlex.split(onwards)[1:]
    resumed = nnpatch(*(told_so if advised else [*run_arguments(files, "o"), "--resume"]))
    assert resumed.code == 0, resumed.err


def test_without_permission(files: Files, nnpatch: Command) -> None:
    Path("file").write_text("", "utf-8")
    done = nnpatch(*run_arguments(files, "file/o"))
    assert (done.code, done.out[-1:]) == (2, "\n")
    assert "cannot be used" in done.err


def test_reader_has_gone(files: Files) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        process = start(run_arguments(files, "o"), "", stdout=write)
        _, told = process.communicate(timeout=300)
    finally:
        os.close(write)
    assert (process.returncode, told) == (0, "")


def test_in_a_pipe_there_is_no_bar(files: Files) -> None:
    process = start(run_arguments(files, "o"), "")
    out, told = process.communicate(timeout=300)
    assert (process.returncode, told) == (0, "")
    assert "\r" not in out
    assert "\x1b" not in out


def test_at_a_terminal_there_is_a_bar(files: Files) -> None:
    leader, follower = pty.openpty()
    # 24 lines of 40 columns.
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    process = start(run_arguments(files, "o"), stderr=follower)
    os.close(follower)
    seen = b""
    try:
        while chunk := os.read(leader, 4096):
            seen += chunk
    except OSError:
        # The other end is closed.
        pass
    process.communicate(timeout=300)
    assert process.returncode == 0
    bars = [each for each in seen.decode("utf-8").split("\r") if "%" in each]
    assert len(bars) > 1
    assert all(len(each.rstrip("\n")) <= 40 for each in bars)
