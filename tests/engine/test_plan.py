"""The planner alone, without a model: which rows there are, what runs together, what it costs."""

from __future__ import annotations

import functools
import re
from collections import Counter
from itertools import chain, combinations, pairwise, product
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnpatch_core import Component, decoder_components
from nnpatch_core.adapters import INPUT, INSIDE, OUTPUT, Place, stage_of
from nnpatch_core.components import COMPONENT_NAMES
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.engine.cone.controls import controls_of
from nnpatch_core.engine.cone.patched_runs import PatchedRuns, first_layer, patched_runs
from nnpatch_core.engine.cone.plan import Plan, joined, make_plan
from nnpatch_core.engine.cone.target import _Changes
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.interventions import Zeros
from nnpatch_core.memory import Costs, in_units
from nnpatch_core.seq_pos import Positions
from nnpatch_core.testing import tiny_api
from nnpatch_core.tracing import BoundSite, Cell, Patches

Row = tuple[int, int, int, int]


@attrs.frozen
class Case:
    """A sweep, and what it may use."""

    rows: list[Row]
    cells: int
    batch: int
    n_layers: int
    seq_len: int
    costs: Costs
    budget: int
    recorded: int

    def plan(self, **changes: Any) -> Plan:
        given = attrs.asdict(self, recurse=False) | changes
        found = given.pop("rows")
        columns = zip(*found, strict=True) if found else [[]] * 4
        arrays = [np.array(column, dtype=np.int64) for column in columns]
        return make_plan(PatchedRuns(*arrays), **given)


def layers_of(stage: int, n_layers: int) -> int:
    """How many layers a row passes, counted one by one."""
    layer, when = divmod(stage, 3)
    passed = range(layer if when < 2 else layer + 1, n_layers)
    return len(passed)


@st.composite
def cases(draw: st.DrawFn, *, starts: int = 8, roomy: bool = False) -> Case:
    n_layers, seq_len = draw(st.integers(1, 4)), draw(st.integers(1, 30))
    cells, batch = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    begins = draw(st.lists(st.integers(0, seq_len - 1), min_size=1, max_size=starts, unique=True))
    pairs = st.tuples(st.integers(0, cells - 1), st.integers(0, batch - 1))
    rows = [
        (cell, prompt, draw(st.sampled_from(begins)), draw(st.integers(0, 3 * n_layers - 1)))
        for cell, prompt in draw(st.lists(pairs, unique=True))
    ]
    costs = Costs(
        token=draw(st.integers(1, 50)),
        context=draw(st.integers(0, 20)),
        score=draw(st.integers(0, 3)),
        row=draw(st.integers(0, 100)),
        overhead=draw(st.sampled_from([0.0, 0.5, 3.0, 16.0, 1e6])),
        tokens_at_once=draw(st.sampled_from([1, 20, 100, 10**6])),
    )
    recorded = draw(st.integers(0, 1000))
    # Room for the longest run, and perhaps for some more.
    most = bytes_of(costs, seq_len, seq_len)
    budget = recorded + most * (10**6 if roomy else draw(st.sampled_from([1, 1.5, 4, 100])))
    if roomy:
        costs = attrs.evolve(costs, tokens_at_once=10**9)
    return Case(rows, cells, batch, n_layers, seq_len, costs, int(budget), recorded)


def bytes_of(costs: Costs, tokens: int, seq_len: int) -> int:
    """What a row of so many tokens takes, written once more."""
    attention = tokens * seq_len * costs.score + seq_len * costs.context
    return tokens * costs.token + attention + costs.row


def as_rows(rows: PatchedRuns) -> list[Row]:
    return list(zip(*(column.tolist() for column in attrs.astuple(rows)), strict=True))


# What runs together.


@given(cases())
@settings(max_examples=300)
def test_every_row_runs_once_and_not_after_its_start(case: Case) -> None:
    plan = case.plan()
    ran = [row for bucket in plan.buckets for row in as_rows(bucket.runs)]
    assert Counter(ran) == Counter(case.rows)
    assert all(len(bucket.runs) for bucket in plan.buckets)
    for bucket in plan.buckets:
        starts = bucket.runs.start.tolist()
        assert all(bucket.start <= start < case.seq_len for start in starts)
        # No token is run that no row of these starts needs.
        group = {start for other in plan.buckets if other.start == bucket.start
                 for start in other.runs.start.tolist()}  # fmt: skip
        assert min(group) == bucket.start
        assert list(bucket.runs.stage) == sorted(bucket.runs.stage)
    # Buckets that begin apart never share a starting position.
    owners: dict[int, set[int]] = {}
    for bucket in plan.buckets:
        for start in bucket.runs.start.tolist():
            owners.setdefault(start, set()).add(bucket.start)
    assert all(len(found) == 1 for found in owners.values())
    # And positions run together are neighbours among those that occur.
    ordered = [next(iter(owners[start])) for start in sorted(owners)]
    assert ordered == sorted(ordered)


