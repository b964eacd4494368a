"""The run of a sweep's cells: engine, metrics, progress and checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine import EngineRun, FullRun, Part, open_cone, open_full
from nnpatch_core.engine.rows import Booleans, Integers
from nnpatch_core.errors import EngineError
from nnpatch_core.metrics import MetricContext, columns_read, measure
from nnpatch_core.results import Baseline
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.fallback import warn_of_fallback
from nnpatch_core.sweep.gather import Measured, Waiting
from nnpatch_core.sweep.progress import Progress
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.sweep.tally import Tally
from nnpatch_core.tracing import Replacement

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
    chunk_of: Callable[[Sweep, slice], Chunk],
    checkpoint: Checkpoint | None = None,
    *,
    changed: Booleans,
) -> Tally:
    """Patch each cell alone and measure it.

    Where a metric is given all prompts together, the logits of cells wait until all of their
    prompts were run. Of no more cells at a time than fit in memory: then the sweep is run as
    several, one group of cells after the other.

    Args:
        sweep: what to patch.
        context: what the metrics compare with, for the whole batch.
        baseline: the metrics of the unpatched runs.
        chunk_of: opens some rows of the batch for a sweep of some of the cells.
        checkpoint: where what was measured is kept.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Warns:
        EngineWarning: `auto` runs the full engine, where the cone engine was to be expected.

    Raises:
        EngineError: the engine that was asked for cannot run the sweep.
        MetricError: a metric raised, or gave something else than one number per prompt.
    """
    batch, count = len(context.source_answer_index), len(sweep.cells)
    tally = Tally.empty(count, baseline)
    if checkpoint is not None:
        checkpoint.restore(tally)
    waiting = None
    if sweep.waiting:
        waiting = Waiting.of(sweep.waiting, context, tally.done.any(1).numpy())
    ran = tally.done.numpy().copy()
    with Progress(count, batch, sweep.progress) as progress:
        run = _Run(sweep, context, waiting, tally, ran, changed, progress, checkpoint)
        chunks, groups = sweep.chunks(batch), [slice(0, count)]
        if waiting is not None and len(chunks) > 1:
            groups = sweep.groups(waiting.width, batch)
        elif waiting is not None:
            whole = chunk_of(sweep, chunks[0])
            if whole.run.begun <= sweep.limits.cells(batch, waiting.width):
                run.chunk(whole, groups[0], chunks[0])
                chunks = []
            else:
                groups = sweep.groups(waiting.width, batch)
            del whole
        if len(groups) > 1:
            tally.groups.extend(groups)
        for cells in groups:
            some = sweep if len(groups) == 1 else sweep.part(cells)
            for rows in chunks:
                run.chunk(chunk_of(some, rows), cells, rows)
    if checkpoint is not None:
        checkpoint.save(tally, at_once=True)
    return tally


@attrs.frozen(eq=False)
class _Run:
    """A run of a sweep's cells, and what has come of it so far.

    `ran` is `[cells, batch]`: what was run, though its cell may still wait to be measured; and
    `changed` `[batch, seq]`: where a patch may put something else.
    """

    sweep: Sweep
    context: MetricContext
    waiting: Waiting | None
    tally: Tally
    ran: Booleans
    changed: Booleans
    progress: Progress
    checkpoint: Checkpoint | None

    def chunk(self, chunk: Chunk, cells: slice, rows: slice) -> None:
        """Run some of the cells in some of the prompts."""
        self._tell(chunk.fallback)
        try:
            self._engine(chunk, cells, rows)
        except EngineError as error:
            # What was handed over before is right; the full engine runs the rest.
            if self.sweep.engine != "auto":
                raise
            self._tell(str(error))
            some, logits = self.sweep.cells[cells], chunk.run.logits
            run = FullRun(self.sweep.nnmodel, chunk.target, some, chunk.replacement, logits)
            chunk = attrs.evolve(chunk, run=run, engine="full", fallback=str(error))
            self._engine(chunk, cells, rows)

    def _tell(self, fallback: str | None) -> None:
        """Warn of the first reason for which another engine runs."""
        if fallback is not None and not self.tally.fallbacks:
            warn_of_fallback(self.sweep, fallback, self.changed)

    def _engine(self, chunk: Chunk, cells: slice, rows: slice) -> None:
        ran, elided = self.ran[cells, rows], chunk.run.elided
        parts = chunk.run.parts(ran, columns_read(self.sweep.metrics, self.context))
        # An engine that cannot do it mostly says so here, before anything is counted.
        first = list(islice(parts, 1))
        work = chunk.run.work(ran)
        self.progress.begin(rows, chunk.engine, work, elided, ran, cells.start)
        if self.waiting is not None:
            self._note(self.waiting.elide(cells, rows, elided))
        for part in chain(first, parts):
            self._measure(part, cells, rows, len(chunk.target))
            fresh = int((~ran[part.cells, part.prompts]).sum())
            ran[part.cells, part.prompts] = True
            if self.waiting is None:
                self.tally.done[cells, rows] = torch.from_numpy(ran)
            else:
                self._note(self.waiting.add(part, cells, rows))
            self.progress.advance(fresh, part.work)
            if self.checkpoint is not None:
                self.checkpoint.save(self.tally)
        self.tally.elided[cells, rows] = torch.from_numpy(elided)
        self.tally.note(chunk.engine, chunk.fallback)

    def _measure(self, part: Part, cells: slice, rows: slice, batch: int) -> None:
        """Note what the metrics say that look at each prompt alone."""
        alone = self.sweep.alone
        if not alone:
            return
        for index, logits in _whole(part, self.context.target_logits.shape[-1], batch):
            numbers, prompts = part.cells[index] + cells.start, part.prompts[index] + rows.start
            found = measure(alone, logits, self.context.rows(torch.from_numpy(prompts)))
            for name, value in found.items():
                self.tally.values[name][numbers, prompts] = value

    def _note(self, measured: Iterable[Measured]) -> None:
        """Note what the other metrics say, of cells that are complete: now they are done."""
        for cell, values in measured:
            for name, value in values.items():
                self.tally.values[name][cell] = value
            # Elided prompts among them: their numbers may be other ones beside those that moved.
            self.tally.done[cell] = True
            self.ran[cell] = True


def _whole(part: Part, vocab: int, batch: int) -> Iterator[tuple[Integers, Tensor]]:
    """A part's logits a few runs at a time, as wide as the vocabulary: nan where none was read."""
    several = max(_LOGITS // vocab, 1)
    if part.columns is None:
        several = max(several, batch)
    wide = part.logits.new_full((min(several, len(part.cells)), vocab), torch.nan)
    for first in range(0, len(part.cells), several):
        index = np.arange(first, min(first + several, len(part.cells)))
        logits = part.logits[first : first + several]
        if part.columns is not None:
            found = wide[: len(index)]
            found[:, part.columns] = logits
            logits = found
        yield index, logits
