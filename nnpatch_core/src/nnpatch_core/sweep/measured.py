"""A sweep, measured: each cell patched and run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from nnpatch_core._models import evaluating
from nnpatch_core.engine import Choice
from nnpatch_core.metrics import MetricContext
from nnpatch_core.results import Outcome
from nnpatch_core.sweep.cells import run_cells
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.held import Held
from nnpatch_core.sweep.identity import cut_of, identity
from nnpatch_core.sweep.labels import outcome
from nnpatch_core.sweep.opened import Opened, open_prompts
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.share import ShareMeasured
from nnpatch_core.sweep.sweep import Sweep, baselines
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.sweep.versions import Versions


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
    held = Held() if checkpoint is None else checkpoint.held
    with evaluating(sweep.patches.model):
        held.check_wanted(sweep, runs)
        values, kept = None, []
        if runs.ablation is None:
            values = runs.values(sweep)
            # Where all prompts run together, the recorded runs are the unpatched ones too.
            for each in _only(sweep.chunks):
                make = functools.partial(_open, sweep, runs, values, choice, each)
                kept.append(held.open(sweep, make))
        context = _context(sweep, runs, kept, held)
        baseline, versions = baselines(sweep, context), Versions.of(sweep, runs.reading)
        once = versions.baselines(baseline)
        runs.check_baseline(context.once, once)
        try_out(sweep.metrics, context, baseline)
        values = values or runs.values(sweep)
        sweep = sweep.where_present(values.mask)
        if checkpoint is not None:
            cut = cut_of(sweep, context)
            own = identity(sweep, runs, values, runs.kind, choice.name, cut, context, baseline)
            checkpoint.open(own, sweep.options.call, sweep.patches.model)

        def opened(some: Sweep, chunk: slice) -> Opened:
            # Handed over, not kept: it must not stay in memory beside what is opened later.
            if kept:
                return kept.pop()
            return held.open(some, lambda: _open(some, runs, values, choice, chunk))

        changed = runs.changed & values.mask.bool().cpu().numpy()
        tally = run_cells(sweep, context, baseline, opened, checkpoint, changed=changed)
        if checkpoint is not None and checkpoint.share is not None:
            checkpoint.finish(tally)
            count = int(tally.done.sum())
            raise ShareMeasured(count, _told(count, by_cell=bool(sweep.waiting)))
    return outcome(
        versions.sweep(sweep),
        runs.kind,
        runs.scale,
        versions.tally(tally),
        once,
        runs.prompts,
        versions.mask(values.mask),
    )


def _told(count: int, *, by_cell: bool) -> str:
    """The work that a share has done, in words."""
    if count:
        return f"{count} patched runs are measured"
    if by_cell:
        return "it has nothing to do: other shards have all cells"
    return (
        "it has nothing to do: what runs in one trace is measured by one shard, and other shards "
        "have all of it; a smaller memory budget makes more traces"
    )


def _only(chunks: Sequence[slice]) -> Sequence[slice]:
    """The one chunk that there is; none where there are several."""
    return chunks if len(chunks) == 1 else ()


def _context(sweep: Sweep, runs: Runs, kept: Sequence[Opened], held: Held) -> MetricContext:
    for opened in kept:
        # Values of no run of prompts come without the source run.
        if opened.source_logits is not None:
            return runs.context(opened.source_logits, opened.execution.logits)
    return held.context(sweep, runs)


def _open(sweep: Sweep, runs: Runs, values: Values, choice: Choice, chunk: slice) -> Opened:
    """The prompts of a chunk, opened for some of the cells."""
    source_logits, intervention = values.of(sweep, chunk)
    return open_prompts(
        sweep.rows(chunk), choice, runs.target.rows(chunk), intervention, source_logits
    )
