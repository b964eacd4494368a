"""The run of a sweep's cells: engine, metrics, progress and checkpoint, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.engine import Execution, Part
from nnpatch_core.errors import EngineError
from nnpatch_core.metrics import MetricContext, columns_given, measure
from nnpatch_core.results import Baseline
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.cost import shared_work
from nnpatch_core.sweep.fallback import warn_of_fallback
from nnpatch_core.sweep.gather import Measured, Waiting
from nnpatch_core.sweep.opened import Opened
from nnpatch_core.sweep.progress import Progress
from nnpatch_core.sweep.share import Share
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.sweep.tally import Tally

#: How many logits are looked at together, as each row takes a whole vocabulary.
_LOGITS = 2**21


def run_cells(
    sweep: Sweep,
    context: MetricContext,
    baseline: Mapping[str, Baseline],
    opened: Callable[[Sweep, slice], Opened],
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
        opened: opens the prompts of a chunk for a sweep of some of the cells.
        checkpoint: where what was measured is kept.
        changed: `[batch, seq]`: where a patch may put something else than what was there.

    Warns:
        EngineWarning: `auto` runs a dearer engine than was to be expected.

    Raises:
        EngineError: the engine that was asked for cannot run the sweep.
        MetricError: a metric raised, or gave something else than one number per prompt.
    """
    count = len(sweep.patches.cells)
    tally = Tally.empty(count, baseline)
    share = None
    if checkpoint is not None:
        checkpoint.restore(tally)
        share = checkpoint.share
    waiting = None
    if sweep.waiting:
        waiting = Waiting.of(sweep.waiting, context, tally.done.any(1).numpy())
    ran = tally.done.numpy().copy()
    own = None
    if share is not None and waiting is None:
        own = share.chunks(*shared_work(sweep, changed))
    with Progress(count, sweep.batch, sweep.options.progress) as progress:
        run = _Run(sweep, context, waiting, tally, ran, changed, progress, checkpoint, share, own)
        chunks, groups = sweep.chunks, [slice(0, count)]
        if waiting is not None and len(chunks) > 1:
            groups = sweep.groups(waiting.width)
        elif waiting is not None:
            whole = opened(sweep, chunks[0])
            if whole.execution.begun <= sweep.limits.cells(sweep.batch, waiting.width):
                run.chunk(whole, sweep, groups[0], chunks[0])
                chunks = []
            else:
                groups = sweep.groups(waiting.width)
            del whole
        if len(groups) > 1:
            tally.groups.extend(groups)
        for group in groups:
            some = sweep if len(groups) == 1 else sweep.part(group)
            for number, chunk in enumerate(chunks):
                if run.has(group, number):
                    run.chunk(opened(some, chunk), some, group, chunk)
    if checkpoint is not None:
        checkpoint.save(tally, at_once=True)
    return tally