@given(cases())
@settings(max_examples=200)
def test_each_bucket_fits_in_what_the_recorded_runs_leave(case: Case) -> None:
    plan = case.plan()
    for bucket in plan.buckets:
        tokens = case.seq_len - bucket.start
        needed = len(bucket.runs) * bytes_of(case.costs, tokens, case.seq_len)
        assert bucket.peak == case.recorded + needed <= case.budget
        together = max(case.costs.tokens_at_once, tokens)
        assert len(bucket.runs) * tokens <= together
    peaks = [bucket.peak for bucket in plan.buckets]
    assert plan.peak == max(peaks, default=case.recorded) <= case.budget


@given(cases())
@settings(max_examples=100)
def test_a_cut_is_into_no_more_buckets_than_memory_asks_for(case: Case) -> None:
    """Of those that begin together, two never fit in one: sizes differ by one at most."""
    by_start: dict[int, list[int]] = {}
    for bucket in case.plan().buckets:
        by_start.setdefault(bucket.start, []).append(len(bucket.runs))
    for start, sizes in by_start.items():
        tokens = case.seq_len - start
        each = bytes_of(case.costs, tokens, case.seq_len)
        most = min(
            (case.budget - case.recorded) // each, max(case.costs.tokens_at_once // tokens, 1)
        )
        assert max(sizes) - min(sizes) <= 1
        assert (len(sizes) - 1) * most < sum(sizes) <= len(sizes) * most


@given(cases())
@settings(max_examples=50)
def test_every_number_of_tokens_is_watched_and_the_longest_is_the_first(case: Case) -> None:
    plan = case.plan()
    starts = [bucket.start for bucket in plan.buckets]
    assert starts == sorted(starts)
    assert plan.controlled == {starts.index(start) for start in starts}
    for start in starts:
        # The one with the lowest stage, where memory has cut them.
        stages = [bucket.runs.stage.min() for bucket in plan.buckets if bucket.start == start]
        assert stages[0] == min(stages)


@given(cases(), st.data())
@settings(max_examples=200)
def test_unpatched_rows_stand_where_nothing_is_special(case: Case, data: st.DataObject) -> None:
    plan = case.plan()
    lengths = np.array(data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4))[: case.batch])
    for number, bucket in enumerate(plan.buckets):
        watch = controls_of(plan, number, bucket, lengths)
        if number not in plan.controlled:
            assert watch is None
            continue
        rows, unpatched = watch.within(bucket.runs)
        assert as_rows(rows.take(~unpatched)) == as_rows(bucket.runs)
        assert unpatched.sum() == len(watch) <= case.batch + 2
        assert (rows.cell[unpatched] == -1).all()
        assert (np.diff(rows.stage) >= 0).all()
        found = list(zip(*np.where([unpatched]), strict=True))
        found = [(i, int(rows.prompt[i]), int(rows.stage[i])) for _, i in found]
        lowest = int(bucket.runs.stage[0])
        # One is of the prompt with most padding, and one passes all layers that any row does.
        assert any(lengths[prompt] == lengths.min() for _, prompt, _ in found)
        deep = [(i, prompt) for i, prompt, stage in found if stage == lowest]
        assert deep
        if number == 0 or bucket.start == case.seq_len - 1:
            assert (0, case.batch - 1) in deep
            assert any(i > 0 and prompt == 0 for i, prompt in deep)
            assert found[-1][0] == len(rows) - 1
            # A prompt that is treated in a way of its own is one of them.
            assert {prompt for _, prompt, _ in found} == set(range(case.batch))
        else:
            assert len(watch) == 1


