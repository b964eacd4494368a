"""Disks that are full where workers keep what they measure, which is no file of the user's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from nnpatch_core import _files, activation_patching
from nnpatch_core.errors import CheckpointError, CheckpointWarning, WorkerError
from nnpatch_core.scale import RayWorkers, job
from nnpatch_core.scale.sending import Sent, call_sent
from nnpatch_core.scale.worker import Worker
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.checkpoints import BUDGET, SITES, SOURCE, TARGET, numbers
from tests.helpers.scene import Scene
from tests.helpers.shards import ANSWERS, swept

#: The name of the user's own file, on another disk.
NAME = "/data/mine"
FULL = OSError(28, "No space left on device")


def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be written any more."""

    def full(path: Path) -> None:
        raise FULL

    monkeypatch.setattr(_files, "_flush", full)


def at_work() -> tuple[Worker, bytes]:
    worker = Worker(1)
    assert worker.load(cloudpickle.dumps(lambda: tiny_model("llama"))).error is None
    names = ("source_tokens", "target_tokens", "source_answer_index", "target_answer_index")
    given = dict(zip(names, (SOURCE, TARGET, *ANSWERS), strict=True))
    options = {"api": tiny_api(), "sites": SITES, "memory_budget": BUDGET, "progress": False}
    return worker, call_sent(activation_patching, {**given, **options})


def check_told(found: Sent, folder: str) -> None:
    assert isinstance(found.error, CheckpointError)
    words = [str(found.error), *(text for kind, text in found.warned if kind is CheckpointWarning)]
    for each in words:
        assert each.startswith(f"the file of a worker, in {folder} (TMPDIR), could not be written")
        assert "No space left on device" in each
        assert NAME not in each


@pytest.mark.parametrize("name", [NAME, None])
def test_a_worker_tells_whose_disk_is_full(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, call = at_work()
    before = worker.measure(call, "1/2", None, name)
    assert before.error is None
    refusing(monkeypatch)
    folder = str(Path(tempfile.gettempdir()).resolve())
    check_told(worker.measure(call, "1/2", None, name), folder)
    # And before it begins, where it cannot put down what it is sent.
    check_told(worker.measure(call, "2/2", before.kept, name), folder)


def test_the_driver_tells_that_it_is_its_own(
    pool: RayWorkers, scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = swept("activation")

    def full(*_: Any) -> None:
        raise FULL

    with monkeypatch.context() as patched:
        patched.setattr(job.Path, "write_bytes", full)
        told = rf"^what workers measure goes through files in {tempfile.gettempdir()} \(TMPDIR\)"
        with pytest.raises(WorkerError, match=f"{told}.* could not be written: No space left"):
            swept("activation", pool)
    # The workers are there for the next call.
    assert numbers(swept("activation", pool)).equal(numbers(one))