@attrs.frozen(eq=False)
class _Run:
    """A sweep at work, and what it has measured so far.

    `ran` is `[cells, batch]`: what was run, though its cell may still wait to be measured;
    `changed` `[batch, seq]`: where a patch may put something else; `own` `[chunks]`: which chunks
    the share has, if shares are of whole ones; `told` the reason that the user was told for a
    dearer engine.
    """

    sweep: Sweep
    context: MetricContext
    waiting: Waiting | None
    tally: Tally
    ran: Booleans
    changed: Booleans
    progress: Progress
    checkpoint: Checkpoint | None
    share: Share | None
    own: Booleans | None
    told: list[str] = attrs.field(factory=list)

    def has(self, group: slice, chunk: int) -> bool:
        """Whether anything is measured of a group of cells in a chunk of the prompts."""
        if self.share is None:
            return True
        if self.waiting is not None:
            return not self.share.other_cells(len(self.ran))[group].all()
        return self.own is None or bool(self.own[chunk])

    def chunk(self, opened: Opened, some: Sweep, group: slice, chunk: slice) -> None:
        """Run a group of the cells, of which `some` is the sweep, in a chunk of the prompts."""
        self._tell(opened.fallback)
        try:
            return self._engine(opened, group, chunk)
        except EngineError as error:
            if not opened.others:
                raise
            if self.share is not None:
                other = opened.others[0].name
                raise EngineError(
                    f"{error}. Another engine would go on from here, and each shard from "
                    f"elsewhere: name engine={other!r} for all shards"
                ) from error
            reason = str(error)
        # What was handed over before is right; the next engine runs the rest.
        return self.chunk(opened.reopened(some.rows(chunk), reason), some, group, chunk)

    def _tell(self, fallback: str | None) -> None:
        """Warn, once, that another engine runs, and why."""
        if fallback is not None and not self.told:
            self.told.append(fallback)
            warn_of_fallback(self.sweep, fallback, self.changed)

    def _engine(self, opened: Opened, group: slice, chunk: slice) -> None:
        execution = opened.execution
        ran, elided = self.ran[group, chunk], execution.elided
        others = self._others(execution, group)
        skipped = ran if others is None else ran | others
        parts = execution.parts(skipped, columns_given(self.sweep.metrics, self.context))
        # An engine that cannot do it mostly says so here, before anything is counted.
        first = list(islice(parts, 1))
        work = execution.work(skipped)
        self.progress.begin(chunk, opened.engine.name, work, elided, skipped, group.start)
        if self.waiting is not None:
            self._note(self.waiting.elide(group, chunk, elided))
        for whole in chain(first, parts):
            # What shares a trace with cells of this share may be of another.
            part = whole
            if others is not None:
                part = whole.only(~others[whole.cells, whole.prompts])
            self._measure(part, group, chunk, len(opened.target))
            fresh = int((~ran[part.cells, part.prompts]).sum())
            ran[part.cells, part.prompts] = True
            if self.waiting is None:
                self.tally.done[group, chunk] = torch.from_numpy(ran)
            else:
                self._note(self.waiting.add(part, group, chunk))
            self.progress.advance(fresh, part.work)
            if self.checkpoint is not None:
                self.checkpoint.save(self.tally)
                self.checkpoint.tell(self.progress.known)
        self.tally.elided[group, chunk] = torch.from_numpy(elided)
        self.tally.note(opened.engine.name, opened.fallback)

    def _others(self, execution: Execution, group: slice) -> Booleans | None:
        """`[cells, batch]`: what other shares measure; None where there are none."""
        if self.share is None:
            return None
        if self.waiting is None:
            return None if self.own is not None else self.share.others(execution)
        cells = self.share.other_cells(len(self.ran))[group]
        return np.broadcast_to(cells[:, None], execution.elided.shape)

    def _measure(self, part: Part, group: slice, chunk: slice, batch: int) -> None:
        """Note what the metrics say that look at each prompt alone."""
        alone = self.sweep.alone
        if not alone:
            return
        for index, logits in _whole(part, self.context.target_logits.shape[-1], batch):
            cells, prompts = part.cells[index] + group.start, part.prompts[index] + chunk.start
            numbers = measure(alone, logits, self.context.rows(torch.from_numpy(prompts)))
            for name, value in numbers.items():
                self.tally.values[name][cells, prompts] = value

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
    places = part.logits[0, ..., 0].numel()
    several = max(_LOGITS // (places * vocab), 1)
    if part.ids is None:
        several = max(several, batch)
    shape = min(several, len(part.cells)), *part.logits.shape[1:-1], vocab
    wide = part.logits.new_full(shape, torch.nan)
    for first in range(0, len(part.cells), several):
        index = np.arange(first, min(first + several, len(part.cells)))
        logits = part.logits[first : first + several]
        if part.ids is not None:
            logits, narrow = wide[: len(index)], logits
            logits[..., part.ids] = narrow
        yield index, logits