@pytest.mark.parametrize(
    ("positions", "prompts", "share"),
    # Of the last position alone it is two rows of one token.
    [(range(8, 32), 1, 0.04), (range(8, 32), 3, 0.028), ([31], 1, 0.14)],
)
def test_unpatched_rows_cost_little(positions: list[int], prompts: int, share: float) -> None:
    """The residual stream of 30 layers at each of 32 positions, of which the first 8 are alike."""
    layers, length = 30, 32
    cells = list(product(range(layers), positions))
    rows = [
        (cell, prompt, start, stage_of(layer, Component("")))
        for cell, (layer, start) in enumerate(cells)
        for prompt in range(prompts)
    ]
    costs = Costs(1, 1, 0, 0, 16.0, 2048)
    plan = Case(rows, len(cells), prompts, layers, length, costs, 10**9, 0).plan()
    added = 0
    for number, bucket in enumerate(plan.buckets):
        watch = controls_of(plan, number, bucket, np.full(prompts, length))
        if watch is not None:
            added += plan.token_layers_of(attrs.evolve(bucket, runs=watch.runs))
    assert 0 < added <= share * plan.token_layers


@given(cases())
@settings(max_examples=50)
def test_halves_are_the_bucket(case: Case) -> None:
    for bucket in case.plan().buckets:
        if len(bucket.runs) < 2:
            continue
        first, second = bucket.halves()
        assert as_rows(first.runs) + as_rows(second.runs) == as_rows(bucket.runs)
        assert first.start == second.start == bucket.start
        assert abs(len(first.runs) - len(second.runs)) <= 1


# The cheapest cut.


def cost_of(case: Case, groups: list[list[int]]) -> float:
    """What it costs to run rows of these starting positions together, group by group."""
    total = 0.0
    for group in groups:
        depths = [layers_of(stage, case.n_layers) for _, _, start, stage in case.rows
                  if start in group]  # fmt: skip
        tokens = case.seq_len - min(group)
        total += tokens * sum(depths) + case.costs.overhead * (max(depths) + 1)
    return total


def every_cut(starts: list[int]) -> list[list[list[int]]]:
    """All ways to cut ascending positions into groups of neighbours."""
    found = []
    inner = range(1, len(starts))
    for count in range(len(starts)):
        for edges in combinations(inner, count):
            bounds = [0, *edges, len(starts)]
            found.append([starts[low:high] for low, high in pairwise(bounds)])
    return found


@given(cases(starts=6, roomy=True))
@settings(max_examples=300)
def test_the_cut_is_the_cheapest_of_all(case: Case) -> None:
    plan = case.plan()
    starts = sorted({start for _, _, start, _ in case.rows})
    if not starts:
        assert not plan.buckets
        return
    chosen = [sorted(set(bucket.runs.start.tolist())) for bucket in plan.buckets]
    assert sorted(chain.from_iterable(chosen)) == starts
    cheapest = min(cost_of(case, groups) for groups in every_cut(starts))
    assert cost_of(case, chosen) == pytest.approx(cheapest, rel=1e-9)


def test_overhead_decides_whether_neighbours_run_together() -> None:
    rows = [(cell, 0, cell, 0) for cell in range(10)]
    sizes = {}
    for overhead in (0.0, 1e6):
        costs = Costs(1, 1, 1, 1, overhead, 10**6)
        case = Case(rows, 10, 1, 2, 10, costs, 10**6, 0)
        sizes[overhead] = [len(bucket.runs) for bucket in case.plan().buckets]
    assert sizes == {0.0: [1] * 10, 1e6: [10]}


# What it counts.


@given(cases())
@settings(max_examples=200)
def test_counts_are_those_of_a_naive_count(case: Case) -> None:
    plan = case.plan()
    passed = 0
    for bucket in plan.buckets:
        for position in range(bucket.start, case.seq_len):
            for _, _, start, stage in as_rows(bucket.runs):
                assert start >= bucket.start, position
                passed += layers_of(stage, case.n_layers)
    assert plan.token_layers == passed
    assert plan.runs == len(case.rows)
    assert plan.elided == case.cells * case.batch - len(case.rows)
    assert plan.full_token_layers == case.cells * case.batch * case.n_layers * case.seq_len
    assert plan.token_layers <= plan.full_token_layers


