"""Memory over several devices: maps of devices that are not there, against sums by hand."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import Sites, activation_patching, plan_sweep
from nnpatch_core._models import as_nnsight
from nnpatch_core.engine.cone.buckets import Buckets
from nnpatch_core.engine.cone.patched_runs import PatchedRuns
from nnpatch_core.engine.cone.plan import joined, make_plan
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.gradients import graph_limits
from nnpatch_core.memory import (
    Costs,
    Placement,
    Room,
    limits_of,
    needs_of,
    placement_of,
    read_budget,
)
from nnpatch_core.memory.rooms import budget_word, share
from nnpatch_core.sites import bind_cells
from nnpatch_core.testing import tiny_model
from nnpatch_llama import Llama3
from tests.helpers.pretended import device_map, pretending, spread

GIB = 2**30
#: Of a model whose layers read 1 MiB a token, and 10 KiB a token seen.
COSTS = Costs(token=2**20, context=10 * 2**10, score=0, row=0, overhead=16.0)
HEAD = Costs(token=2**20, context=10 * 2**10, score=0, row=3 * 2**20, overhead=16.0)


def room(device: str, layers: range, head: bool, usable: int, recorded: int = 0) -> Room:
    costs = HEAD if head else COSTS
    return Room(device, tuple(layers), head, costs, usable, usable, recorded)


def runs_of(starts: list[int], stages: list[int]) -> PatchedRuns:
    cells = np.arange(len(starts))
    return PatchedRuns(cells, np.zeros_like(cells), np.array(starts), np.array(stages))


def planned(runs: PatchedRuns, rooms: list[Room], *, batch: int = 1, seq_len: int = 100) -> Any:
    return make_plan(
        runs,
        cells=len(runs),
        batch=batch,
        n_layers=32,
        seq_len=seq_len,
        costs=COSTS,
        budget=1,
        recorded=0,
        rooms=rooms,
    )


# The planner -------------------------------------------------------------------------------------


def row(tokens: int, seq_len: int, *, head: bool) -> int:
    """Bytes of a row, by hand."""
    return tokens * 2**20 + seq_len * 10 * 2**10 + (3 * 2**20 if head else 0)


def test_the_tightest_device_bounds_each_bucket() -> None:
    large = room("cuda:0", range(16), False, 24 * GIB, 100 * 2**20)
    small = room("cuda:1", range(16, 32), True, 8 * GIB, 300 * 2**20)
    runs = runs_of([40] * 500, [0] * 500)
    plan = planned(runs, [large, small])
    each = row(60, 100, head=True)
    fitting = (8 * GIB - 300 * 2**20) // each
    assert {int(most) for most in plan.buckets.fitting} == {fitting}
    largest = int(plan.buckets.sizes.max())
    assert largest <= fitting
    first, second = plan.devices
    assert (first.device, second.device) == ("cuda:0", "cuda:1")
    assert first.recorded == 100 * 2**20
    assert first.peak == 100 * 2**20 + largest * row(60, 100, head=False)
    assert second.peak == 300 * 2**20 + largest * each
    assert plan.peak == max(first.peak, second.peak)
    told = str(plan)
    assert "cuda:0" in told
    assert "cuda:1" in told
    # Rows that enter above never come to the device of the layers below.
    tight = room("cuda:0", range(16), False, 2**20)
    above = planned(runs_of([40] * 9, [3 * 16] * 9), [tight, small])
    assert above.devices[0].peak == 0
    with pytest.raises(MemoryBudgetError, match="on cuda:0"):
        planned(runs, [tight, small])


def test_recorded_runs_count_for_each_prompt() -> None:
    rooms = [
        room("cuda:0", range(20), False, 2 * GIB, 7 * 2**20),
        room("cuda:1", range(20, 32), True, 3 * GIB, 5 * 2**20),
    ]
    plan = planned(runs_of([0] * 4, [0] * 4), rooms, batch=6)
    assert [each.recorded for each in plan.devices] == [6 * 7 * 2**20, 6 * 5 * 2**20]
    assert plan.recorded == 6 * 7 * 2**20
    # Chunk after chunk: the most of any.
    other = planned(runs_of([0] * 2, [0] * 2), rooms, batch=2)
    both = joined([plan, other])
    assert both.devices == plan.devices


STARTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 11)), min_size=1, max_size=40)


def bytes_of(costs: Costs, tokens: int, seq_len: int) -> int:
    """The bytes of a row, written anew."""
    of_tokens = tokens * costs.token + tokens * seq_len * costs.score
    return of_tokens + seq_len * costs.context + costs.row


@settings(max_examples=100, deadline=None, database=None)
@given(
    STARTS,
    st.integers(1, 3),
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.integers(0, 5),
    st.integers(1, 4),
)
def test_no_device_is_filled_beyond_its_room(
    starts: list[tuple[int, int]],
    token: int,
    layers: list[int],
    sizes: list[int],
    recorded: int,
    batch: int,
) -> None:
    """For any map of layers to devices, by sums written anew."""
    seq_len, n_layers = 31, 4
    costs = Costs(token, 1, 0, 0, tokens_at_once=10**6)
    rooms = [
        Room(
            f"cuda:{device}",
            tuple(n for n, each in enumerate(layers) if each == device),
            device == 2,
            costs,
            100 * size + 200,
            100 * size + 200,
            recorded,
        )
        for device, size in enumerate(sizes)
        if device == 2 or device in layers
    ]
    runs = runs_of(*map(list, zip(*starts, strict=True)))
    try:
        plan = make_plan(
            runs,
            cells=len(runs),
            batch=batch,
            n_layers=n_layers,
            seq_len=seq_len,
            costs=costs,
            budget=1,
            rooms=rooms,
        )
    except MemoryBudgetError as error:
        (named,) = [each for each in rooms if each.device in str(error)]
        one = bytes_of(costs, seq_len - min(start for start, _ in starts), seq_len)
        assert named.usable < batch * recorded + one
        return
    assert sum(map(len, (bucket.runs for bucket in plan.buckets))) == len(runs)
    for here in rooms:
        most = batch * recorded
        for bucket in plan.buckets:
            lowest = min((stage + 1) // 3 for stage in bucket.runs.stage.tolist())
            comes = here.head or any(layer >= lowest for layer in here.layers)
            each = bytes_of(costs, seq_len - bucket.start, seq_len)
            needed = batch * recorded + comes * len(bucket.runs) * each
            assert needed <= here.usable
            most = max(most, needed)
        told = next(each for each in plan.devices if each.device == here.device)
        assert told.recorded == batch * recorded
        # It may count runs of a cut that enter lower than those of one bucket.
        assert most <= told.peak <= here.usable


@settings(max_examples=100, deadline=None, database=None)
@given(STARTS, st.integers(1, 3), st.integers(200, 2000), st.integers(0, 60), st.integers(1, 3))
def test_all_on_one_device_is_the_plan_of_one(
    starts: list[tuple[int, int]], token: int, budget: int, recorded: int, batch: int
) -> None:
    costs = Costs(token, 1, 0, 2, tokens_at_once=64)
    runs = runs_of(*map(list, zip(*starts, strict=True)))
    known: dict[str, Any] = {
        "cells": len(runs),
        "batch": batch,
        "n_layers": 4,
        "seq_len": 31,
        "costs": costs,
    }
    one = Room("cuda:0", (0, 1, 2, 3), True, costs, budget, budget, recorded)

    def plan(**more: Any) -> Any:
        try:
            return make_plan(runs, **known, **more)
        except MemoryBudgetError as error:
            return str(error).replace(" on cuda:0", "")

    wanted = plan(budget=budget, recorded=batch * recorded)
    found = plan(budget=1, rooms=[one])
    if isinstance(wanted, str):
        assert found == wanted
        return
    for name in ("ends", "start", "peak", "fitting"):
        assert np.array_equal(getattr(found.buckets, name), getattr(wanted.buckets, name))
    assert same_runs(found.buckets, wanted.buckets)
    assert found.recorded == wanted.recorded
    (told,) = found.devices
    assert told.peak == wanted.peak


def same_runs(one: Buckets, other: Buckets) -> bool:
    names = ("cell", "prompt", "start", "stage")
    return all(np.array_equal(getattr(one.runs, n), getattr(other.runs, n)) for n in names)


# What there is on each device, and what is needed there ------------------------------------------

SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10]] * 3)
TARGET = torch.tensor([[5, 16, 7, 18, 9, 10]] * 3)
RUNS = SOURCE, TARGET, torch.tensor([20, 21, 22]), torch.tensor([30, 31, 32])
SITES = Sites(["resid", "q", "mlp"], seq_pos_type="each")
TWO = Placement("cuda:0", ("cuda:0", "cuda:1", "cuda:1"), "cuda:1")


def needs(placement: Placement | None, **options: Any) -> Any:
    nnmodel = as_nnsight(tiny_model("llama"))
    cells = [cell for grid in SITES.grids(nnmodel, Llama3, 6).values() for cell in grid.sites]
    return needs_of(bind_cells(cells, nnmodel, 6), 6, whole=True, placement=placement, **options)


def test_recorded_runs_lie_with_their_layers() -> None:
    """Of 6 tokens in float32: streams of 32, queries of 4 heads and keys of 2, of 8 numbers."""
    one, two = needs(TWO).devices
    layer = 6 * (32 + 32 + 32) + 6 * 2 * 32  # resid, q and mlp, with both entries
    keys = 6 * 2 * 16
    assert (one.device, one.layers, one.head) == ("cuda:0", (0,), False)
    assert (two.device, two.layers, two.head) == ("cuda:1", (1, 2), True)
    logits = 2 * 4 * tiny_model("llama").config.vocab_size
    assert one.recorded == 4 * (layer + keys)
    assert two.recorded == 4 * 2 * (layer + keys) + logits
    whole = needs(TWO)
    assert whole.recorded == one.recorded + two.recorded
    # Logits are computed on the last device alone.
    assert one.costs.row == 0
    assert two.costs.row == whole.costs.row > 0


def test_of_one_device_nothing_is_told_apart() -> None:
    alone = Placement("cpu", ("cpu",) * 3, "cpu")
    assert needs(alone) == needs(None)
    assert needs(alone).devices == ()
    assert placement_of(tiny_model("llama"), "model.layers") == alone


@settings(max_examples=50, deadline=None, database=None)
@given(st.integers(10**5, 10**8), st.integers(1, 40))
def test_sharing_one_device_is_what_one_device_does(budget: int, wanted: int) -> None:
    """`share` of a single device is the rule for one device."""
    (own,) = [
        each
        for each in needs(Placement("cpu", ("cuda:0",) * 3, "cuda:0")).devices
        if each.device == "cuda:0"
    ]
    shared = share((own,), {"cuda:0": budget}, wanted, fixed=0, waiting=0, kept_back=0)
    fitting, recorded = budget // 2 // (own.recorded + own.forward), own.recorded
    if fitting < wanted:
        recorded = own.ahead
        fitting = budget // 2 // (own.forward + recorded)
    assert shared.prompts == max(min(fitting, wanted), 1)
    (room,) = shared.rooms
    assert room.recorded == recorded
    assert shared.stored == (recorded == own.ahead)
    least = recorded + max(own.forward, own.longest)
    assert (shared.short is not None) == (least > budget)
    assert room.usable == max(budget, least)


def limits_over(placement: Placement, budgets: dict[str, int]) -> Any:
    nnmodel = as_nnsight(tiny_model("llama"))
    cells = [cell for grid in SITES.grids(nnmodel, Llama3, 6).values() for cell in grid.sites]
    return limits_of(
        bind_cells(cells, nnmodel, 6),
        9,
        6,
        given=budgets,
        batch_size=None,
        whole=True,
        placement=placement,
    )


def spread_model() -> Any:
    model = tiny_model("llama")
    return spread(model, device_map(model, (1, 0, 0), 0))


def plan(model: Any, **options: Any) -> Any:
    return plan_sweep(model, Llama3, SITES, SOURCE, TARGET, **options)


def test_a_plan_tells_each_device() -> None:
    with pretending():
        told = plan(spread_model(), memory_budget="4 MiB")
    assert [each.device for each in told.devices] == ["cuda:1", "cuda:0"]
    lines = [line for line in str(told).splitlines() if line.startswith("peak")]
    assert [line.split()[1] for line in lines] == ["cuda:1:", "cuda:0:"]
    assert all(each.peak <= 4 * 2**20 for each in told.devices)
    assert plan(tiny_model("llama")).devices == ()


def test_budgets_by_device() -> None:
    large, small = {"cuda:0": "1 GiB", "cuda:1": "1 GiB"}, {"cuda:0": "1 GiB", "cuda:1": 200_000}
    with pretending():
        model = spread_model()
        free, tight = plan(model, memory_budget=large), plan(model, memory_budget=small)
        assert len(tight.buckets) > len(free.buckets)
        by_device = {each.device: each.peak for each in tight.devices}
        assert by_device["cuda:1"] <= 200_000
        with pytest.raises(MemoryBudgetError, match=r"on cuda:1.* for cuda:1"):
            plan(model, memory_budget={"cuda:0": "1 GiB", "cuda:1": 1000})
        with pytest.raises(MemoryBudgetError, match=r"names 'cuda:0', and the model runs on"):
            plan(model, memory_budget={"cuda:0": "1 GiB"})
        # As accelerate names them.
        numbered = plan(model, memory_budget={0: "1 GiB", torch.device("cuda:1"): 200_000})
        assert len(numbered.buckets) == len(tight.buckets)
        for wrong in ({0: 1}, {0: 1, 1: 1, 2: 1}, {True: 1, 0: 1}):
            with pytest.raises(MemoryBudgetError, match="name each of these"):
                plan(model, memory_budget=wrong)
        with pytest.raises(MemoryBudgetError, match="positive number"):
            plan(model, memory_budget={"cuda:0": "1 GiB", "cuda:1": "lots"})
    same = plan(tiny_model("llama"), memory_budget={"cpu": "1 GiB"})
    assert len(same.buckets) == len(plan(tiny_model("llama"), memory_budget="1 GiB").buckets)
    with pytest.raises(MemoryBudgetError, match="names 'cuda:3', and the model runs on cpu"):
        plan(tiny_model("llama"), memory_budget={"cuda:3": "1 GiB"})


def test_a_refusal_over_devices_says_why_nothing_runs_in_pieces() -> None:
    short, last = {"cuda:0": "1 GiB", "cuda:1": 1000}, Sites("resid", seq_pos_type="last")
    for sites, reason in ((last, "the model lies on several devices"), (SITES, "a first token is")):
        told = rf"on cuda:1.* \(it cannot run in pieces, as {reason}"
        with pretending(), pytest.raises(MemoryBudgetError, match=told):
            plan_sweep(spread_model(), Llama3, sites, SOURCE, TARGET, memory_budget=short)


def test_the_graph_of_each_layer_lies_with_it() -> None:
    """One layer is on the first device, and two are on the second, with the logits."""
    one, two = needs(TWO, trimmed=False).devices
    limits = limits_over(TWO, {"cuda:0": 10**9, "cuda:1": 10**9})
    logits = limits.needs.logits

    def graph(layers: int, first: int, second: int) -> Any:
        rooms = tuple(
            attrs.evolve(room, usable=usable)
            for room, usable in zip(limits.rooms, (first, second), strict=True)
        )
        some = attrs.evolve(limits, rooms=rooms)
        return graph_limits(some, 9, 6, layers, given=True, batch_size=None, held=False)

    of_one = one.costs.bytes_of(6, 6) + 3 * one.recorded
    of_two = 2 * two.costs.bytes_of(6, 6) + 4 * logits + 3 * two.recorded
    assert graph(3, 4 * of_one, 10**9).prompts == 4
    assert graph(3, 10**9, 5 * of_two).prompts == 5
    with pytest.raises(MemoryBudgetError, match="on cuda:0"):
        graph(3, of_one - 1, 10**9)
    with pytest.raises(MemoryBudgetError, match="on cuda:1"):
        graph(3, 10**9, of_two - 1)
    # Without a graph in layer 0, there is but what is recorded.
    assert graph(2, 3 * one.recorded, 10**9).prompts == 1
    with pytest.raises(MemoryBudgetError, match="on cuda:0"):
        graph(2, 3 * one.recorded - 1, 10**9)


def test_half_of_what_is_free_on_each_device() -> None:
    with pretending(free=2**21):
        told = plan(spread_model())
    assert all(each.peak <= 2**20 for each in told.devices)


def test_a_checkpoint_goes_on_with_the_budgets_of_each(tmp_path: Any) -> None:
    from nnpatch_core.sweep import Checkpoint

    file = tmp_path / "checkpoint.safetensors"
    sizes = {"cuda:0": 10**7, "cuda:1": 10**6}

    def sweep(**options: Any) -> Any:
        with pretending():
            return activation_patching(
                spread_model(), Llama3, SITES, *RUNS, progress=False, checkpoint=file, **options
            )

    first = sweep(memory_budget=sizes)
    assert Checkpoint(file).budget == {"cuda:1": 10**6, "cuda:0": 10**7}
    again = sweep()
    assert "resumed" in again.info
    assert torch.equal(first["resid"], again["resid"])
    # Another of two places for each layer is of no matter, another device is.
    with pretending():
        model = tiny_model("llama")
        swapped = spread(model, device_map(model, (0, 1, 1), 0))
        swept = activation_patching(
            swapped, Llama3, SITES, *RUNS, progress=False, checkpoint=file, memory_budget=sizes
        )
    assert torch.equal(first["resid"], swept["resid"])
    told = "or of the checkpoint that it goes on from, names .* and the model runs on cpu"
    with pytest.raises(MemoryBudgetError, match=told):
        activation_patching(
            tiny_model("llama"), Llama3, SITES, *RUNS, progress=False, checkpoint=file
        )


@given(
    st.dictionaries(
        st.sampled_from(["cuda:0", "cuda:1", "cpu"]), st.integers(1, 10**12), min_size=1
    )
)
def test_budgets_as_words(sizes: dict[str, int]) -> None:
    rooms = [Room(name, (), False, COSTS, size, size, 0) for name, size in sizes.items()]
    assert read_budget(budget_word(1, rooms)) == sizes
    assert budget_word(1, rooms) == budget_word(1, rooms[::-1])
    for wrong in ("", "=", "5,6", "cuda:0=", "cuda:0=0", "cuda:0=-1", "1=2,", "9" * 30):
        assert read_budget(wrong) is None
