"""The planner: which patched runs share a trace, so that all is computed once and fits in memory.

It is pure: it knows numbers of layers, tokens and bytes, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import attrs
import numpy as np

from nnpatch_core._arrays import Integers
from nnpatch_core._html import block, preformatted
from nnpatch_core.engine.cone.buckets import Bucket, Buckets, counted
from nnpatch_core.engine.cone.patched_runs import PatchedRuns, first_layer
from nnpatch_core.engine.even import even_shares
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import Costs, Pieces, Room, in_units


@attrs.frozen
class DevicePeak:
    """The memory that one of several devices needs at once, besides the weights.

    Args:
        device: its name.
        recorded: bytes there of the recorded runs.
        peak: bytes there, those among them.
    """

    device: str
    recorded: int
    peak: int

    def __str__(self) -> str:
        return f"{self.device}: {in_units(self.peak)}, {in_units(self.recorded)} of it recorded"


def _buckets(buckets: Iterable[Bucket]) -> Buckets:
    return Buckets.of(buckets)


@attrs.frozen(eq=False, repr=False)
class Plan:
    """How a sweep will run; printed, it says so in words.

    Args:
        buckets: what runs together, in the order in which it runs: from the leftmost token on.
        cells: the number of cells.
        batch: the number of prompts.
        n_layers: the model's layers.
        seq_len: tokens per prompt, padding included.
        recorded: bytes of the recorded runs.
        shortest: tokens of the shortest prompt; None if it is not told.
        pieces: how recorded runs are made in pieces; None if at once.
        recorded_runs: how many runs of each prompt are recorded.
        devices: what each device needs, where the model lies on several; `recorded` and the peaks
            of buckets are then of the one that needs most.
    """

    buckets: Buckets = attrs.field(converter=_buckets)
    cells: int
    batch: int
    n_layers: int
    seq_len: int
    recorded: int = 0
    shortest: int | None = None
    pieces: Pieces | None = None
    recorded_runs: int = 2
    devices: tuple[DevicePeak, ...] = ()

    def __repr__(self) -> str:
        traces = counted(len(self.buckets), "trace")
        cells = counted(self.cells, "cell")
        return (
            f"Plan({cells} in {self._prompts}: {traces}, {self._share:.2%} of the token-layers, "
            f"peak {in_units(self.peak)})"
        )

    def __str__(self) -> str:
        return self.describe()

    def _repr_html_(self) -> str:
        return block(preformatted(self.describe()))

    @property
    def runs(self) -> int:
        """How many times a cell is run in a prompt."""
        return len(self.buckets.runs)

    @property
    def elided(self) -> int:
        """How many times a cell is known in a prompt without a run."""
        return self.cells * self.batch - self.runs

    @property
    def token_layers(self) -> int:
        """Tokens that pass a layer, over all layers."""
        return int(self.token_layers_of_each.sum())

    @property
    def recorded_token_layers(self) -> int:
        """Tokens that pass a layer in the recorded runs.

        Each of several processes runs those of all prompts whose cells it shares with others.
        """
        return self.recorded_runs * self.batch * self.n_layers * self.seq_len

    @property
    def full_token_layers(self) -> int:
        """The same, of a whole forward for every cell and prompt."""
        return self.cells * self.batch * self.n_layers * self.seq_len

    @property
    def peak(self) -> int:
        """Bytes needed at once, besides the model's weights; on the device that needs most."""
        return int(self.buckets.peak.max(initial=0)) or self.recorded

    @property
    def begun(self) -> int:
        """How many cells at most are incomplete at any time: some of their runs have come.

        The cells of one bucket alone are taken to be looked at in turn.
        """
        cell, number = self.buckets.runs.cell, self.buckets.bucket_of_runs
        first = np.full(self.cells, len(self.buckets))
        last = np.full(self.cells, -1)
        np.minimum.at(first, cell, number)
        np.maximum.at(last, cell, number)
        spread = last > first
        steps = np.zeros(len(self.buckets) + 1, dtype=np.int64)
        np.add.at(steps, first[spread], 1)
        np.add.at(steps, last[spread] + 1, -1)
        return int(steps.cumsum().max(initial=0)) + 1

    @cached_property
    def controlled(self) -> frozenset[int]:
        """The numbers of the buckets in which unpatched runs go along, to be compared.

        Of each number of tokens that is run, the first: that with the lowest layer.
        """
        _, first = np.unique(self.buckets.start, return_index=True)
        return frozenset(first.tolist())

    @cached_property
    def token_layers_of_each(self) -> Integers:
        """`[buckets]`: tokens that pass a layer, over all layers."""
        buckets = self.buckets
        layers = self.n_layers - first_layer(buckets.runs.stage)
        summed = np.concatenate([[0], np.cumsum(layers)])[buckets.ends]
        found: Integers = np.diff(summed) * (self.seq_len - buckets.start)
        return found

    def shared_out(self, count: int) -> Integers:
        """`[buckets]`: which of `count` shares each is in, by its work; see `even_shares`."""
        return even_shares(self.token_layers_of_each, count)

    def token_layers_of(self, bucket: Bucket) -> int:
        """Tokens that pass a layer in one bucket, over all layers."""
        layers = self.n_layers - first_layer(bucket.runs.stage)
        return int(layers.sum()) * (self.seq_len - bucket.start)

    def describe(self) -> str:
        """The plan in words, one line for each number."""
        pairs = self.cells * self.batch
        sizes = self.buckets.sizes
        ends = dict.fromkeys((int(sizes.min()), int(sizes.max()))) if len(sizes) else {}
        rows = f", of {' to '.join(map(str, ends))} rows" if ends else ""
        return "\n".join(
            (
                f"cells         {self.cells} in {self._prompts}",
                f"elided        {self.elided} of {pairs} pairs of cell and prompt",
                f"traces        {len(self.buckets)}{rows}",
                f"token-layers  {self.token_layers}, {self._share:.2%} of {self.full_token_layers}",
                *self._peaks,
                *(() if self.pieces is None else (f"recorded runs in {self.pieces}",)),
            )
        )

    @property
    def _peaks(self) -> list[str]:
        if not self.devices:
            return [
                f"peak          {in_units(self.peak)}, {in_units(self.recorded)} of it recorded"
            ]
        return [f"peak          {device}" for device in self.devices]

    @property
    def _prompts(self) -> str:
        other = self.shortest is not None and self.shortest < self.seq_len
        least = f"{self.shortest} to " if other else ""
        return f"{counted(self.batch, 'prompt')} of {least}{self.seq_len} tokens"

    @property
    def _share(self) -> float:
        return self.token_layers / max(self.full_token_layers, 1)


