"""What is no `load`, no model, no Ray, or not one model in all workers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import nn

from nnpatch_core.errors import PatchingError, WorkerError, WorkerWarning
from nnpatch_core.scale import RayWorkers, joining
from nnpatch_core.scale import pool as pools
from nnpatch_core.testing import tiny_model
from tests.helpers.checkpoints import numbers
from tests.helpers.scene import Scene
from tests.helpers.shards import swept


def raises() -> Any:
    raise OSError("there is no such folder")


def no_model() -> Any:
    return 3


def name_of_a_model() -> Any:
    return "gpt2"


def without_weights() -> Any:
    with torch.device("meta"):
        return nn.Linear(2, 2)


def another_each() -> Any:
    torch.manual_seed(os.getpid())
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = os.getpid()
    return model


def dies() -> Any:
    os._exit(1)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (raises, "load gave no model in a worker: OSError: there is no such folder"),
        (no_model, "load gave no model in a worker: AdapterError: .*got int"),
        (name_of_a_model, "load gave no model in a worker: AdapterError: .*got str"),
        (without_weights, "load gave no model in a worker: AdapterError: "),
        (another_each, "workers must not differ.*weights: [0-9a-f]+ in a worker, [0-9a-f]+ in an"),
        (dies, "a worker was lost in load: "),
    ],
)
def test_a_load_that_does_not_load(load: Callable[[], Any], words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        RayWorkers(load, workers=2)
    assert _free() == 4


def _free() -> float:
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    return ray.available_resources()["CPU"]


def test_another_type_in_each(tmp_path: Path) -> None:
    def load() -> Any:
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            return tiny_model("llama").bfloat16()
        return tiny_model("llama")

    words = r"dtype: torch\.(bfloat16|float32) in a worker, torch\.(bfloat16|float32) in another"
    with pytest.raises(WorkerError, match=words):
        RayWorkers(load, workers=2)


def test_other_releases_than_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnpatch_core.scale import alike

    real = alike.releases()
    monkeypatch.setattr(alike, "releases", lambda: {**real, "torch": "1.0"})
    with pytest.raises(WorkerError, match=r"torch: 2\.\S+ in a worker, 1\.0 here"):
        RayWorkers(lambda: tiny_model("llama"), workers=1)


def test_no_function() -> None:
    with pytest.raises(WorkerError, match="load must be a function that gives the model, got"):
        RayWorkers(tiny_model("llama").config)


def test_a_model_is_no_load() -> None:
    with pytest.raises(WorkerError, match="load must be a function that gives the model"):
        RayWorkers(tiny_model("llama"))


def test_weights_are_not_sent() -> None:
    heavy = nn.Linear(2100, 2100)
    with pytest.raises(WorkerError, match=r"load holds weights.*read the model there"):
        RayWorkers(lambda: heavy)


def test_what_cannot_be_sent() -> None:
    here = socket.socket()
    with pytest.raises(WorkerError, match="load cannot be sent to workers: "):
        RayWorkers(lambda: here)
    here.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"workers": "2"}, "workers"),
        ({"workers": True}, "workers"),
        ({"num_cpus": 0}, "num_cpus must be at least 1"),
        ({"num_gpus": -1}, "num_gpus must be 0 or more, got -1"),
        ({"num_gpus": float("nan")}, "num_gpus must be 0 or more"),
        ({"patience": 0}, "patience must be seconds, or None, got 0"),
        ({"patience": "1"}, "patience must be seconds"),
        ({"address": 6379}, "address must be such as"),
        ({"address": ""}, "address must be such as"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkerError, match=words):
        RayWorkers(lambda: tiny_model("llama"), **options)


def test_a_ray_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_SOON", 1)
    monkeypatch.setattr(pools, "_PATIENCE", 3)
    words = (
        r"Ray has begun 0 of 1 workers in [1-9] seconds: each takes 1 CPU and 2 GPU, and Ray has "
        r"4 CPU and 0 GPU in all, of which other RayWorkers keep theirs until they are closed"
    )
    with (
        pytest.warns(WorkerWarning, match=f"{words}; the wait goes on"),
        pytest.raises(WorkerError, match=f"{words}$"),
    ):
        RayWorkers(lambda: tiny_model("llama"), workers=1, num_gpus=2, patience=3)


@pytest.fixture
def silent() -> Any:
    """An address that takes connections, and never says a word."""
    server = socket.create_server(("127.0.0.1", 0))
    yield f"127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_an_address_that_does_not_answer(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_ANSWER", 5)
    for address in ("127.0.0.1:1", "nowhere.invalid:6379", silent):
        with pytest.raises(WorkerError, match=f"^Ray does not answer at '{address}': "):
            joining.join(_NotYet(), address, 1, 0)


class _NotYet:
    """Ray, of which this process is not a part."""

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        raise AssertionError


def test_two_calls_at_once(scene: Scene) -> None:
    one = swept("activation")
    scene.order("slow", "0.05")
    with RayWorkers(scene.load, workers=1) as pool:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(swept("activation", pool)))
        thread.start()
        while not scene.pids():
            time.sleep(0.05)
        with pytest.raises(WorkerError, match="at work for another call"):
            swept("activation", pool)
        thread.join()
    assert numbers(found[0]).equal(numbers(one))


def test_these_are_errors_of_ours() -> None:
    assert issubclass(WorkerError, PatchingError)
