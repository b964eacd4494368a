"""What is done for the sake of a GPU, as far as it shows on a CPU.

`tests/scripts/on_device.py` holds the sweeps of a GPU against those of the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda

from nnpatch_core import Outcome, Sites, activation_patching, plan_sweep
from nnpatch_core._rounding import SHARES, rounding
from nnpatch_core.errors import EngineError
from nnpatch_core.memory import needs
from nnpatch_core.testing import tiny_model
from nnpatch_core.tracing import any_shape
from nnpatch_llama import Llama3
from tests.helpers.samples import THREE

SOURCE, TARGET, ANSWERS = THREE
SITES = Sites(["resid", "q"], seq_pos_type="each")


def sweep(model: Any, **options: Any) -> Outcome:
    return activation_patching(
        model, Llama3, SITES, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


# Attention that makes a plan for each shape ------------------------------------------------------


@pytest.fixture
def switches() -> Iterator[None]:
    """All ways of attention are as torch has them, and are so again afterwards."""
    assert cuda.cudnn_sdp_enabled()
    yield
    cuda.enable_cudnn_sdp(True)
    cuda.enable_flash_sdp(True)
    cuda.enable_mem_efficient_sdp(True)
    cuda.enable_math_sdp(True)


class Watching(nn.Module):
    """Notes of each forward how many tokens it has, and whether cuDNN may be used."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[int, bool]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append((hidden.shape[1], cuda.cudnn_sdp_enabled()))
        out: Tensor = self.inner(hidden)
        return out


def watched() -> tuple[Any, Watching]:
    model = tiny_model("llama")
    watching = Watching(model.model.layers[2].mlp)
    model.model.layers[2].mlp = watching
    return model, watching


def test_buckets_run_without_plans_and_whole_forwards_as_torch_likes(switches: None) -> None:
    model, watching = watched()
    sweep(model, engine="cone")
    whole = {on for tokens, on in watching.seen if tokens == SOURCE.shape[1]}
    fewer = {on for tokens, on in watching.seen if tokens < SOURCE.shape[1]}
    # The first bucket may begin at the first token.
    assert True in whole
    assert fewer == {False}
    assert cuda.cudnn_sdp_enabled()
    watching.seen.clear()
    sweep(model, engine="full")
    assert {on for _, on in watching.seen} == {True}


def test_what_the_user_has_switched_stays(switches: None) -> None:
    cuda.enable_cudnn_sdp(False)
    with any_shape():
        assert not cuda.cudnn_sdp_enabled()
    assert not cuda.cudnn_sdp_enabled()
    # The only one that is left.
    cuda.enable_cudnn_sdp(True)
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_math_sdp(False)
    with any_shape():
        assert cuda.cudnn_sdp_enabled()
    assert cuda.cudnn_sdp_enabled()


def test_it_is_on_again_after_an_error(switches: None) -> None:
    with pytest.raises(KeyError), any_shape(), any_shape():
        raise KeyError
    assert cuda.cudnn_sdp_enabled()


def test_of_two_threads_the_last_one_switches_it_on(switches: None) -> None:
    inside, go_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def other() -> None:
        with any_shape():
            inside.set()
            go_on.wait(10)
            seen.append(cuda.cudnn_sdp_enabled())

    thread = threading.Thread(target=other)
    with any_shape():
        thread.start()
        assert inside.wait(10)
    # The first is out, and the other still in.
    assert not cuda.cudnn_sdp_enabled()
    go_on.set()
    thread.join()
    assert seen == [False]
    assert cuda.cudnn_sdp_enabled()


# Rounding ----------------------------------------------------------------------------------------


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on(kind: str, dtype: torch.dtype) -> Any:
    """As a tensor on a device."""
    return SimpleNamespace(device=torch.device(kind), dtype=dtype)


@pytest.mark.parametrize(
    ("precision", "kind", "share"),
    [
        ("highest", "cpu", torch.float32),
        ("highest", "cuda", torch.float32),
        ("high", "cuda", torch.float16),
        ("medium", "cuda", torch.float16),
        ("high", "cpu", torch.float16),
        ("medium", "cpu", torch.bfloat16),
    ],
)
def test_products_of_few_digits_round_more(precision: str, kind: str, share: torch.dtype) -> None:
    with products_in(precision):
        assert rounding(on(kind, torch.float32)) == SHARES[share]
        # They are of float32 alone.
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            assert rounding(on(kind, dtype)) == SHARES[dtype]
    assert rounding(on(kind, torch.float32)) == SHARES[torch.float32]


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_autocast_rounds_to_its_own_type(kind: str) -> None:
    assert rounding(on(kind, torch.float32)) == SHARES[torch.float32]
    torch.set_autocast_enabled(kind, True)
    before = torch.get_autocast_dtype(kind)
    torch.set_autocast_dtype(kind, torch.bfloat16)
    try:
        assert rounding(on(kind, torch.float32)) == SHARES[torch.bfloat16]
    finally:
        torch.set_autocast_dtype(kind, before)
        torch.set_autocast_enabled(kind, False)
    assert rounding(torch.empty(1, device="meta")) == SHARES[torch.float32]


class Coarse(nn.Module):
    """As a product of few digits is, otherwise for one number of rows than for another."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.inner(hidden)
        return out if len(hidden) == len(SOURCE) else out * (1 + 2e-3)


def test_where_the_user_wants_tf32_the_cone_is_no_failure() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp = Coarse(layer.mlp)
    with pytest.raises(EngineError, match="where rounding explains"):
        sweep(model, engine="cone")
    with products_in("high"):
        assert sweep(model).info["engine"] == "cone"


# Memory and plans --------------------------------------------------------------------------------


def test_what_torch_has_kept_of_a_device_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "input_device", lambda model: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert needs.memory_budget(None, nn.Linear(1, 1)) == (600 + 200) // 2


def test_a_device_that_is_slow_to_begin_has_fewer_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> Any:
        return plan_sweep(tiny_model("llama"), Llama3, SITES, *long, memory_budget="1 GiB")

    source = torch.arange(100)[None] % 60 + 2
    target = source.clone()
    target[0, 1] += 1
    long = source, target
    here = planned()
    monkeypatch.setattr(needs, "input_device", lambda model: torch.device("cuda"))
    there = planned()
    assert there.runs == here.runs
    assert len(there.buckets) < len(here.buckets)
