"""The memory that a piece of work needs beyond what the process has when it begins."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The highest memory in use during `work`, less what is in use before it.

    On a GPU this is what torch has allocated, elsewhere the process's resident memory. Run this in
    a process of its own: freed memory that an allocator has kept would be used again unseen.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # What loading the model has left to the allocator goes back to the system.
    ctypes.CDLL(None).malloc_trim(0)
    # The system's own high-water mark misses nothing. But `getrusage` gives that of the process's
    # whole life, in which loading the model may stand higher than the sweep; so it is reset first.
    try:
        _CLEAR.write_text("5")
    except OSError:
        return _sampled(work)
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0])


def _sampled(work: Callable[[], object], every: float = 0.002) -> int:
    """Where the mark cannot be reset: a thread looks again and again, and may miss a short peak."""
    before = peak = _kilobytes("VmRSS")
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.is_set():
            peak = max(peak, _kilobytes("VmRSS"))
            time.sleep(every)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    return (peak - before) * 1024
