"""A sweep, measured: each cell patched and run."""

from __future__ import annotations

from nnpatch_core._models import evaluating
from nnpatch_core.engine import Choice
from nnpatch_core.metrics import MetricContext
from nnpatch_core.results import Outcome
from nnpatch_core.sweep.cells import run_cells
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.identity import identity
from nnpatch_core.sweep.labels import outcome
from nnpatch_core.sweep.opened import Opened, open_prompts
from nnpatch_core.sweep.runs import Put, Runs, kind_of
from nnpatch_core.sweep.sweep import Sweep, baselines
from nnpatch_core.sweep.trials import try_out


def measure_sweep(
    sweep: Sweep, runs: Runs, choice: Choice, checkpoint: Checkpoint | None = None
) -> Outcome:
    """Patch each cell alone, and measure it.

    Args:
        sweep: what is patched.
        runs: into which prompts, and what is put there.
        choice: the engines that may run it.
        checkpoint: where what was measured is kept.

    Raises:
        PatchingError: one of its kinds; bad input before any cell runs.
    """
    with evaluating(sweep.patches.model):
        put = runs.put(sweep)
        sweep = sweep.where_present(put.mask)
        prompts = _Prompts(sweep, runs, put, choice)
        context = prompts.context()
        baseline = baselines(sweep, context)
        runs.check_baseline(context, baseline)
        try_out(sweep.metrics, context, baseline)
        if checkpoint is not None:
            checkpoint.open(identity(sweep, runs, put, choice.name, context, baseline))
        changed = runs.differs & put.mask.bool().cpu().numpy()
        tally = run_cells(sweep, context, baseline, prompts.open, checkpoint, changed=changed)
    return outcome(sweep, kind_of(runs), runs.scale, tally, baseline, runs.prompts, put.mask)


class _Prompts:
    """The prompts of a sweep; where all of them run together, they are opened once."""

    def __init__(self, sweep: Sweep, runs: Runs, put: Put, choice: Choice) -> None:
        self._sweep, self._runs, self._put, self._choice = sweep, runs, put, choice
        self._kept = [self._open(sweep, chunk) for chunk in sweep.chunks if len(sweep.chunks) == 1]

    def context(self) -> MetricContext:
        """What metrics compare with: the recorded runs are the unpatched ones too."""
        if self._kept and self._kept[0].source_logits is not None:
            opened = self._kept[0]
            return self._runs.context(opened.source_logits, opened.execution.logits)
        return self._runs.unpatched(self._sweep, self._sweep.chunks)

    def open(self, some: Sweep, chunk: slice) -> Opened:
        """Some prompts, opened for a sweep of some of the cells."""
        # Handed over, not kept: it must not stay in memory beside what is opened later.
        return self._kept.pop() if self._kept else self._open(some, chunk)

    def _open(self, some: Sweep, chunk: slice) -> Opened:
        source_logits, intervention = self._put.of(some, chunk)
        target = self._runs.target.rows(chunk)
        return open_prompts(some, self._choice, target, intervention, source_logits)
