"""Recorded runs that are read back from host memory, a layer before they are wanted."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core._host_memory import joined, tokens_in_host
from nnpatch_core.adapters import INPUT, INSIDE, OUTPUT, STAGES
from nnpatch_core.engine.cone.entries import Entries
from nnpatch_core.engine.cone.readback import Readback, joined_pairs

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


def hosted(kept: list[tuple[Tensor, Tensor]]) -> list[Any]:
    return [tuple(tokens_in_host([each], HOST) for each in pair) for pair in kept]


@pytest.mark.parametrize("cuts", [(7,), (3, 7), (1, 4, 7)])
def test_the_first_tokens_of_a_prompt_are_one_piece_of_memory(cuts: tuple[int, ...]) -> None:
    """However many parts its tokens come in."""
    for value in layers(1, 3, 7)[0]:
        parts = [value[:, :, start:end] for start, end in pairwise((0, *cuts))]
        copy = tokens_in_host(parts, HOST)
        assert torch.equal(copy, value)
        assert copy.data_ptr() != value.data_ptr()
        assert copy[1].transpose(0, 1)[:4].is_contiguous()


def test_chunks_of_prompts_are_kept_as_one() -> None:
    """Learning does so, with the first tokens alone."""
    parts = [hosted(layers(1, prompts, 7))[0] for prompts in (2, 1)]
    for kept, *chunks in zip(joined_pairs(parts, 4), *parts, strict=True):
        assert torch.equal(kept, torch.cat(chunks)[:, :, :4])
        assert kept[2].transpose(0, 1).is_contiguous()


def test_chunks_are_pinned_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    real = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        asked.append(pin_memory)
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "empty", empty)
    for pinned in (True, False):
        monkeypatch.setattr(Tensor, "is_pinned", lambda _, pinned=pinned: pinned)
        joined([torch.zeros(2, 3), torch.ones(1, 3)])
    assert asked == [True, False]


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


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the streams of a device that is pretended."""
    log: list[str] = []
    stream = Stream(log)
    monkeypatch.setattr(torch, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.Stream, "__enter__", None, raising=False)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: stream)
    monkeypatch.setattr(Tensor, "is_pinned", lambda _: True)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: log.append("held"))
    return log


def test_a_layer_is_begun_before_it_is_wanted_and_waited_for(log: list[str]) -> None:
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


def test_what_was_begun_for_another_device_is_read_anew(log: list[str]) -> None:
    kept = layers(2, 1, 4)
    readback = Readback(hosted(kept), 2, [torch.tensor([0])] * 2)
    readback.rows(0, HOST)
    keys, _ = readback.rows(1, torch.device("meta"))
    assert keys.device.type == "meta"
    assert log == ["begin"]


class Away(Tensor):
    """Memory of the host, as a device sees it."""

    device = torch.device("cuda", 0)


@attrs.frozen
class Recorded:
    """The residual stream that a target run has kept, before and after each layer."""

    first: int
    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]


def recorded(count: int, prompts: int, seq_len: int, first: int) -> Any:
    drawn = torch.Generator().manual_seed(1)
    inputs, outputs = (
        {layer: torch.randn(prompts, seq_len - first, 3, generator=drawn) for layer in range(count)}
        for _ in range(2)
    )
    return Recorded(first, inputs, outputs)


def away(target: Recorded) -> Any:
    inputs, outputs = (
        {layer: value.as_subclass(Away) for layer, value in kept.items()}
        for kept in (target.inputs, target.outputs)
    )
    return Recorded(target.first, inputs, outputs)


@given(data=st.data())
def test_rows_that_enter_are_those_of_the_target_run(data: st.DataObject) -> None:
    count, seq_len, different = 3, 5, data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(first, seq_len - 1))
    stages = st.lists(st.integers(0, count * STAGES - 1), min_size=1, max_size=8)
    entered = sorted(data.draw(stages))
    of_rows = [data.draw(st.integers(0, different - 1)) for _ in entered]
    target = recorded(count, different, seq_len, first)
    kept = away(target) if data.draw(st.booleans()) else target
    present = [sum(each <= stage for each in entered) for stage in range(count * STAGES)]
    entries = Entries(kept, start, torch.tensor(of_rows), present)
    hidden = torch.zeros(0, seq_len - start, 3)
    for layer in range(count):
        for stage, streams in ((INPUT, target.inputs), (OUTPUT, target.outputs)):
            before, whole = len(hidden), streams[layer].clone()
            hidden = entries.joined(hidden, layer, stage)
            assert len(hidden) == present[layer * STAGES + (stage or INSIDE)]
            for row in range(before, len(hidden)):
                assert torch.equal(hidden[row], whole[of_rows[row], start - first :])
                # A row is patched in place, which no other may see, nor what was recorded.
                hidden[row] = torch.nan
            assert torch.equal(streams[layer], whole)


def test_rows_are_read_before_they_enter(log: list[str]) -> None:
    target = recorded(3, 2, 5, 0)
    # A row enters before the first layer, two inside the second, and one after the last.
    present = [1, 1, 1, 1, 3, 3, 3, 3, 4]
    entries = Entries(away(target), 2, torch.tensor([1, 0, 0, 1]), present)
    hidden = torch.zeros(0, 3, 3)
    told = []
    for layer in range(3):
        for stage in (INPUT, OUTPUT):
            hidden = entries.joined(hidden, layer, stage)
            told.append([*log])
            log.clear()
    assert told == [["begin"], [], ["wait 1", "held", "begin"], [], [], ["wait 1", "held"]]
    assert torch.equal(
        hidden[:3], torch.stack([target.inputs[0][1], *[target.inputs[1][0]] * 2])[:, 2:]
    )
    assert torch.equal(hidden[3], target.outputs[2][1, 2:])
