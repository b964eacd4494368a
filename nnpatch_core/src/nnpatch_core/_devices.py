"""Devices of their own memory by name, whichever kind torch has: CUDA, XPU, MPS and others."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

_WITHOUT_NUMBERS = ("cpu", "meta")


def numbered(device: torch.device) -> torch.device:
    """A device with its number: without one, it is the one that torch takes.

    Examples:
        >>> numbered(torch.device("xpu", 1)), numbered(torch.device("cpu"))
        (device(type='xpu', index=1), device(type='cpu'))
    """
    if ":" in str(device) or device.type in _WITHOUT_NUMBERS:
        return device
    module, number = module_of_kind(device.type), 0
    # Where there is no such device, it is a name alone.
    with suppress(Exception):
        number = int(module.current_device())
    return torch.device(device.type, number)


def accelerator(number: int) -> torch.device:
    """The device that accelerate calls by a number: of the kind that this machine has."""
    here = torch.accelerator.current_accelerator()
    return torch.device("cuda" if here is None else here.type, number)


def identity(device: torch.device) -> str:
    """A name that tells a device from the others of its machine, in another process too.

    Where torch knows none, it is the name, which may be that of one device in one process and of
    another in the next.
    """
    with suppress(Exception):
        return str(module_of_kind(device.type).get_device_properties(device).uuid)
    return str(numbered(device))


def module_of_kind(kind: str) -> Any:
    """The module that torch has for a kind of device, as `torch.xpu`; None if it has none."""
    try:
        return torch.get_device_module(kind)
    except (RuntimeError, AttributeError):
        return None
