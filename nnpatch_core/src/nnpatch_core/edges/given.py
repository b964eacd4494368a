"""The activations of senders that are ablated: zeros, means, or another prompt's activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.batch import Batch
from nnpatch_core.edges.changes import Given
from nnpatch_core.edges.layers import Layers
from nnpatch_core.interventions import Ablation, AblationRuns, Recorded, RunArguments, read_ablation
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.site import Site
from nnpatch_core.sites import Sites
from nnpatch_core.sweep import Options, Sweep, Values, lay_out


@attrs.frozen(eq=False, slots=False)
class Ablated:
    """The activations that ablated senders get, in any of the prompts.

    Args:
        runs: the target prompts, and how they are ablated.
        sweep: everything that a sender is, in these.
    """

    runs: AblationRuns
    sweep: Sweep

    @cached_property
    def _values(self) -> Values:
        # A mean runs the model, and not before it is wanted.
        return self.runs.values(self.sweep)

    def mask(self, batch: Batch) -> Tensor:
        """`[batch, seq]`: 1 where a prompt may be changed; see `__call__`."""
        times = len(batch) // self.sweep.batch
        return pad(self._values.mask.repeat(times, 1), (0, batch.appended))

    @property
    def depends(self) -> Mapping[str, Tensor]:
        """Whatever the activations depend on besides the prompts."""
        return {f"ablation {name}": value for name, value in self._values.depends.items()}

    @property
    def by_place(self) -> bool:
        """Whether each position is ablated by activations of its own."""
        return self.runs.donors is not None or self.runs.per_position

    def __call__(self, layers: Layers, chunk: slice) -> tuple[Given, Tensor | None]:
        """The activations in a chunk of prompts, and the logits of no run.

        The prompts may stand several times after one another, with answers appended.
        """
        parts = [
            self._values.of(self.sweep.rows(some), some)[1]
            for some in _wrapped(chunk, self.sweep.batch)
        ]
        appended = layers.target.batch.appended
        mask = torch.cat([part.mask for part in parts])
        target = layers.target

        def of(location: Any, own: Tensor) -> Tensor:
            known = [part.activations[location] for part in parts if isinstance(part, Recorded)]
            if not known:
                return own.new_zeros(1, *own.shape[1:])
            # Of a mean there is one row for all prompts.
            several = torch.cat(known) if len(known[0]) > 1 or self.runs.donors else known[0]
            # Nothing is put where an answer is appended.
            return pad(several.to(own), (0, 0, 0, appended))

        given = Given(
            of((f"{layers.path}.0.", "input", 0), target.streams[0]),
            [
                of(own["o"].location, heads)
                for own, heads in zip(layers.places, target.heads, strict=True)
            ],
            [
                of(own["mlp"].location, mlp)
                for own, mlp in zip(layers.places, target.mlp, strict=True)
            ],
            pad(mask, (0, appended)),
        )
        return given, None


def ablated(
    nnmodel: Any, api: ModelAPI, run: RunArguments, ablation: Ablation, options: Options
) -> Ablated:
    """Find out what ablated senders get.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        run: the target prompts.
        ablation: how they are ablated.
        options: how the sweep may run.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    runs = read_ablation(nnmodel, run, ablation)
    layers = Sites(["o", "mlp"]).grids(nnmodel, api, runs.target.seq_len)
    sites = [
        Site.get_site(api, "resid_pre", 0),
        *(
            Site.get_site(api, name, layer)
            for name, grid in layers.items()
            for layer in sorted({site.layer for cell in grid.sites for site in cell.sites})
        ),
    ]
    layout = lay_out(nnmodel, api, Sites.from_sites(sites), PromptBatch(runs.target))
    sweep = Sweep.of(layout, runs.target, {}, options, gathers=False)
    runs.check(sweep)
    return Ablated(runs, sweep)


def _wrapped(chunk: slice, count: int) -> Iterator[slice]:
    """The rows of a chunk among `count` prompts that stand there several times."""
    start = chunk.start
    while start < chunk.stop:
        first = start % count
        stop = min(first + chunk.stop - start, count)
        yield slice(first, stop)
        start += stop - first
