"""The run of a sweep's cells: engine, metrics, progress and checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine import EngineRun, FullRun, Part, Replacement, open_cone, open_full
from nnpatch_core.engine.rows import Booleans, Integers
from nnpatch_core.errors import EngineError
from nnpatch_core.metrics import MetricContext, columns_read, measure
from nnpatch_core.patching.checkpoint import Checkpoint
from nnpatch_core.patching.fallback import warn_of_fallback
from nnpatch_core.patching.progress import Progress
from nnpatch_core.patching.sweep import Sweep
from nnpatch_core.patching.tally import Tally
from nnpatch_core.results import Baseline

#: How many logits are looked at together, as each row takes a whole vocabulary.
_LOGITS = 2**19


@attrs.frozen(eq=False)
class Chunk:
    """Some prompts of a sweep, opened in an engine.

    Args:
        target: the prompts that are patched.
        replacement: what is put there.
        run: the engine, ready to run.
        engine: its name.
        fallback: why it is not the one that was wanted.
        source_logits: `[batch, vocab]` of the run where activations were taken, if there is one.
    """

    target: Batch
    replacement: Replacement
    run: EngineRun
    engine: str
    fallback: str | None = None
    source_logits: Tensor | None = None


def open_chunk(
    sweep: Sweep, target: Batch, replacement: Replacement, source_logits: Tensor | None = None
) -> Chunk:
    """Make the target run of some prompts, in the engine that the sweep wants if it can."""
    fallback = sweep.fallback
    if sweep.engine != "full":
        try:
            cone = open_cone(sweep.nnmodel, target, sweep.cells, replacement, sweep.limits)
            return Chunk(target, replacement, cone, "cone", None, source_logits)
        except EngineError as error:
            if sweep.engine == "cone":
                raise
            fallback = str(error)
    full = open_full(sweep.nnmodel, target, sweep.cells, replacement)
    return Chunk(target, replacement, full, "full", fallback, source_logits)


def run_cells(
    sweep: Sweep,
    context: MetricContext,
    baseline: Mapping[str, Baseline],
    chunk_of: Callable[[slice], Chunk],
    first: Chunk | None = None,
    checkpoint: Checkpoint | None = None,
    *,
    changed: Booleans,
) -> Tally:
    """Patch each cell alone and measure it.

    Args:
        sweep: what to patch.
        context: what the metrics compare with, for the whole batch.
        baseline: the metrics of the unpatched runs.
        chunk_of: opens some rows of the batch.
        first: what it has given for the whole batch, if it was opened before.
        checkpoint: where what was measured is kept.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Warns:
        EngineWarning: `auto` runs the full engine, where the cone engine was to be expected.

    Raises:
        EngineError: the engine that was asked for cannot run the sweep.
    """
    batch = len(context.source_answer_index)
    tally = Tally.empty(len(sweep.cells), baseline)
    if checkpoint is not None:
        checkpoint.restore(tally)
    with Progress(len(tally.done), batch, sweep.progress) as progress:
        for rows in sweep.chunks(batch):
            usable = first is not None and sweep.engine in ("auto", first.engine)
            chunk = first if first is not None and usable else chunk_of(rows)
            if chunk.fallback is not None and not tally.fallbacks:
                warn_of_fallback(sweep, chunk.fallback, changed)
            try:
                _run_chunk(sweep, chunk, rows, context, tally, progress, checkpoint)
            except EngineError as error:
                # What was handed over before is right; the full engine runs the rest.
                if sweep.engine != "auto":
                    raise
                if not tally.fallbacks:
                    warn_of_fallback(sweep, str(error), changed)
                run = FullRun(
                    sweep.nnmodel, chunk.target, sweep.cells, chunk.replacement, chunk.run.logits
                )
                chunk = attrs.evolve(chunk, run=run, engine="full", fallback=str(error))
                _run_chunk(sweep, chunk, rows, context, tally, progress, checkpoint)
    if checkpoint is not None:
        checkpoint.save(tally, at_once=True)
    return tally


def _run_chunk(
    sweep: Sweep,
    chunk: Chunk,
    rows: slice,
    context: MetricContext,
    tally: Tally,
    progress: Progress,
    checkpoint: Checkpoint | None,
) -> None:
    done = tally.done[:, rows].numpy()
    columns = columns_read(sweep.metrics.values(), context)
    parts = chunk.run.parts(done, columns)
    # An engine that cannot do it mostly says so here, before anything is counted.
    first = list(islice(parts, 1))
    progress.begin(rows, chunk.engine, chunk.run.work(done), chunk.run.elided, done)
    for part in chain(first, parts):
        for index, logits in _whole(part, context.target_logits.shape[-1], len(chunk.target)):
            cells, prompts = part.cells[index], part.prompts[index] + rows.start
            found = measure(sweep.metrics, logits, context.rows(torch.from_numpy(prompts)))
            for name, value in found.items():
                tally.values[name][cells, prompts] = value
        fresh = int((~done[part.cells, part.prompts]).sum())
        done[part.cells, part.prompts] = True
        progress.advance(fresh, part.work)
        if checkpoint is not None:
            checkpoint.save(tally)
    tally.elided[:, rows] = torch.from_numpy(chunk.run.elided)
    tally.note(chunk.engine, chunk.fallback)


def _whole(part: Part, vocab: int, batch: int) -> Iterator[tuple[Integers, Tensor]]:
    """A part's logits a few runs at a time, as wide as the vocabulary: nan where none was read.

    A part of the full engine comes as a whole, in the order of the prompts.
    """
    several = max(_LOGITS // vocab, 1)
    if part.columns is None:
        several = max(several, batch)
    wide = torch.full((min(several, len(part.cells)), vocab), torch.nan)
    for first in range(0, len(part.cells), several):
        index = np.arange(first, min(first + several, len(part.cells)))
        logits = part.logits[first : first + several]
        if part.columns is not None:
            found = wide[: len(index)]
            found[:, part.columns] = logits
            logits = found
        yield index, logits
