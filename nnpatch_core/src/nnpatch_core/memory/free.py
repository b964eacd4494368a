"""The memory that is free: on a device, and in the host."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import psutil
import torch

from nnpatch_core._devices import module_of_kind
from nnpatch_core._warnings import warn
from nnpatch_core.errors import MemoryWarning
from nnpatch_core.memory.costs import in_units

#: What torch calls the question how much of a device is free, and how much it has.
_QUESTIONS = ("get_memory_info", "mem_get_info")


def host_memory() -> int:
    """Bytes of host memory that a sweep may use: half of what is free."""
    return int(psutil.virtual_memory().available) // 2


def half_free(device: torch.device | None) -> int:
    """Half of the bytes that are free on a device; on no device, or the CPU's, those of the host.

    Where torch does not tell, it is half of what this process has not taken of the device; where
    it tells nothing of the device's size either, half of what is free in the host. Both warn.
    """
    if device is None or device.type in ("cpu", "meta"):
        return host_memory()
    if device.type == "mps":
        return _shared()
    module = module_of_kind(device.type)
    # CUDA is asked as ever; of the others, torch knows some by one of these, and some by the other.
    asked = (module,) if device.type == "cuda" else (torch.accelerator, module)
    for each in asked:
        if (free := _free(each, device)) is not None:
            return free // 2
    left = _untaken(module, device)
    half, told = host_memory(), "free in the host"
    if left is not None:
        half, told = left // 2, "not taken by this process"
    warn(
        f"torch does not tell how much memory of {device} is free: memory_budget= is half of what "
        f"is {told}, {in_units(half)}, if you name no other",
        MemoryWarning,
    )
    return half


def _free(asked: Any, device: torch.device) -> int | None:
    """Bytes that are free on a device, or None if that is not known."""
    question = next((getattr(asked, name) for name in _QUESTIONS if hasattr(asked, name)), None)
    if question is None:
        return None
    if device.type == "cuda":
        return int(question(device)[0]) + _kept(asked, device)
    # Some have the question and no answer, each with an error of its own.
    with suppress(Exception):
        return int(question(device)[0]) + _kept(asked, device)
    return None


def _kept(asked: Any, device: torch.device) -> int:
    """Bytes that torch keeps of what was freed, as of the sweep before: they are free to it."""
    if not hasattr(asked, "memory_reserved"):
        return 0
    return int(asked.memory_reserved(device)) - int(asked.memory_allocated(device))


def _untaken(module: Any, device: torch.device) -> int | None:
    """Bytes of a device that this process has not taken; None if its size is not known."""
    with suppress(Exception):
        size = int(module.get_device_properties(device).total_memory)
        return max(size - int(module.memory_allocated(device)), 0)
    return None


def _shared() -> int:
    """Half of what is free on Apple's GPU, whose memory is the host's."""
    most, taken = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
    free = min(most - taken, int(psutil.virtual_memory().available))
    return (max(free, 0) + taken - torch.mps.current_allocated_memory()) // 2