@given(cases())
@settings(max_examples=100)
def test_the_description_holds_the_numbers(case: Case) -> None:
    plan = case.plan()
    lines = dict(line.split(maxsplit=1) for line in plan.describe().splitlines())
    assert list(lines) == ["cells", "elided", "traces", "token-layers", "peak"]
    numbers = {name: re.findall(r"[\d.]+", line) for name, line in lines.items()}
    sizes = [len(bucket.runs) for bucket in plan.buckets]
    share = 100 * plan.token_layers / plan.full_token_layers
    expected = {
        "cells": [case.cells, case.batch, case.seq_len],
        "elided": [plan.elided, case.cells * case.batch],
        "traces": [len(sizes), *sorted({min(sizes), max(sizes)})] if sizes else [0],
        "token-layers": [plan.token_layers, f"{share:.2f}", plan.full_token_layers],
    }
    for name, values in expected.items():
        assert numbers[name] == [str(value) for value in values], lines[name]
    assert lines["peak"] == f"{in_units(plan.peak)}, {in_units(case.recorded)} of it recorded"


def test_a_sweep_of_nothing_to_run() -> None:
    case = Case([], 4, 2, 3, 5, Costs(1, 1, 1, 1), 100, 7)
    plan = case.plan()
    assert (plan.runs, plan.elided, plan.token_layers, plan.peak) == (0, 8, 0, 7)
    assert "traces        0\n" in plan.describe()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (2**20, "1.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (3 * 2**40, "3072.0 GiB"),
    ],
)
def test_bytes_in_words(count: int, words: str) -> None:
    assert in_units(count) == words


# What does not fit.


@given(cases().filter(lambda case: case.rows))
@settings(max_examples=100)
def test_a_row_that_cannot_fit_is_refused_with_its_bytes(case: Case) -> None:
    """One byte less than the longest bucket's row needs, and the recorded runs."""
    longest = case.seq_len - min(bucket.start for bucket in case.plan().buckets)
    each = bytes_of(case.costs, longest, case.seq_len)
    assert case.plan(budget=case.recorded + each).peak == case.recorded + each
    with pytest.raises(MemoryBudgetError) as caught:
        case.plan(budget=case.recorded + each - 1)
    said = str(caught.value)
    assert f"a run of {longest} tokens needs {in_units(each)}" in said
    assert f"leaves {in_units(each - 1)}" in said
    assert "memory_budget=" in said


def test_recorded_runs_beyond_the_budget_leave_nothing() -> None:
    case = Case([(0, 0, 0, 0)], 1, 1, 1, 4, Costs(1, 1, 1, 1), 100, 500)
    with pytest.raises(MemoryBudgetError, match="leaves 0 B"):
        case.plan()


# Stages and layers.


@pytest.mark.parametrize("layer", [0, 1, 5])
def test_stages_are_in_the_order_of_a_forward(layer: int) -> None:
    table = decoder_components()
    stages = [stage_of(layer, table[name]) for name in COMPONENT_NAMES]
    assert stages == sorted(stages)
    assert [stage - 3 * layer for stage in stages] == [INPUT, *[INSIDE] * 6, OUTPUT]
    # What a layer gives is what the next one takes: it comes later, and passes the same layers.
    given, taken = stage_of(layer, table["resid"]), stage_of(layer + 1, table["resid_pre"])
    assert given < taken
    assert first_layer(np.array([given, taken])).tolist() == [layer + 1] * 2
    # Norms after a block are inside of the layer, wherever they stand.
    assert stage_of(layer, Component("norm", "input")) == 3 * layer + INSIDE


@given(st.integers(1, 6), st.integers(0, 100))
def test_the_layers_above_a_stage(n_layers: int, number: int) -> None:
    stage = number % (3 * n_layers)
    first = int(first_layer(np.array([stage]))[0])
    assert n_layers - first == layers_of(stage, n_layers)
    # No layer runs for what the last one gives.
    assert (first == n_layers) == (stage == 3 * n_layers - 1)


# Which rows there are.

SEQ = 5


@functools.cache
def place(component: str, layer: int) -> Place:
    api = tiny_api()
    order = list(api.components).index(component)
    return Place(api, component, layer, api.components[component], order, nn.Module())


def stop(component: str, layer: int, group: list[int], head: int | None = None) -> BoundSite:
    return BoundSite(place(component, layer), head, Positions.of([tuple(sorted(group))]))


def changes(
    cells: list[list[BoundSite]], batch: int, where: dict[tuple[str, int], list[tuple[int, ...]]]
) -> _Changes:
    """For each place of some cells: nothing changes but at `(prompt, position[, head])`."""
    patches = Patches(None, [Cell(tuple(cell), "") for cell in cells])
    found = _Changes(patches, Zeros(torch.ones(batch, SEQ)))
    for each in (stop for cell in cells for stop in cell):
        heads = {"q": 4, "o": 4, "k": 2, "v": 2}.get(each.place.name, 1)
        array = torch.zeros(batch, SEQ, heads, dtype=torch.bool)
        for prompt, position, *head in where.get((each.place.name, each.place.layer), []):
            array[(prompt, position, *(head or [slice(None)]))] = True
        found._known[each.place, None, None] = array
    return found


