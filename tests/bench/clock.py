"""CPU time and wall time of a piece of work."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Seconds(NamedTuple):
    """What a piece of work took: CPU time of all threads of the process, and wall time."""

    cpu: float
    wall: float


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, Seconds]:
    """What `work` gives and what it took, to the end of what it started on the device."""
    gc.collect()
    _wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    _wait(device)
    return result, Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
