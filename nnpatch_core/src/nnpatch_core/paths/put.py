"""The values that a sweep over paths puts, chunk by chunk of its prompts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.edges import (
    Changes,
    Given,
    Layers,
    Received,
    SenderChanges,
    Structure,
    Writes,
    open_layers,
    source_given,
    told_of,
)
from nnpatch_core.interventions import PairRuns
from nnpatch_core.paths.between import Frozen, ThroughMlps
from nnpatch_core.paths.relayed import Relayed
from nnpatch_core.paths.sites import PathCell
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention

#: What is recomputed between the members of a path; None is nothing.
Through: TypeAlias = Literal["mlps"]


@attrs.frozen(eq=False)
class PathPut:
    """Puts what receivers compute from what they see of senders.

    Args:
        api: the adapter.
        structure: what is known of the layers.
        through: what is recomputed in between.
    """

    api: ModelAPI
    structure: Structure
    through: Through | None

    def __call__(self, sweep: Sweep, runs: PairRuns) -> Values:
        """See `PairRuns.put`."""
        mask = runs.mask_of(sweep.patches)
        told = list(sweep.patches.cells.named)

        def of(some: Sweep, chunk: slice) -> tuple[Tensor, Intervention]:
            layers = open_layers(some.nnmodel, self.api, self.structure, runs.target.rows(chunk))
            source, logits = source_given(layers, self.api, runs.source.rows(chunk))
            given = attrs.evolve(source, mask=mask[chunk])
            return logits, self._received(some, layers, given, chunk)

        return Values(mask, of, {"mask": mask, "path": _told(told)})

    def _received(self, sweep: Sweep, layers: Layers, given: Given, chunk: slice) -> Received:
        """The values that receivers of a sweep's cells compute, in some of its prompts."""
        cells: list[Any] = list(sweep.patches.cells.named)
        ways = [(each.senders, *each.relays) for each in cells]
        known = _Numbers()
        entries = [known.of((id(way[0]),), way[0]) for way in ways]
        first = [each.rows(chunk) for each in known.values]
        writes: Writes = SenderChanges.of(layers, given, first)
        changes = self._seen(layers, writes)
        for depth in range(1, len(ways[0])):
            known, before = _Numbers(), entries
            entries = [
                known.of((number, id(way[depth])), (number, way[depth]))
                for number, way in zip(before, ways, strict=True)
            ]
            seen = np.array([number for number, _ in known.values])
            relays = [relay.rows(chunk) for _, relay in known.values]
            writes = Relayed.of(layers, changes, seen, relays, given.mask)
            changes = self._seen(layers, writes)
        return Received(
            layers,
            changes,
            np.array(entries),
            [each.receivers for each in cells],
            given.mask,
            alone=not any(_inside(each) for each in cells),
        )

    def _seen(self, layers: Layers, writes: Writes) -> Changes:
        return Frozen(layers, writes) if self.through is None else ThroughMlps(layers, writes)


class _Numbers:
    """Gives equal keys one number, in the order in which they come."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._known: dict[Hashable, int] = {}

    def of(self, key: Hashable, value: Any) -> int:
        """The number of a key, whose value is this."""
        if key not in self._known:
            self._known[key] = len(self.values)
            self.values.append(value)
        return self._known[key]


def _inside(cell: PathCell) -> bool:
    """Whether an MLP that receives is put as what it gives; see `Received`."""
    return any(site.component == "mlp" for site in cell.sites)


def _told(cells: Sequence[Any]) -> Tensor:
    """All numbers of the paths that a label need not tell, such as positions of each prompt."""
    known = _Numbers()
    for cell in cells:
        for each in (cell.senders, *cell.relays):
            known.of(id(each), each)
    words: list[int] = []
    for each in known.values:
        for at in each.positions:
            words += told_of(at)
    for cell in cells:
        words += [known.of(id(each), each) for each in (cell.senders, *cell.relays)]
    return torch.tensor(words, dtype=torch.int64, device="cpu")