def runs_of(changed: _Changes, batch: int) -> PatchedRuns:
    return patched_runs(changed.patches, batch, changed)


def rows(
    cells: list[list[BoundSite]], batch: int, where: dict[tuple[str, int], list[tuple[int, ...]]]
) -> list[Row]:
    return as_rows(runs_of(changes(cells, batch, where), batch))


def test_a_row_for_each_cell_and_prompt_that_something_changes_in() -> None:
    cells = [[stop("resid", 1, [position])] for position in range(SEQ)]
    where = {("resid", 1): [(0, 2), (0, 4), (2, 4)]}
    assert rows(cells, 3, where) == [(2, 0, 2, 5), (4, 0, 4, 5), (4, 2, 4, 5)]


def test_a_row_begins_where_a_group_changes_first() -> None:
    cells = [[stop("mlp", 0, [0, 1, 3, 4])], [stop("mlp", 0, [2])]]
    where = {("mlp", 0): [(0, 3), (0, 4), (1, 2), (1, 4), (2, 0)]}
    # Position 2 is in the other cell only.
    expected = [(0, 0, 3, 1), (0, 1, 4, 1), (0, 2, 0, 1), (1, 1, 2, 1)]
    assert rows(cells, 3, where) == expected


def test_a_head_is_a_row_where_its_own_columns_change() -> None:
    cells = [[stop("q", 1, [1], head)] for head in (*range(4), None)]
    where = {("q", 1): [(0, 1, 2), (1, 1, 0), (1, 1, 3)]}
    heads = [(0, 1), (2, 0), (3, 1), (4, 0), (4, 1)]
    assert rows(cells, 2, where) == [(cell, prompt, 1, 4) for cell, prompt in heads]


def test_several_sites_enter_with_the_first_that_changes_anything() -> None:
    # Leftmost and lowest need not be the same site's.
    cell = [stop("resid_pre", 0, [3]), stop("attn", 1, [1, 4]), stop("resid", 2, [0, 2])]
    where = {
        ("resid_pre", 0): [(0, 3), (4, 3)],
        ("attn", 1): [(0, 1), (1, 4), (3, 4), (4, 0)],
        ("resid", 2): [(0, 4), (1, 0), (2, 2), (3, 3)],
    }
    expected = [
        (0, 0, 1, 0),  # from layer 0 on, and from the position of the middle site
        (0, 1, 0, 4),  # lowest is the middle site, leftmost the last
        (0, 2, 2, 8),
        (0, 3, 4, 4),  # what changes at 3 is no position of the last site
        (0, 4, 3, 0),
    ]
    assert rows([cell], 5, where) == expected


def test_one_activation_twice_in_a_cell() -> None:
    cell = [stop("k", 1, [2], 0), stop("k", 1, [4, 1], 1)]
    where = {("k", 1): [(0, 2, 1), (0, 4, 0), (1, 2, 0), (1, 4, 1), (2, 1, 1)]}
    # In the first prompt each head changes at the other's position.
    assert rows([cell], 3, where) == [(0, 1, 2, 4), (0, 2, 1, 4)]


def test_nothing_changes() -> None:
    cells = [[stop("resid", 0, [1])], [stop("q", 0, [1], 0), stop("mlp", 2, [0])]]
    found = runs_of(changes(cells, 2, {}), 2)
    assert len(found) == 0
    assert all(len(column) == 0 for column in attrs.astuple(found))


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(COMPONENT_NAMES),
                st.integers(0, 2),
                st.lists(st.integers(0, SEQ - 1), min_size=1, unique=True),
                st.integers(0, 1) | st.none(),
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150)
def test_rows_are_those_of_a_naive_count(given_cells: list[list[Any]], seed: int) -> None:
    batch = 3
    heads = ("q", "k", "v", "o")
    cells = [
        sorted(
            (stop(name, layer, group, head if name in heads else None)
             for name, layer, group, head in cell),
            key=lambda each: (each.place.stage, each.place.order),
        )
        for cell in given_cells
    ]  # fmt: skip
    changed = changes(cells, batch, {})
    random = np.random.default_rng(seed)
    for array in changed._known.values():
        array[:] = torch.from_numpy(random.random(tuple(array.shape)) < 0.2)
    expected = []
    for number, cell in enumerate(cells):
        for prompt in range(batch):
            hits = [
                (position, each.place.stage)
                for each in cell
                for position in each.positions.group(prompt)
                if changed._known[each.place, None, None][prompt, position, slice(None)
                    if each.head is None else each.head].any()
            ]  # fmt: skip
            if hits:
                columns = zip(*hits, strict=True)
                start, stage = (min(column) for column in columns)
                expected.append((number, prompt, start, stage))
    assert as_rows(runs_of(changed, batch)) == expected


