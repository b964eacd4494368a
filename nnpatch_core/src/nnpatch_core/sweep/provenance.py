"""Where an outcome comes from: which weights, whose adapter, what machine, and when."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpatch_core._devices import module_of_kind
from nnpatch_core._models import Elsewhere, input_device, module_of
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.plugins import source_of
from nnpatch_core.sweep.checksum import checksum

#: How much of an error is told.
_SHOWN = 100


class Call:
    """A call of an entry point: when it began, and what was found out about its model.

    One that goes on from a checkpoint began with the call that made it, and has taken its time.
    """

    def __init__(self) -> None:
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        #: How much of it an earlier call has measured, in words; "" is nothing.
        self.resumed = ""
        self._begun = time.monotonic()
        self._before = 0.0
        self._machines: dict[str, None] = {}
        self._weights: dict[int, str] = {}

    @property
    def seconds(self) -> float:
        """How long it has taken, with the calls before it."""
        return self._before + time.monotonic() - self._begun

    def weights(self, model: nn.Module) -> str:
        """A word for a model's weights, which are read but once in a call."""
        if id(model) not in self._weights:
            self._weights[id(model)] = checksum(model)
        return self._weights[id(model)]

    def environment(self, model: nn.Module) -> str:
        """The machine, and those of the calls before it."""
        return "; ".join(dict.fromkeys([*self._machines, environment(model)]))

    def told(self, model: nn.Module) -> dict[str, Any]:
        """The words that a checkpoint keeps of it, as JSON."""
        return {
            "started": self.started,
            "seconds": self.seconds,
            "environment": self.environment(model),
        }

    def goes_on(self, told: Mapping[str, Any]) -> None:
        """Go on from the call that a checkpoint tells of."""
        self.started, self._before = told["started"], told["seconds"]
        self._machines |= dict.fromkeys(told["environment"].split("; "))


def provenance(call: Call, nnmodel: Any, adapters: Iterable[ModelAPI]) -> dict[str, str]:
    """The words of an outcome's `info` on where it comes from.

    Args:
        call: that made it.
        nnmodel: the model, as sweeps have it.
        adapters: in the order of their names.
    """
    model = module_of(nnmodel)
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    return {
        "adapter_from": ", ".join(dict.fromkeys(map(source_of, adapters))),
        **({"revision": str(revision)} if revision else {}),
        "weights": _weights(call, nnmodel),
        **({"resumed": call.resumed} if call.resumed else {}),
        "started": call.started,
        "seconds": f"{call.seconds:.3f}",
        "environment": call.environment(model),
    }


def environment(model: nn.Module) -> str:
    """Python, the system, the devices that the weights are on, and threads."""
    devices = {weight.device for weight in model.parameters() if not weight.is_meta}
    # Of one that is kept elsewhere the device on which it runs.
    runs = input_device(model)
    devices |= set() if runs is None or runs.type == "meta" else {runs}
    named = dict.fromkeys(map(_device, sorted(devices, key=str)))
    threads = torch.get_num_threads()
    count = f"{threads} thread{'s' * (threads != 1)}"
    return ", ".join([_system(), *named, count])


def _weights(call: Call, nnmodel: Any) -> str:
    if isinstance(nnmodel, Elsewhere) and nnmodel.away:
        return f"those of {nnmodel.where}, not seen"
    # Of whatever kind the weights are, a sweep that was run is not lost for want of a word.
    try:
        return call.weights(module_of(nnmodel))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return f"could not be read ({reason[:_SHOWN]})"


def resumed(before: int, every: int, *, estimated: bool) -> str:
    """How many patched runs an earlier call has measured, or estimates it made, in words.

    Args:
        before: how many; "" where that is none.
        every: how many there are.
        estimated: whether they are estimates.
    """
    what = "estimates were made" if estimated else "patched runs were measured"
    return f"{before} of {every} {what} by an earlier call" if before else ""


@functools.cache
def _system() -> str:
    return f"Python {platform.python_version()}, {platform.platform()}"


@functools.cache
def _device(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu ({_processor()})"
    # Not every kind of device has a name.
    with suppress(Exception):
        return f"{device} ({module_of_kind(device.type).get_device_name(device)})"
    return str(device)


def _processor() -> str:
    """The processor's name, which Python itself does not tell on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or platform.machine()
