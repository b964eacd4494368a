"""What all tests share: one thread, no network, and hypothesis profiles."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

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
