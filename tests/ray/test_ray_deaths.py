"""Workers that die, hang or run out of memory: the sweep goes on, and its bits are the same."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nnpatch_core.errors import WorkerError, WorkerWarning
from nnpatch_core.scale import RayWorkers
from tests.helpers.checkpoints import done, numbers
from tests.helpers.scene import Scene
from tests.helpers.shards import swept

#: Seconds that each trace takes where workers are to be met at work.
SLOW = "0.03"


@pytest.fixture(scope="module")
def pool(scene: Scene) -> Iterator[RayWorkers]:
    with RayWorkers(scene.load, workers=2, patience=8) as made:
        yield made


@contextmanager
def killing(scene: Scene, seed: int, kills: int) -> Iterator[list[int]]:
    """Kills one of two workers at random moments; the list has those that were killed."""
    killed: list[int] = []
    draw, over = random.Random(seed), threading.Event()

    def kill() -> None:
        while len(killed) < kills and not over.wait(draw.uniform(0.05, 1.5)):
            alive = [pid for pid in dict.fromkeys(scene.pids()) if pid not in killed]
            if alive:
                with suppress(ProcessLookupError):
                    os.kill(pid := draw.choice(alive), signal.SIGKILL)
                    killed.append(pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        *[(kind, seed) for kind in ("activation", "all prompts", "edges") for seed in range(3)],
        ("integrated, chunks", 0),
        ("eap-ig-activations", 1),
    ],
)
def test_half_of_the_workers_are_killed_again_and_again(
    kind: str, seed: int, pool: RayWorkers, scene: Scene, tmp_path: Path
) -> None:
    one = swept(kind)
    scene.order("slow", SLOW)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with killing(scene, seed, 2) as killed:
            two = swept(kind, pool, checkpoint=tmp_path / "c")
    assert numbers(two).equal(numbers(one))
    lost = [str(each.message) for each in caught if each.category is WorkerWarning]
    assert len(lost) <= len(killed)
    for words in lost:
        assert "a worker was lost with" in words
        assert "which another one goes on with: " in words
    # Nothing counts twice.
    whole = swept(kind, checkpoint=tmp_path / "one")
    assert done(tmp_path / "c") == done(tmp_path / "one")
    assert numbers(whole).equal(numbers(one))


def test_a_lost_shard_goes_on_where_it_was(
    pool: RayWorkers, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnpatch_core.scale import job

    monkeypatch.setattr(job, "_KEEP", 0.0)
    monkeypatch.setattr(job, "_SHARE", 1e9)
    monkeypatch.setattr(job, "_SHARDS", 1)
    swept("activation", pool)
    unbroken = len(scene.pids())
    scene.clear()
    scene.order("slow", "0.3")
    thread = threading.Thread(target=_kill_after, args=(scene, unbroken // 2))
    thread.start()
    with pytest.warns(WorkerWarning, match="shard [12]/2"):
        swept("activation", pool)
    thread.join()
    assert len(scene.pids()) <= unbroken + unbroken // 4 + 2


def _no_memory_after(scene: Scene, traces: int) -> None:
    while len(scene.pids()) < traces:
        time.sleep(0.02)
    scene.order("no memory")


def _kill_after(scene: Scene, traces: int) -> None:
    while len(scene.pids()) < traces:
        time.sleep(0.02)
    os.kill(scene.pids()[-1], signal.SIGKILL)


def test_a_worker_that_hangs(pool: RayWorkers, scene: Scene) -> None:
    scene.order("hang")
    with pytest.warns(WorkerWarning, match="it made no step for 8 seconds"):
        two = swept("activation", pool)
    assert numbers(two).equal(numbers(swept("activation")))


def test_a_worker_whose_memory_runs_out(pool: RayWorkers, scene: Scene) -> None:
    one = swept("activation")
    scene.order("exhausted")
    with pytest.warns(WorkerWarning, match=r"its memory ran out \(.*no room"):
        two = swept("activation", pool)
    assert numbers(two).equal(numbers(one))


@pytest.mark.filterwarnings("ignore")
def test_memory_that_never_suffices(pool: RayWorkers, scene: Scene, tmp_path: Path) -> None:
    file = tmp_path / "c"
    scene.order("slow", "0.2")
    thread = threading.Thread(target=_no_memory_after, args=(scene, 12))
    thread.start()
    words = r"has lost its worker 5 times, the last time as its memory ran out"
    with pytest.raises(WorkerError, match=words) as error:
        swept("activation", pool, checkpoint=file)
    thread.join()
    assert f"what was measured is kept in {file}" in str(error.value)
    assert done(file)
    scene.clear()
    assert numbers(swept("activation", pool, checkpoint=file)).equal(numbers(swept("activation")))


def test_workers_that_are_dead_before_the_sweep(pool: RayWorkers, scene: Scene) -> None:
    swept("full", pool)
    for pid in scene.pids("loaded"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with pytest.warns(WorkerWarning, match="a worker was lost with"):
        two = swept("activation", pool)
    assert numbers(two).equal(numbers(swept("activation")))
