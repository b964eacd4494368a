"""What every sweep shares: its checks, and the runs that nothing is patched in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags, shown
from nnpatch_core._integers import strict_int
from nnpatch_core._models import module_of
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import ModelAPI, check_fits, of_other_type
from nnpatch_core.batch import Batch
from nnpatch_core.engine import why_not_cone, why_rather_full
from nnpatch_core.engine.rows import one_each_place
from nnpatch_core.errors import (
    AdapterWarning,
    EngineError,
    EngineWarning,
    MaskError,
    MetricError,
    PatchingError,
    PositionError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.memory import Gathered, Limits, limits_of
from nnpatch_core.metrics import (
    Metric,
    MetricContext,
    MetricSpec,
    is_per_prompt,
    measure,
    name_metrics,
    reads_some,
)
from nnpatch_core.plugins import find_metric
from nnpatch_core.results import Baseline
from nnpatch_core.site import AnySite, Site
from nnpatch_core.sites import Grid, SweepSites
from nnpatch_core.sweep.lengths import Spoken
from nnpatch_core.tracing import check_forwards, forward, forward_hooks, in_words

#: `auto` is the cone engine where adapter and model allow it.
ENGINES = ("auto", "cone", "full")


@attrs.frozen(eq=False)
class Sweep:
    """A sweep that has passed its checks: what will be patched, and how it is measured.

    Args:
        nnmodel: the model, wrapped by nnsight.
        grids: site name to its cells.
        metrics: by name.
        limits: the memory that it may use.
        engine: one of `ENGINES`.
        fallback: why it is `full`, where `auto` was asked for.
        progress: whether a bar is shown.
    """

    nnmodel: Any
    grids: Mapping[str, Grid]
    metrics: Mapping[str, Metric]
    limits: Limits
    engine: str
    fallback: str | None
    progress: bool

    @property
    def cells(self) -> list[AnySite]:
        """What is patched in each forward, name by name."""
        return [site for grid in self.grids.values() for site in grid.sites]

    @property
    def sites(self) -> list[Site]:
        """Every site that some cell patches."""
        return [site for cell in self.cells for site in cell.sites]

    @property
    def places(self) -> list[Site]:
        """One site for each component of each layer: what a run must be read at."""
        return one_each_place(self.sites)

    def present(self, mask: Tensor) -> dict[str, Tensor]:
        """Site name to `[cells, batch]`, bool: which prompts have a token where a cell patches."""
        real = mask.bool().cpu()
        # Looked up by positions, of which there are far fewer than cells.
        known: dict[tuple[int, ...] | None, Tensor] = {}

        def of(site: Site) -> Tensor:
            if site.seq_pos not in known:
                known[site.seq_pos] = real[:, list(site.group(real.shape[1]))].any(1)
            return known[site.seq_pos]

        found = {}
        for name, grid in self.grids.items():
            rows = [
                of(cell) if isinstance(cell, Site) else torch.stack([*map(of, cell.sites)]).any(0)
                for cell in grid.sites
            ]
            found[name] = torch.stack(rows) if rows else real.new_zeros(0, len(real))
        return found

    def where_present(self, mask: Tensor) -> Sweep:
        """The sweep without the cells that only padding would be patched in.

        Args:
            mask: `[batch, seq]`: 1 where a prompt can be patched.

        Raises:
            PositionError: no cell is left.
        """
        kept = torch.cat([present.any(1) for present in self.present(mask).values()])
        if not kept.any():
            raise PositionError("every position that is swept is padding in every prompt")
        return self.only(kept)

    def only(self, kept: Tensor) -> Sweep:
        """The sweep of some of its cells; `kept` is `[cells]`, bool."""
        grids = {}
        for name, some in self.by_name(kept).items():
            grid, numbers = self.grids[name], some.nonzero().flatten().tolist()
            grids[name] = Grid(
                grid.axes,
                tuple(grid.index[number] for number in numbers),
                tuple(grid.sites[number] for number in numbers),
            )
        return attrs.evolve(self, grids=grids)

    def part(self, cells: slice) -> Sweep:
        """The sweep of the cells from one number up to another."""
        kept = torch.zeros(len(self.cells), dtype=torch.bool, device="cpu")
        kept[cells] = True
        return self.only(kept)

    def by_name(self, values: Tensor) -> dict[str, Tensor]:
        """`[cells, ...]` of all cells as site name to those of its cells."""
        sizes = [len(grid.sites) for grid in self.grids.values()]
        return dict(zip(self.grids, torch.split(values, sizes), strict=True))

    def settled(self, reason: str | None) -> Sweep:
        """The sweep in the engine that it will run in, given why it cannot be the cone engine.

        Raises:
            EngineError: the cone engine was asked for.
        """
        if reason is None or self.engine == "full":
            return self
        if self.engine == "cone":
            raise EngineError(f"engine='cone' cannot run this sweep: {reason}")
        return attrs.evolve(self, engine="full", fallback=reason)

    def groups(self, columns: int, batch: int) -> list[slice]:
        """The cells whose logits wait together, where they wait for more than their own trace.

        Args:
            columns: how many logits wait of each prompt.
            batch: the number of prompts.
        """
        count, most = len(self.cells), self.limits.cells(batch, columns)
        # As even as can be, as what runs together shares its weights.
        parts = -(-count // most)
        edges = [count * part // parts for part in range(parts + 1)]
        return [slice(*ends) for ends in pairwise(edges)]

    @property
    def alone(self) -> dict[str, Metric]:
        """The metrics that are declared for each prompt alone."""
        return {name: each for name, each in self.metrics.items() if is_per_prompt(each)}

    @property
    def waiting(self) -> dict[str, Metric]:
        """The other metrics, which wait until all prompts of a cell were run."""
        return {name: each for name, each in self.metrics.items() if not is_per_prompt(each)}

    def chunks(self, batch: int) -> list[slice]:
        """The rows that are run together."""
        size = self.limits.prompts
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def prepare(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    target: Batch,
    *,
    metric: MetricSpec,
    engine: str,
    batch_size: int | None,
    memory_budget: int | str | None,
    progress: bool,
    gathers: bool = True,
) -> Sweep:
    """Check everything that can be checked before a forward runs.

    `gathers` tells whether logits wait for those of a cell's other prompts, if a metric wants it.

    Raises:
        PatchingError: one of its kinds, for whatever is wrong.
    """
    if not isinstance(engine, str) or engine not in ENGINES:
        raise UnknownNameError(f"unknown engine {shown(engine)}; there are {', '.join(ENGINES)}")
    if isinstance(sites, type) or not hasattr(sites, "grids"):
        raise PatchingError(
            f"sites must be Sites(...) or Sites.from_sites(...), got {shown(sites)}"
        )
    if batch_size is not None:
        batch_size = strict_int(batch_size, "batch_size", TokensError)
        if batch_size < 1:
            raise TokensError(f"batch_size must be at least 1, got {batch_size}")
    check_flags(progress=progress)
    metrics = name_metrics(metric, find_metric)
    model = module_of(nnmodel)
    grids = sites.grids(nnmodel, api, target.seq_len)
    found = [site for grid in grids.values() for cell in grid.sites for site in cell.sites]
    for adapter in {id(site.api): site.api for site in found}.values():
        check_fits(adapter, model)
        if not isinstance(sites, Spoken):
            _warn_of_other_type(adapter, model)
    check_forwards(found, model)
    size = (len(target), target.seq_len)
    whole = not all(map(reads_some, metrics.values()))
    gathered = None
    waiting = {name: each for name, each in metrics.items() if not is_per_prompt(each)}
    if waiting and gathers:
        cells = sum(len(grid.sites) for grid in grids.values())
        gathered = Gathered(tuple(waiting), cells, not all(map(reads_some, waiting.values())))
    limits = limits_of(
        one_each_place(found), nnmodel, model, *size, memory_budget, batch_size, whole, gathered
    )
    sweep = Sweep(nnmodel, grids, metrics, limits, engine, None, progress)
    reason = why_not_cone(found, model)
    if reason is None and engine == "auto":
        reason = why_rather_full(model)
    return sweep.settled(reason)


def warn_of_parts(sweep: Sweep, batch: int) -> None:
    """Warn where a hook that goes by the number of a row meets other prompts there.

    Args:
        sweep: what is patched.
        batch: the number of prompts.
    """
    hooks = forward_hooks(module_of(sweep.nnmodel))
    if hooks and len(sweep.chunks(batch)) > 1:
        warn(
            f"the model has {in_words(hooks)}, and the prompts run in several parts, each with "
            "rows from 0: if it goes by a prompt's place in the batch, run all of them together, "
            "by a larger batch_size= or memory_budget=",
            EngineWarning,
        )


def _warn_of_other_type(adapter: ModelAPI, model: Any) -> None:
    doubt = of_other_type(adapter, model)
    if doubt:
        warn(doubt, AdapterWarning)


def check_padding(sweep: Sweep, batch: Batch) -> Batch:
    """The batch itself, if the adapters allow for the padding that it has.

    Raises:
        MaskError: it has padding, and by its adapter the model lets other tokens see it.
    """
    for adapter in {id(site.api): site.api for site in sweep.sites}.values():
        if getattr(adapter, "padding", True):
            continue
        padded = (batch.mask == 0).any(1).nonzero().flatten().tolist()
        if padded:
            raise MaskError(
                f"adapter {adapter.name!r} says that its models do not leave masked tokens out, "
                f"and the prompts {padded} are padded: give prompts of one length"
            )
    return batch


def run_baseline(sweep: Sweep, batch: Batch) -> Tensor:
    """The unpatched logits at each prompt's last token, `[batch, vocab]`, on the CPU."""
    chunks = sweep.chunks(len(batch))
    return torch.cat([forward(sweep.nnmodel, batch.rows(rows)) for rows in chunks])


def baselines(sweep: Sweep, context: MetricContext) -> dict[str, Baseline]:
    """Each metric of the unpatched runs."""
    source = measure(sweep.metrics, context.source_logits, context)
    target = measure(sweep.metrics, context.target_logits, context)
    return {name: Baseline(source[name], target[name]) for name in sweep.metrics}


def check_finite(name: str, value: float, what: str) -> None:
    """Raise `MetricError` if a number that every cell is compared with is nan or infinite."""
    if not math.isfinite(value):
        raise MetricError(f"metric {name!r} is {value} {what}: no cell can be compared with it")
