"""What all tests share: one thread, no network, and hypothesis profiles."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from tests.helpers.distributions import Install, installing

# Two busy threads on two shared cores can be ten times slower than one.
torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "default", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("default"), derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def all_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the developer's shell limits, tests see every installed plugin."""
    monkeypatch.delenv("NNPATCH_PLUGINS", raising=False)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts throw-away distributions on the path, as an installer would."""
    yield from installing(tmp_path, monkeypatch)