def make_plan(
    runs: PatchedRuns,
    *,
    cells: int,
    batch: int,
    n_layers: int,
    seq_len: int,
    costs: Costs,
    budget: int,
    recorded: int = 0,
    rooms: Sequence[Room] = (),
) -> Plan:
    """Put patched runs together that begin at neighbouring tokens, as far as that costs less.

    A bucket reads each weight once for all of its runs, but each of them begins at its leftmost
    token on. The cut with the lowest sum is found by dynamic programming over the tokens.

    Args:
        runs: the patched runs.
        cells: the number of cells.
        batch: the number of prompts.
        n_layers: the model's layers.
        seq_len: tokens per prompt.
        costs: what a row costs.
        budget: bytes that may be in use at once, besides the weights.
        recorded: how many of them the recorded runs take.
        rooms: what each device has, where the model lies on several: in place of `budget` and
            `recorded`. A row lives on each in turn, and the tightest one bounds a bucket.

    Raises:
        MemoryBudgetError: a single row does not fit.
    """
    memory = [
        _Memory(room, batch * room.recorded, room.usable - batch * room.recorded) for room in rooms
    ]
    if not rooms:
        every = tuple(range(n_layers))
        memory = [
            _Memory(Room("", every, True, costs, budget, budget, 0), recorded, budget - recorded)
        ]
    recorded = max(each.recorded for each in memory)
    resting = tuple(DevicePeak(each.room.device, each.recorded, each.recorded) for each in memory)
    cuts = _cuts(runs, n_layers, seq_len, costs.overhead)
    if not cuts:
        return Plan((), cells, batch, n_layers, seq_len, recorded, devices=resting if rooms else ())
    # The cut that each run is in, by its starting position.
    first = np.array([int(starts[0]) for starts in cuts])
    cut = np.searchsorted(first, runs.start, side="right") - 1
    runs = runs.take(np.lexsort((runs.prompt, runs.cell, runs.stage, cut)))
    counts = np.bincount(cut, minlength=len(cuts))
    # By stage, so that the first run of a cut enters lowest.
    begins = np.concatenate([[0], np.cumsum(counts)[:-1]])
    lowest = first_layer(runs.stage[begins])
    parts = [
        _fitting(int(count), start, seq_len, costs, [m for m in memory if m.reached_from(layer)])
        for count, start, layer in zip(counts, first.tolist(), lowest.tolist(), strict=True)
    ]
    sizes, peak, fitting = map(np.concatenate, zip(*parts, strict=True))
    start = np.repeat(first, [len(part[0]) for part in parts])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    buckets = Buckets(runs, ends, start, peak, fitting)
    devices: tuple[DevicePeak, ...] = ()
    if rooms:
        layer = np.repeat(lowest, [len(part[0]) for part in parts])
        devices = tuple(_peak(each, sizes, start, layer, seq_len) for each in memory)
    return Plan(buckets, cells, batch, n_layers, seq_len, recorded, devices=devices)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plan of a sweep whose prompts run in several chunks, one after the other."""
    parts, batch = [], 0
    for plan in plans:
        runs = plan.buckets.runs
        moved = attrs.evolve(runs, prompt=runs.prompt + batch) if batch else runs
        parts.append(attrs.evolve(plan.buckets, runs=moved))
        batch += plan.batch
    largest = max(plan.recorded for plan in plans)
    devices = tuple(
        DevicePeak(
            same[0].device, max(each.recorded for each in same), max(each.peak for each in same)
        )
        for same in zip(*(plan.devices for plan in plans), strict=True)
    )
    return attrs.evolve(
        plans[0], buckets=Buckets.joined(parts), batch=batch, recorded=largest, devices=devices
    )


@attrs.frozen
class _Memory:
    """A device, some prompts' recorded runs there, and the bytes that they leave."""

    room: Room
    recorded: int
    left: int

    def reached_from(self, layer: int) -> bool:
        """See `Room.reached_from`."""
        return self.room.reached_from(layer)

    def each(self, tokens: int, seq_len: int) -> int:
        """Bytes that a row needs here."""
        return max(self.room.costs.bytes_of(tokens, seq_len), 1)


