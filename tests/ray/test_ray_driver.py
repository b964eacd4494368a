"""The process that asked for a sweep is killed or interrupted: what was measured is kept."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.checkpoints import done, numbers
from tests.helpers.paths import ROOT
from tests.helpers.scene import Scene
from tests.helpers.shards import swept

#: The sweep, by workers of a Ray of its own.
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nnpatch_core.scale import RayWorkers, job
from tests.helpers.checkpoints import numbers
from tests.helpers.scene import Scene
from tests.helpers.shards import swept
job._KEEP, job._SHARE = 0.1, 1.0
scene = Scene(Path(sys.argv[1]))
try:
    with RayWorkers(scene.load, workers=2) as pool:
        out = swept("activation", pool, checkpoint=sys.argv[2], progress=True)
        torch.save(numbers(out), sys.argv[2] + ".numbers")
        print(out.info.get("resumed"), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    raise
"""
#: Workers whose model takes too long; at "lost" Ctrl-C comes where Python loses it.
LOADING = """
import signal
import sys
import time
from pathlib import Path
import ray
from nnpatch_core.scale import RayWorkers

folder, how = Path(sys.argv[1]), sys.argv[2]

def load():
    (folder / "loading").touch()
    time.sleep(600)

class Deaf:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def wait(*arguments, real=ray.wait, **options):
    if (folder / "loading").exists():
        ray.wait = real
        Deaf()
    return real(*arguments, **options)

if how == "lost":
    ray.wait = wait
try:
    RayWorkers(load, workers=1)
except KeyboardInterrupt:
    print("interrupted", ray.is_initialized(), flush=True)
"""
ENVIRONMENT = {
    **{name: words for name, words in os.environ.items() if name != "RAY_ADDRESS"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
}


def command(scene: Scene, file: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(scene.folder), str(file)]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str], seconds: int) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, "it has ended by itself"
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.05)


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def left_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run after a while. Ray's own agents find out later, and do no work."""
    deadline = time.monotonic() + 40
    while (alive := [each for each in processes if _works(each)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return alive


def _works(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "Agent" not in process.name()
    except psutil.NoSuchProcess:
        return False


def test_a_killed_driver_goes_on_from_its_checkpoint(scene: Scene, tmp_path: Path) -> None:
    one, file = swept("activation"), tmp_path / "c"
    scene.order("slow", "0.1")
    before = 0
    for _ in range(2):
        process = subprocess.Popen(
            command(scene, file), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        wait_for(lambda: file.exists() and done(file) > before, process, 120)  # noqa: B023
        others = family(process.pid)
        assert {each.pid for each in others} >= set(scene.pids()[-1:])
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert left_of(others) == []
        before = done(file)
    (scene.folder / "slow").unlink()
    traces = len(scene.pids())
    ended = subprocess.run(
        command(scene, file), env=ENVIRONMENT, capture_output=True, text=True, check=True,
        timeout=240,
    )  # fmt: skip
    assert ended.stdout.startswith(f"{before} of ")
    assert torch.load(f"{file}.numbers").equal(numbers(one))
    whole = tmp_path / "whole"
    swept("activation", checkpoint=whole)
    assert done(file) == done(whole)
    # What was kept was not run again: another sweep, that nobody disturbs, has more to run.
    rest = len(scene.pids()) - traces
    scene.clear()
    subprocess.run(
        command(scene, tmp_path / "new"), env=ENVIRONMENT, check=True, timeout=240,
        capture_output=True,
    )  # fmt: skip
    assert 0 < rest < len(scene.pids())


@pytest.mark.parametrize("group", [False, True], ids=["driver", "terminal"])
def test_ctrl_c_leaves_a_checkpoint_and_nobody(group: bool, scene: Scene, tmp_path: Path) -> None:
    """At a terminal all processes are told; elsewhere the driver alone."""
    one, file = swept("activation"), tmp_path / "c"
    scene.order("slow", "0.1")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    process = subprocess.Popen(
        command(scene, file), env=ENVIRONMENT, stdout=slave, stderr=slave, stdin=slave, text=True,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    wait_for(lambda: file.exists() and done(file) > 0, process, 120)
    others = family(process.pid)
    (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
    told = ""
    try:
        while part := os.read(master, 65536):
            told += part.decode(errors="replace")
    except OSError:
        pass  # the terminal's other end is closed
    os.close(master)
    process.wait(60)
    assert left_of(others) == []
    assert "interrupted" in told
    assert re.search(r"\rshards: .*\| \d\.\d/8 shards \[", told), told
    before = done(file)
    assert before
    assert numbers(swept("activation", checkpoint=file)).equal(numbers(one))
    assert done(file) > before


@pytest.mark.parametrize("how", ["heard", "lost"])
def test_ctrl_c_ends_workers_that_load(how: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LOADING, str(tmp_path), how], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for((tmp_path / "loading").exists, process, 120)
    others = family(process.pid)
    if how == "heard":
        os.kill(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert told == "interrupted False\n"
    assert left_of(others) == []
