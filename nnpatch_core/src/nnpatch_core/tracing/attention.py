"""How torch computes attention in traces that all have another number of rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch.backends import cuda

#: Torch's other ways, by its names for them.
_OTHERS = ("flash", "mem_efficient", "math")


def _enabled(way: str) -> bool:
    return bool(getattr(cuda, f"{way}_sdp_enabled")())


class _Without:
    """cuDNN's attention is off while anyone wants it to be, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._was_on = False

    def begin(self) -> None:
        """One more wants it."""
        with self._lock:
            if not self._users:
                # Where it is the only one, it was asked for.
                self._was_on = _enabled("cudnn") and any(map(_enabled, _OTHERS))
                if self._was_on:
                    cuda.enable_cudnn_sdp(False)
            self._users += 1

    def end(self) -> None:
        """One less."""
        with self._lock:
            self._users -= 1
            if self._was_on and not self._users:
                cuda.enable_cudnn_sdp(True)


_WITHOUT = _Without()


@contextmanager
def any_shape() -> Iterator[None]:
    """Let torch compute attention in a way that takes any shape as it comes.

    cuDNN, which torch prefers on newer GPUs, makes a plan for each shape that it has not seen: in
    28 ms on an H200, several times what the layer took. It is switched off in all of torch at once.
    """
    _WITHOUT.begin()
    try:
        yield
    finally:
        _WITHOUT.end()
