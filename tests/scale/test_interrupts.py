"""Ctrl-C that Python loses is raised at the next look."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from nnpatch_core.scale.interrupts import heeding


@pytest.fixture(autouse=True)
def as_of_python() -> Iterator[None]:
    """Where tests run side by side, their processes hear nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Deaf:
    """A destructor, in which an exception goes nowhere."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def worked(heed: Callable[[], None]) -> None:
    heed()
    Deaf()
    heed()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_destructor_has_swallowed_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt), heeding() as heed:
        worked(heed)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_raised_at_once_elsewhere() -> None:
    with pytest.raises(KeyboardInterrupt), heeding():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_handler_of_others_stays() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with heeding() as heed:
            signal.raise_signal(signal.SIGINT)
            heed()
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]


def test_threads_have_no_handler() -> None:
    ended: list[bool] = []

    def work() -> None:
        with heeding() as heed:
            heed()
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