def test_rows_one_after_the_other() -> None:
    first = PatchedRuns(*(np.array([number]) for number in (1, 2, 3, 4)))
    second = PatchedRuns(*(np.array([number, number]) for number in (5, 6, 7, 8)))
    assert as_rows(first.then(second)) == [(1, 2, 3, 4), (5, 6, 7, 8), (5, 6, 7, 8)]
    assert as_rows(first.then(second).take(slice(1, 2))) == [(5, 6, 7, 8)]
    assert len(first.then(second)) == 3


def test_work_of_a_bucket_by_hand() -> None:
    """Three rows of 4 tokens in 3 layers: into layer 0, inside layer 1, after layer 2."""
    numbers = [0, 1, 2], [0, 0, 0], [6, 7, 8], [0, 4, 8]
    entering = PatchedRuns(*(np.array(each) for each in numbers))
    plan = Plan((Bucket(6, entering, 15, 9),), 3, 1, 3, 10, recorded=5)
    assert plan.token_layers == 4 * (3 + 2 + 0)
    assert (plan.full_token_layers, plan.elided, plan.peak) == (90, 0, 15)


@given(cases(), cases())
@settings(max_examples=50)
def test_plans_of_chunks_are_one_plan(first: Case, second: Case) -> None:
    """Prompts of the second chunk are numbered after those of the first; no two run at once."""
    same = ("cells", "n_layers", "seq_len")
    second = attrs.evolve(second, **{name: getattr(first, name) for name in same})
    kept = [
        row
        for row in second.rows
        if row[0] < first.cells and row[2] < first.seq_len and row[3] < 3 * first.n_layers
    ]
    budget = 10**6 * bytes_of(second.costs, second.seq_len, second.seq_len)
    second = attrs.evolve(second, rows=kept, budget=budget)
    one, other = first.plan(), second.plan()
    both = joined([one, other])
    for name in ("runs", "elided", "token_layers", "full_token_layers"):
        assert getattr(both, name) == getattr(one, name) + getattr(other, name)
    assert both.batch == first.batch + second.batch
    ran = sorted(row for bucket in both.buckets for row in as_rows(bucket.runs))
    moved = [(cell, prompt + first.batch, *rest) for cell, prompt, *rest in kept]
    assert ran == sorted([*first.rows, *moved])
    if both.buckets:
        assert both.peak == max(bucket.peak for bucket in (*one.buckets, *other.buckets))


def test_a_plan_is_printed_in_words() -> None:
    rows = PatchedRuns(*np.array([[0, 0, 0, 2], [1, 0, 3, 1]]).T)
    costs = Costs(token=1, context=0, score=0, row=0)
    plan = make_plan(rows, cells=3, batch=1, n_layers=3, seq_len=4, costs=costs, budget=2048)
    traces = f"{len(plan.buckets)} trace"
    assert repr(plan).startswith(f"Plan(3 cells in 1 prompt of 4 tokens: {traces}")
    assert repr(plan).endswith(f"% of the token-layers, peak {plan.peak} B)")
    assert str(plan) == plan.describe()
    (bucket,) = plan.buckets
    assert repr(bucket) == f"Bucket(2 rows from token {bucket.start} on, peak {bucket.peak} B)"
    for shown in (repr(plan), repr(bucket), repr(attrs.evolve(plan, cells=0, buckets=()))):
        assert "array" not in shown
        assert "\n" not in shown


def test_a_budget_may_be_larger_than_any_memory() -> None:
    runs = PatchedRuns(*(np.array(each) for each in ([0, 1], [0, 0], [1, 2], [0, 4])))
    plan = make_plan(
        runs, cells=2, batch=1, n_layers=3, seq_len=4, costs=Costs(8, 8, 0, 8), budget=10**40
    )
    assert plan.runs == 2
    assert all(bucket.fitting > 10**18 for bucket in plan.buckets)