def _cuts(runs: PatchedRuns, n_layers: int, seq_len: int, overhead: float) -> list[np.ndarray]:
    """The starting positions, cut into those that run together."""
    starts, which = np.unique(runs.start, return_inverse=True)
    count = len(starts)
    layers = n_layers - first_layer(runs.stage)
    # For each starting position the layers of all its runs, and the longest way up.
    work = np.bincount(which, weights=layers, minlength=count)
    depth = np.zeros(count)
    np.maximum.at(depth, which, layers)
    before = np.concatenate([[0.0], np.cumsum(work)])
    best = np.zeros(count + 1)
    origin = np.zeros(count, dtype=np.int64)
    longest = np.zeros(count)
    for last in range(count):
        longest[: last + 1] = np.maximum(longest[: last + 1], depth[last])
        tokens = (seq_len - starts[: last + 1]) * (before[last + 1] - before[: last + 1])
        # The trace itself costs about as much as a layer more.
        cost = best[: last + 1] + tokens + overhead * (longest[: last + 1] + 1)
        origin[last] = int(cost.argmin())
        best[last + 1] = cost[origin[last]]
    cuts = []
    end = count
    while end:
        begin = int(origin[end - 1])
        cuts.append(starts[begin:end])
        end = begin
    return cuts[::-1]


def _peak(
    memory: _Memory, sizes: Integers, start: Integers, layer: Integers, seq_len: int
) -> DevicePeak:
    """The peak of one device, by the buckets that come to it."""
    needed = [
        size * memory.each(seq_len - first, seq_len)
        for size, first, lowest in zip(sizes.tolist(), start.tolist(), layer.tolist(), strict=True)
        if memory.reached_from(lowest)
    ]
    peak = memory.recorded + max(needed, default=0)
    return DevicePeak(memory.room.device, memory.recorded, peak)


def _fitting(
    count: int, start: int, seq_len: int, costs: Costs, memory: Sequence[_Memory]
) -> tuple[Integers, Integers, Integers]:
    """Runs that begin together, in as many buckets as memory asks for: sizes, peaks and room.

    Args:
        count: how many runs.
        start: where they begin.
        seq_len: tokens per prompt.
        costs: how many tokens are worth running together.
        memory: the devices that they come to.
    """
    tokens = seq_len - start
    fitting = np.iinfo(np.int64).max
    for here in memory:
        each = here.each(tokens, seq_len)
        if each > here.left:
            at = f" on {here.room.device}" if here.room.device else ""
            raise MemoryBudgetError(
                f"a run of {tokens} tokens needs {in_units(each)}{at} beside what is recorded, and "
                f"the memory budget leaves {in_units(max(here.left, 0))}: raise memory_budget=, or "
                "give shorter prompts"
            )
        # A budget may be any number, and an array's may not.
        fitting = min(here.left // each, fitting)
    most = min(fitting, max(costs.tokens_at_once // tokens, 1))
    parts = math.ceil(count / most)
    edges: Integers = np.linspace(0, count, parts + 1).round().astype(np.int64)
    sizes: Integers = np.diff(edges)
    peaks = [here.recorded + sizes * here.each(tokens, seq_len) for here in memory]
    return sizes, np.max(peaks, 0), np.full_like(sizes, fitting)
