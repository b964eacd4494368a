"""One Ray for all tests, as it takes long to start; each module has workers of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nnpatch_core.scale import RayWorkers
from tests.helpers.scene import Scene

ray = pytest.importorskip("ray")


@pytest.fixture(scope="session", autouse=True)
def _cluster() -> Iterator[None]:
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def pool(scene: Scene) -> Iterator[RayWorkers]:
    with RayWorkers(scene.load, workers=2) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_happens(scene: Scene) -> Iterator[None]:
    scene.clear()
    yield
    scene.clear()
