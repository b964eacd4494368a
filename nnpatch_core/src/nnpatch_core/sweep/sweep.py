"""A sweep that has passed its checks, and the runs in which nothing is patched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._integers import strict_int
from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch
from nnpatch_core.errors import EngineWarning, MaskError, MetricError, TokensError
from nnpatch_core.memory import Beginning, Gathered, Limits, limits_of
from nnpatch_core.metrics import (
    Metric,
    MetricContext,
    is_per_prompt,
    measure,
    reads_some,
)
from nnpatch_core.results import Baseline
from nnpatch_core.sweep.layout import Layout
from nnpatch_core.sweep.provenance import Call
from nnpatch_core.tracing import Patches, begin, forward, forward_hooks, in_words


def _batch_size(value: Any) -> int | None:
    if value is None:
        return None
    size = strict_int(value, "batch_size", TokensError)
    if size < 1:
        raise TokensError(f"batch_size must be at least 1, got {size}")
    return size


@attrs.frozen
class Options:
    """How a sweep may run: the user's arguments of these names.

    Args:
        batch_size: how many prompts run together, at most; None is as many as fit.
        memory_budget: bytes, a string such as `"4 GiB"`, or None for half of what is free.
        progress: whether a bar is shown.
        seed: of what is drawn at random; None where nothing is.
        call: the call whose arguments they are.
    """

    batch_size: int | None = attrs.field(default=None, converter=_batch_size)
    memory_budget: Any = None
    progress: bool = attrs.field(default=False)
    seed: int | None = attrs.field(default=None, kw_only=True)
    call: Call = attrs.field(factory=Call, kw_only=True, eq=False, repr=False)

    @progress.validator
    def _is_flag(self, _: Any, progress: Any) -> None:
        check_flags(progress=progress)


@attrs.frozen(eq=False)
class Sweep:
    """The cells that are patched, and how they are measured.

    Args:
        layout: the cells.
        metrics: by name.
        options: how it may run.
        limits: the memory that it may use.
        target: the prompts that are patched.
        trimmed: whether nothing is recorded left of the first position that is patched.
        padded: whether some prompt has padding.
        beginning: the tokens that may run in pieces; None if none may.
    """

    layout: Layout
    metrics: Mapping[str, Metric]
    options: Options
    limits: Limits
    target: Batch
    trimmed: bool = False
    padded: bool = True
    beginning: Beginning | None = None

    @property
    def batch(self) -> int:
        """The number of prompts."""
        return len(self.target)

    @property
    def seq_len(self) -> int:
        """Tokens per prompt."""
        return self.target.seq_len

    @property
    def patches(self) -> Patches:
        """The cells, found in the model."""
        return self.layout.patches

    @property
    def nnmodel(self) -> Any:
        """The model, wrapped by nnsight."""
        return self.patches.nnmodel

    @property
    def alone(self) -> dict[str, Metric]:
        """The metrics that are declared for each prompt alone."""
        return {name: each for name, each in self.metrics.items() if is_per_prompt(each)}

    @property
    def waiting(self) -> dict[str, Metric]:
        """The other metrics, which wait until all prompts of a cell were run."""
        return {name: each for name, each in self.metrics.items() if not is_per_prompt(each)}

    @property
    def chunks(self) -> list[slice]:
        """The prompts that run together."""
        return self.limits.chunks(self.batch)

    def only(self, kept: Tensor) -> Sweep:
        """The sweep of some of its cells; `kept` is `[cells]`, bool."""
        return attrs.evolve(self, layout=self.layout.only(kept))

    def rows(self, chunk: slice) -> Sweep:
        """The sweep as some of its prompts are opened for it: positions are theirs."""
        layout = self.layout.rows(chunk)
        return self if layout is self.layout else attrs.evolve(self, layout=layout)

    def part(self, group: slice) -> Sweep:
        """The sweep of the cells from one number up to another."""
        kept = torch.zeros(len(self.patches.cells), dtype=torch.bool, device="cpu")
        kept[group] = True
        return self.only(kept)

    def where_present(self, mask: Tensor) -> Sweep:
        """See `Layout.where_present`."""
        return attrs.evolve(self, layout=self.layout.where_present(mask))

    @classmethod
    def of(
        cls,
        layout: Layout,
        target: Batch,
        metrics: Mapping[str, Metric],
        options: Options,
        *,
        gathers: bool,
        trimmed: bool = False,
        padded: bool = True,
        beginning: Beginning | None = None,
    ) -> Sweep:
        """Lay metrics on cells, and cut the prompts to the memory.

        Args:
            layout: the cells.
            target: the prompts that are patched.
            metrics: by name.
            options: how the sweep may run.
            gathers: whether logits wait for those of a cell's other prompts, if a metric wants it.
            trimmed: whether nothing is recorded left of the first position that is patched.
            padded: whether some prompt has padding.
            beginning: the tokens that may run in pieces; None if none may.

        Raises:
            PatchingError: one of its kinds, for whatever is wrong.
        """
        # Its limits go by all the rest.
        none: Any = None
        sweep = cls(layout, metrics, options, none, target, trimmed, padded, beginning)
        return attrs.evolve(sweep, limits=sweep.limits_of(gathers=gathers))

    def to_estimate(self) -> Sweep:
        """The same sweep, of which no logits wait for others, as they do where it is measured."""
        whole = attrs.evolve(self, trimmed=False, beginning=None)
        return attrs.evolve(whole, limits=whole.limits_of(gathers=False))

    def limits_of(self, *, gathers: bool) -> Limits:
        """The memory that it may use.

        Args:
            gathers: whether logits wait for those of a cell's other prompts, if a metric wants it.

        Raises:
            MemoryBudgetError: one prompt does not fit in it.
        """
        gathered = None
        if self.waiting and gathers:
            whole = not all(map(reads_some, self.waiting.values()))
            gathered = Gathered(tuple(self.waiting), len(self.patches.cells), whole)
        return limits_of(
            self.patches,
            self.batch,
            self.seq_len,
            given=self.options.memory_budget,
            batch_size=self.options.batch_size,
            whole=not all(map(reads_some, self.metrics.values())),
            gathered=gathered,
            places=_places(self.target),
            trimmed=self.trimmed,
            padded=self.padded,
            beginning=self.beginning,
        )

    def groups(self, columns: int) -> list[slice]:
        """The cells whose logits wait together, where they wait for more than their own trace.

        Args:
            columns: how many logits of each prompt wait.
        """
        count, most = len(self.patches.cells), self.limits.cells(self.batch, columns)
        # As even as can be, as what runs together shares its weights.
        parts = -(-count // most)
        edges = [count * part // parts for part in range(parts + 1)]
        return [slice(*ends) for ends in pairwise(edges)]


def _places(target: Batch) -> int:
    """Of how many positions the logits of a run are computed, or kept; activations take as much."""
    read = target.read
    if read is None:
        return 1
    sites = sum(site.positions.shape[1] for site in target.sites)
    return max(read.shape[1], len({*read.flatten().tolist()})) + sites


def warn_of_chunks(sweep: Sweep, chunks: Sequence[slice]) -> None:
    """Warn where a hook that goes by the number of a row meets other prompts there.

    Args:
        sweep: what is patched.
        chunks: the prompts that run together.

    Warns:
        EngineWarning: there are such hooks, and the prompts run in several parts.
    """
    hooks = forward_hooks(sweep.patches.model)
    if hooks and len(chunks) > 1:
        warn(
            f"the model has {in_words(hooks)}, and the prompts run in several parts, each with "
            "rows from 0: if it goes by a prompt's place in the batch, run all of them together, "
            "by a larger batch_size= or memory_budget=",
            EngineWarning,
        )


def check_padding(patches: Patches, batch: Batch) -> Batch:
    """The batch itself, if the adapters allow for the padding that it has.

    Raises:
        MaskError: it has padding, and by its adapter the model lets other tokens see it.
    """
    for adapter in patches.adapters:
        padded = (batch.mask == 0).any(1).nonzero().flatten().tolist()
        if padded and not getattr(adapter, "padding", True):
            raise MaskError(
                f"adapter {adapter.name!r} says that its models do not leave masked tokens out, "
                f"and the prompts {padded} are padded: give prompts of one length"
            )
    return batch


def run_unpatched(sweep: Sweep, batch: Batch, chunks: Sequence[slice]) -> Tensor:
    """The logits of each prompt with nothing patched, as `forward` gives them."""
    return torch.cat([_unpatched(sweep, batch.rows(chunk)) for chunk in chunks])


def _unpatched(sweep: Sweep, batch: Batch) -> Tensor:
    nnmodel, edges = sweep.nnmodel, sweep.limits.edges
    if not edges:
        return forward(nnmodel, batch)
    begun = begin(nnmodel, batch, edges, sweep.patches.n_layers, sweep.limits.store)
    return forward(nnmodel, batch, cache=begun.given, start=begun.start)


def baselines(sweep: Sweep, context: MetricContext) -> dict[str, Baseline]:
    """Each metric of the unpatched runs."""
    source = measure(sweep.metrics, context.source_logits, context.of_source_run)
    target = measure(sweep.metrics, context.target_logits, context)
    return {name: Baseline(source[name], target[name]) for name in sweep.metrics}


def check_finite(name: str, value: float, what: str) -> None:
    """Raise `MetricError` if a number that every cell is compared with is nan or infinite."""
    if not math.isfinite(value):
        raise MetricError(f"metric {name!r} is {value} {what}: no cell can be compared with it")
