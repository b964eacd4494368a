"""An engine of nnpatch, by `activation_patching`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs import POSITIONS, Cell, Job
from nnsight import NNsight
from subject import Prompts, Subject

from nnpatch_core import Outcome, Site, Sites, activation_patching
from nnpatch_core.plugins import find_adapter


def make(subject: Subject, engine: str) -> Engine:
    """That engine on that model."""
    return Engine(subject, engine)


class Engine:
    """Sweeps a list of cells, or a whole grid."""

    def __init__(self, subject: Subject, engine: str) -> None:
        self.traced, self.engine, self.shape = NNsight(subject.model), engine, subject.shape
        self.adapter = find_adapter(None, subject.model)

    def sweep(self, prompts: Prompts, cells: Sequence[Cell]) -> list[list[float]]:
        """See `Contestant`."""
        sites = [
            Site.get_site(self.adapter, cell.component, cell.layer, cell.head, [cell.position])
            for cell in cells
        ]
        out = self._run(prompts, Sites.from_sites(sites))
        # Each name's cells come in the order of the list.
        columns = {name: iter(out.patched(name).tolist()) for name in out}
        return [next(columns[cell.component]) for cell in cells]

    def sweep_grid(self, prompts: Prompts, job: Job, memory_budget: int | None = None) -> Outcome:
        """Sweep every cell of a job, as a user would ask for it."""
        last = POSITIONS[job.positions]
        sites = Sites(
            job.components,
            layers=job.swept_layers(self.shape),
            seq_pos_type="each" if last is None else "lastk",
            seq_pos=last,
        )
        options = {} if memory_budget is None else {"memory_budget": memory_budget}
        return self._run(prompts, sites, **options)

    def _run(self, prompts: Prompts, sites: Any, **options: Any) -> Outcome:
        return activation_patching(
            self.traced,
            self.adapter,
            sites,
            prompts.source,
            prompts.target,
            prompts.source_answer,
            prompts.target_answer,
            engine=self.engine,
            progress=False,
            **options,
        )


def values_at(out: Outcome, cells: Sequence[Cell]) -> list[list[float]]:
    """Cell by cell the logit difference of each prompt, out of a whole grid's outcome."""
    grids = {name: out.patched(name) for name in out}
    return [
        grids[cell.component][
            (cell.layer, cell.position, *([] if cell.head is None else [cell.head]))
        ].tolist()
        for cell in cells
    ]
