"""The planner: which patched runs share a trace, so that all is computed once and fits in memory.

It is pure: it knows numbers of layers, tokens and bytes, and no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import attrs
import numpy as np

from nnpatch_core._html import block, preformatted
from nnpatch_core.engine.cone.patched_runs import PatchedRuns, first_layer
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory import Costs, in_units


@attrs.frozen(eq=False, repr=False)
class Bucket:
    """Patched runs that share a trace, from one token on.

    Args:
        start: the first position that is run.
        runs: the patched runs, in the order in which they enter: each is a row of the trace.
        peak: bytes in use while it runs, those of the recorded runs among them.
        fitting: how many such runs memory has room for at once.
    """

    start: int
    runs: PatchedRuns
    peak: int
    fitting: int

    def __repr__(self) -> str:
        rows = _counted(len(self.runs), "row")
        return f"Bucket({rows} from token {self.start} on, peak {in_units(self.peak)})"

    def halves(self) -> tuple[Bucket, Bucket]:
        """Two buckets of half the runs."""
        middle = len(self.runs) // 2
        first, second = self.runs.take(slice(middle)), self.runs.take(slice(middle, None))
        most = len(second)
        return (
            Bucket(self.start, first, self.peak, most),
            Bucket(self.start, second, self.peak, most),
        )


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
    """

    buckets: tuple[Bucket, ...]
    cells: int
    batch: int
    n_layers: int
    seq_len: int
    recorded: int = 0
    shortest: int | None = None

    def __repr__(self) -> str:
        traces = _counted(len(self.buckets), "trace")
        cells = _counted(self.cells, "cell")
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
        return sum(len(bucket.runs) for bucket in self.buckets)

    @property
    def elided(self) -> int:
        """How many times a cell is known in a prompt without a run."""
        return self.cells * self.batch - self.runs

    @property
    def token_layers(self) -> int:
        """Tokens that pass a layer, over all layers."""
        return sum(self.token_layers_of(bucket) for bucket in self.buckets)

    @property
    def full_token_layers(self) -> int:
        """The same, of a whole forward for every cell and prompt."""
        return self.cells * self.batch * self.n_layers * self.seq_len

    @property
    def peak(self) -> int:
        """Bytes needed at once, besides the model's weights."""
        return max((bucket.peak for bucket in self.buckets), default=self.recorded)

    @property
    def begun(self) -> int:
        """How many cells at most are incomplete at any time: some of their runs have come.

        The cells of one bucket alone are taken to be looked at in turn.
        """
        cells = [np.unique(bucket.runs.cell) for bucket in self.buckets]
        first = np.full(self.cells, len(cells))
        last = np.full(self.cells, -1)
        for number, here in enumerate(cells):
            first[here] = np.minimum(first[here], number)
            last[here] = number
        spread = last > first
        steps = np.zeros(len(cells) + 1, dtype=np.int64)
        np.add.at(steps, first[spread], 1)
        np.add.at(steps, last[spread] + 1, -1)
        return int(steps.cumsum().max(initial=0)) + 1

    @property
    def controlled(self) -> frozenset[int]:
        """The numbers of the buckets in which unpatched runs go along, to be compared.

        Of each number of tokens that is run, the first: that with the lowest layer.
        """
        first: dict[int, int] = {}
        for number, bucket in enumerate(self.buckets):
            first.setdefault(bucket.start, number)
        return frozenset(first.values())

    def token_layers_of(self, bucket: Bucket) -> int:
        """Tokens that pass a layer in one bucket, over all layers."""
        layers = self.n_layers - first_layer(bucket.runs.stage)
        return int(layers.sum()) * (self.seq_len - bucket.start)

    def describe(self) -> str:
        """The plan in words, one line for each number."""
        pairs = self.cells * self.batch
        sizes = {len(bucket.runs) for bucket in self.buckets}
        ends = dict.fromkeys((min(sizes, default=0), max(sizes, default=0)))
        rows = f", of {' to '.join(map(str, ends))} rows" if sizes else ""
        return "\n".join(
            (
                f"cells         {self.cells} in {self._prompts}",
                f"elided        {self.elided} of {pairs} pairs of cell and prompt",
                f"traces        {len(self.buckets)}{rows}",
                f"token-layers  {self.token_layers}, {self._share:.2%} of {self.full_token_layers}",
                f"peak          {in_units(self.peak)}, {in_units(self.recorded)} of it recorded",
            )
        )

    @property
    def _prompts(self) -> str:
        other = self.shortest is not None and self.shortest < self.seq_len
        least = f"{self.shortest} to " if other else ""
        return f"{_counted(self.batch, 'prompt')} of {least}{self.seq_len} tokens"

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

    Raises:
        MemoryBudgetError: a single row does not fit.
    """
    buckets: list[Bucket] = []
    for starts in _cuts(runs, n_layers, seq_len, costs.overhead):
        chosen = runs.take(np.isin(runs.start, starts))
        order = np.lexsort((chosen.prompt, chosen.cell, chosen.stage))
        buckets += _fitting(chosen.take(order), int(starts[0]), seq_len, costs, (budget, recorded))
    return Plan(tuple(buckets), cells, batch, n_layers, seq_len, recorded)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plan of a sweep whose prompts run in several chunks, one after the other."""
    buckets: list[Bucket] = []
    batch = 0
    for plan in plans:
        for bucket in plan.buckets:
            runs = attrs.evolve(bucket.runs, prompt=bucket.runs.prompt + batch)
            buckets.append(attrs.evolve(bucket, runs=runs))
        batch += plan.batch
    largest = max(plan.recorded for plan in plans)
    return attrs.evolve(plans[0], buckets=tuple(buckets), batch=batch, recorded=largest)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


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


def _fitting(
    runs: PatchedRuns, start: int, seq_len: int, costs: Costs, memory: tuple[int, int]
) -> list[Bucket]:
    """Runs that begin together, in as many buckets as memory asks for."""
    budget, recorded = memory
    tokens, left = seq_len - start, budget - recorded
    each = costs.bytes_of(tokens, seq_len)
    if each > left:
        raise MemoryBudgetError(
            f"a run of {tokens} tokens needs {in_units(each)} beside what is recorded, and the "
            f"memory budget leaves {in_units(max(left, 0))}: raise memory_budget=, or give "
            "shorter prompts"
        )
    fitting = left // each
    most = min(fitting, max(costs.tokens_at_once // tokens, 1))
    parts = math.ceil(len(runs) / most)
    edges = np.linspace(0, len(runs), parts + 1).round().astype(np.int64)
    return [
        Bucket(start, runs.take(slice(low, high)), recorded + int(high - low) * each, fitting)
        for low, high in pairwise(edges)
    ]
