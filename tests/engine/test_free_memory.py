"""What is free on devices that are not there, of whichever kind, and what they are called."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nnpatch_core._devices import accelerator, identity, numbered
from nnpatch_core._wrappers import hooked_device
from nnpatch_core.errors import MemoryBudgetError, MemoryWarning
from nnpatch_core.memory import Placement, memory_budgets, placement_of
from nnpatch_core.memory.free import half_free, host_memory
from nnpatch_core.sweep.provenance import environment
from nnpatch_core.testing import tiny_model

ONE = torch.device("xpu", 1)


def told(free: int, reserved: int, allocated: int, question: str) -> Any:
    """As torch tells of the second device of a kind."""

    def checked(value: Any) -> Any:
        def answer(device: Any) -> Any:
            assert device == ONE
            return value

        return answer

    numbers = {"memory_reserved": checked(reserved), "memory_allocated": checked(allocated)}
    return SimpleNamespace(**{question: checked((free, 10**6)), **numbers})


def fails(*_: Any) -> Any:
    raise NotImplementedError("this device does not tell")


def knowing(monkeypatch: pytest.MonkeyPatch, general: Any, module: Any) -> None:
    """Let torch know no more of devices than this, by its general interface and by their kind's."""
    monkeypatch.setattr(torch, "accelerator", general)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)


NOTHING = SimpleNamespace()
#: By what torch may have, old and new: the general question, and that of the kind.
ANSWERS = {
    "both": (told(600, 300, 100, "get_memory_info"), told(1, 1, 1, "mem_get_info")),
    "the kind's alone": (NOTHING, told(600, 300, 100, "mem_get_info")),
    "the general one has no answer": (
        SimpleNamespace(get_memory_info=fails),
        told(600, 300, 100, "mem_get_info"),
    ),
}


@pytest.mark.parametrize("has", ANSWERS)
def test_half_of_what_is_free_whoever_tells_it(monkeypatch: pytest.MonkeyPatch, has: str) -> None:
    knowing(monkeypatch, *ANSWERS[has])
    with warnings.catch_warnings(action="error"):
        # What torch has kept of what was freed is free too.
        assert half_free(ONE) == (600 + 200) // 2


def test_of_a_device_of_known_size_what_this_process_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = SimpleNamespace(
        mem_get_info=fails,
        get_device_properties=lambda device: SimpleNamespace(total_memory=1000),
        memory_allocated=lambda device: 200,
    )
    knowing(monkeypatch, NOTHING, module)
    with pytest.warns(MemoryWarning, match="of xpu:1 is free: .* not taken by this process, 400 B"):
        assert half_free(ONE) == 400


@pytest.mark.parametrize("module", [None, NOTHING, SimpleNamespace(mem_get_info=fails)])
def test_of_a_device_of_which_nothing_is_known_the_hosts(
    monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    knowing(monkeypatch, NOTHING, module)
    monkeypatch.setattr("nnpatch_core.memory.free.host_memory", lambda: 2048)
    with pytest.warns(MemoryWarning, match=r"half of what is free in the host, 2.0 KiB"):
        assert half_free(ONE) == 2048


def test_apples_gpu_shares_the_hosts_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def mps(most: int) -> int:
        sizes = {"recommended_max": most, "driver_allocated": 300, "current_allocated": 100}
        for name, size in sizes.items():
            monkeypatch.setattr(torch.mps, f"{name}_memory", lambda size=size: size)
        return half_free(torch.device("mps", 0))

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=400))
    # Metal's bound, or the host's, whichever is nearer; and what torch has kept.
    assert [mps(600), mps(1000), mps(200)] == [(300 + 200) // 2, (400 + 200) // 2, 100]


def test_where_there_is_no_device_the_hosts_is_taken_in_silence() -> None:
    with warnings.catch_warnings(action="error"):
        for device in (None, torch.device("cpu"), torch.device("meta")):
            assert abs(half_free(device) - host_memory()) < 2**30


def test_a_device_without_a_number_is_the_one_that_torch_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    knowing(monkeypatch, NOTHING, SimpleNamespace(current_device=lambda: 3))
    assert numbered(torch.device("xpu")) == torch.device("xpu", 3)
    assert numbered(ONE) == ONE
    # Of some kinds there is but one.
    knowing(monkeypatch, NOTHING, NOTHING)
    assert numbered(torch.device("mps")) == torch.device("mps", 0)
    for alone in ("cpu", "meta"):
        assert numbered(torch.device(alone)) == torch.device(alone)


class Moved(nn.Linear):
    """As accelerate leaves a module that it moves inputs for."""

    def __init__(self, device: Any) -> None:
        super().__init__(1, 1)
        self._hf_hook = SimpleNamespace(execution_device=device, offload=False)


def test_a_number_is_a_device_of_the_kind_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(kind: str | None) -> None:
        device = None if kind is None else torch.device(kind)
        general = SimpleNamespace(current_accelerator=lambda: device)
        monkeypatch.setattr(torch, "accelerator", general)

    here("xpu")
    assert accelerator(1) == hooked_device(Moved(1)) == torch.device("xpu", 1)
    here(None)
    assert accelerator(1) == hooked_device(Moved(1)) == torch.device("cuda", 1)
    assert hooked_device(Moved("xpu:1")) == ONE


def test_budgets_name_devices_as_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    knowing(monkeypatch, NOTHING, SimpleNamespace(current_device=lambda: 1))
    devices = ["xpu:0", "xpu:1"]
    for name in ("xpu", torch.device("xpu"), 1, "xpu:1"):
        found = memory_budgets({"xpu:0": 5, name: 6}, model, devices)
        assert found == {"xpu:0": 5, "xpu:1": 6}
    # One device is not named twice, in whatever way.
    with pytest.raises(MemoryBudgetError, match="name each of these"):
        memory_budgets({"xpu:0": 5, "xpu": 6, "xpu:1": 7}, model, devices)
    monkeypatch.setattr(
        "nnpatch_core.memory.placement.hooked_device", lambda module: torch.device("xpu")
    )
    assert placement_of(model, "model.layers") == Placement("cpu", ("xpu:1",) * 3, "xpu:1")


def test_a_device_is_told_by_what_torch_knows_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="1234-5678")
    module = SimpleNamespace(
        get_device_name=lambda device: "a fast one", get_device_properties=lambda device: properties
    )
    weight = SimpleNamespace(device=torch.device("xpu", 7), is_meta=False)
    model: Any = SimpleNamespace(parameters=lambda: [weight])
    knowing(monkeypatch, NOTHING, module)
    assert identity(ONE) == "1234-5678"
    assert "xpu:7 (a fast one)" in environment(model)
    # Two of which torch tells nothing are two all the same.
    knowing(monkeypatch, NOTHING, NOTHING)
    assert identity(ONE) == "xpu:1"
    weight.device = torch.device("xpu", 8)
    assert ", xpu:8, " in environment(model)
