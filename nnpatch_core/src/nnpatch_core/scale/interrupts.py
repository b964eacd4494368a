"""Ctrl-C that Python would lose: it does where it comes amid a destructor or a callback."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def heeding() -> Iterator[Callable[[], None]]:
    """Keep Ctrl-C in mind.

    Yields:
        What raises `KeyboardInterrupt` if Ctrl-C came and the exception went nowhere. In threads,
        and where someone else has a handler for it, it raises nothing.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    pressed = []

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    def heed() -> None:
        if pressed:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield heed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
