"""The cone engine: each cell at the cost of what its patch can reach.

A patch at layer l and position p changes nothing below l and nothing left of p. So the runs of a
bucket begin at its leftmost token, with the target run's keys and values of the tokens before it,
and each run joins the others at its own layer, as the target run's residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone.ascent import Ascent
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.engine.cone.controls import Controls, check_unpatched, controls_of
from nnpatch_core.engine.cone.plan import Plan
from nnpatch_core.engine.cone.planning import plan_patches
from nnpatch_core.engine.cone.target import TargetRun, record_target
from nnpatch_core.engine.cone.unembedding import Unembedding, find_unembedding
from nnpatch_core.engine.execution import Part
from nnpatch_core.errors import EngineError, MemoryWarning
from nnpatch_core.memory import Limits
from nnpatch_core.tracing import Intervention, Patches, Prepared


def open_cone(
    patches: Patches,
    target: Batch,
    intervention: Intervention,
    limits: Limits,
    logits: Tensor | None = None,
) -> ConeExecution:
    """Record `target`, and plan how the cells are patched into it.

    Args:
        patches: the cells, each patched alone.
        target: the prompts that are patched.
        intervention: what is put there.
        limits: the memory that the sweep may use.
        logits: unused: the target run must be recorded, which gives them anew.

    Raises:
        EngineError: the model cannot be recorded.
        MemoryBudgetError: a single run does not fit.
    """
    run = record_target(patches, target, intervention, limits.store, edges=limits.edges)
    plan = plan_patches(patches, run.changed, len(target), target.seq_len, limits)
    return ConeExecution(patches, intervention, run, plan, find_unembedding(patches.model))


@attrs.frozen(eq=False)
class ConeExecution:
    """A planned sweep over some prompts.

    Args:
        patches: the cells.
        intervention: what is put there.
        target: the recorded target run.
        plan: what runs together.
        unembedding: the model's output projection, of which some ids will do; None if not.
    """

    patches: Patches
    intervention: Intervention
    target: TargetRun
    plan: Plan
    unembedding: Unembedding | None

    @property
    def logits(self) -> Tensor:
        """`[batch, vocab]` or `[batch, places, vocab]`, of the unpatched run."""
        return self.target.logits

    @property
    def elided(self) -> Booleans:
        """`[cells, batch]`: where what is put is, bitwise, what was there, or is read nowhere."""
        elided = np.ones((self.plan.cells, self.plan.batch), dtype=np.bool_)
        runs = self.plan.buckets.runs
        elided[runs.cell, runs.prompt] = False
        return elided

    @property
    def begun(self) -> int:
        """As the plan has it."""
        return self.plan.begun

    def shared_out(self, count: int) -> Integers:
        """Bucket by bucket, so that shares have about the same work."""
        shares = np.zeros((self.plan.cells, self.plan.batch), dtype=np.int32)
        runs = self.plan.buckets.runs
        shares[runs.cell, runs.prompt] = self.plan.shared_out(count)[
            self.plan.buckets.bucket_of_runs
        ]
        return shares

    def work(self, done: Booleans) -> float:
        """Token-layers."""
        return float(self.plan.token_layers_of_each[self._left(done)].sum())

    def parts(self, done: Booleans, ids: Tensor | None) -> Iterator[Part]:
        """One part for each bucket, or for each half of one that does not fit.

        Some buckets carry unpatched rows along, which must come out as the target run did.

        Raises:
            EngineError: one did not, or the model cannot be run in this way.
        """
        ids = None if self.unembedding is None else ids
        for number in self._left(done).tolist():
            bucket = self.plan.buckets[number]
            controls = controls_of(self.plan, number, bucket, self._lengths)
            yield from self._within_memory(bucket, ids, controls)

    def _left(self, done: Booleans) -> Integers:
        """The numbers of the buckets of which an earlier call has not run every row."""
        buckets = self.plan.buckets
        left = ~done[buckets.runs.cell, buckets.runs.prompt]
        numbers: Integers = buckets.any_run(left).nonzero()[0]
        return numbers

    @property
    def _lengths(self) -> Integers:
        """`[batch]`: the tokens of each prompt."""
        lengths: Integers = self.target.batch.mask.sum(1).cpu().numpy()
        return lengths

    def _run_and_compare(
        self, bucket: Bucket, ids: Tensor | None, controls: Controls | None
    ) -> Tensor:
        """`_run`, with unpatched rows that must come out as the target run did."""
        if controls is None:
            return self._run(bucket, ids)
        if len(bucket.runs) + len(controls) <= bucket.fitting:
            runs, unpatched = controls.within(bucket.runs)
            logits = self._run(attrs.evolve(bucket, runs=runs), ids)
            check_unpatched(self.target, controls.runs, logits[unpatched], ids, self._weight)
            return logits[~unpatched]
        # There is no room for them among the others: they run before, a few at a time.
        for first in range(0, len(controls), bucket.fitting):
            some = controls.runs.take(slice(first, first + bucket.fitting))
            logits = self._run(attrs.evolve(bucket, runs=some), ids)
            check_unpatched(self.target, some, logits, ids, self._weight)
        return self._run(bucket, ids)

    @property
    def _weight(self) -> Tensor:
        return next(self.patches.model.parameters())

    def _within_memory(
        self, bucket: Bucket, ids: Tensor | None, controls: Controls | None
    ) -> Iterator[Part]:
        """The bucket, in halves where the device has too little memory for the whole."""
        try:
            logits = self._run_and_compare(bucket, ids, controls)
        except torch.OutOfMemoryError:
            alone = len(bucket.runs) < 2
            if alone and (controls is None or bucket.fitting < 2):
                raise
        else:
            yield self._part(bucket, logits, ids)
            return
        # Outside of the handler, whose traceback would keep the failed run's tensors alive.
        if alone:
            yield from self._within_memory(attrs.evolve(bucket, fitting=1), ids, controls)
            return
        warn(
            f"{len(bucket.runs)} runs of {self.plan.seq_len - bucket.start} tokens do not fit on "
            "the device at once: going on with half of them; a smaller memory_budget= avoids this",
            MemoryWarning,
        )
        first, second = bucket.halves()
        # They need not run twice: they go with the first half, or before it.
        yield from self._within_memory(first, ids, controls)
        yield from self._within_memory(second, ids, None)

    def _part(self, bucket: Bucket, logits: Tensor, ids: Tensor | None) -> Part:
        work = self.plan.token_layers_of(bucket)
        return Part(bucket.runs.cell, bucket.runs.prompt, logits, ids, work)

    def _run(self, bucket: Bucket, ids: Tensor | None) -> Tensor:
        """`[rows, ids]` or `[rows, places, ids]`: the logits of a bucket's rows."""
        if isinstance(self.intervention, Prepared):
            real = bucket.runs.cell >= 0
            cells, prompts = bucket.runs.cell[real], bucket.runs.prompt[real]
            self.intervention.ready(torch.from_numpy(cells), torch.from_numpy(prompts))
        ascent = Ascent(self.patches, self.intervention, self.target, self.unembedding, bucket, ids)
        try:
            return ascent.run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise EngineError(
                "the model does not run from the middle of a prompt: "
                f"{type(error).__name__}: {error}"
            ) from error
