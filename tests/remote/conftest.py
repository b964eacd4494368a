"""One server for all tests, and nnsight as it is where nnpatch is installed from a wheel."""

from __future__ import annotations

from collections.abc import Iterator

import nnsight
import pytest
from cloudpickle import cloudpickle

from tests.helpers.served import Served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served.start(tmp_path_factory.mktemp("served"), "llama")
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout nnsight sends all of nnpatch along, of which a server then has what it needs.

    Where it is installed it is sent by name.
    """
    monkeypatch.setattr(nnsight.ndif, "_PULLED_ENV", True)
    monkeypatch.setattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", set())
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
