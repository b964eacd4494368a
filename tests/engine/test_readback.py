"""Keys and values that are read back from host memory, a layer before they are wanted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core.engine.cone.readback import Readback, in_host

HOST = torch.device("cpu")


def layers(count: int, prompts: int, seq_len: int) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(prompts, 2, seq_len, 3, generator=drawn),
            torch.randn(prompts, 2, seq_len, 5, generator=drawn),
        )
        for _ in range(count)
    ]


def hosted(kept: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(in_host(keys, HOST), in_host(values, HOST)) for keys, values in kept]


def test_the_first_tokens_of_a_prompt_are_one_piece_of_memory() -> None:
    value = torch.randn(3, 2, 7, 5)
    kept = in_host(value, HOST)
    assert torch.equal(kept, value)
    assert kept.data_ptr() != value.data_ptr()
    assert kept[1].transpose(0, 1)[:4].is_contiguous()


@given(data=st.data())
def test_rows_are_those_of_their_prompts(data: st.DataObject) -> None:
    count, different, seq_len = (data.draw(st.integers(1, most)) for most in (4, 5, 6))
    start = data.draw(st.integers(1, seq_len))
    of_rows = data.draw(st.lists(st.integers(0, different - 1), min_size=1, max_size=7))
    # Rows enter on the way up, and none leaves.
    entered = sorted(data.draw(st.lists(st.integers(1, len(of_rows)), min_size=count)))[:count]
    entered[-1] = len(of_rows)
    kept = layers(count, different, seq_len)
    prompts = [torch.tensor(of_rows[:count]) for count in entered]
    readback = Readback(hosted(kept), start, prompts)
    for layer in range(data.draw(st.integers(0, count - 1)), count):
        found = readback.rows(layer, HOST)
        some = torch.tensor(of_rows[: entered[layer]])
        for one, whole in zip(found, kept[layer], strict=True):
            assert torch.equal(one, whole[some][:, :, :start])


class Stream:
    """A stream of which it is told in which order copies begin and are waited for."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log.append("begin")

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self) -> int:
        return sum(each == "begin" for each in self.log)

    def wait_event(self, number: int) -> None:
        self.log.append(f"wait {number}")


def test_a_layer_is_begun_before_it_is_wanted_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    stream = Stream(log)
    monkeypatch.setattr(torch, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.Stream, "__enter__", None, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: stream)
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: log.append("held"))
    kept = layers(3, 2, 4)
    rows = [1, 1, 3]
    prompts = [torch.tensor([1, 0, 1])[:count] for count in rows]
    readback = Readback(hosted(kept), 3, prompts)
    for layer, told in enumerate(
        [["begin"], ["wait 1", "held", "held", "begin"], ["wait 2", "held", "held"]]
    ):
        log_before = len(log)
        found = readback.rows(layer, HOST)
        assert log[log_before:] == told
        some = torch.tensor([1, 0, 1])[: rows[layer]]
        for one, whole in zip(found, kept[layer], strict=True):
            assert torch.equal(one, whole[some][:, :, :3])


def test_what_was_begun_for_another_device_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    stream = Stream(log)
    monkeypatch.setattr(torch, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.Stream, "__enter__", None, raising=False)
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    kept = layers(2, 1, 4)
    readback = Readback(hosted(kept), 2, [torch.tensor([0])] * 2)
    readback.rows(0, HOST)
    keys, _ = readback.rows(1, torch.device("meta"))
    assert keys.device.type == "meta"
    assert log == ["begin"]
