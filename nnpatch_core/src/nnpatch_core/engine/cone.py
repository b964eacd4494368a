"""The cone engine: each cell at the cost of what its patch can reach.

A patch at layer l and position p changes nothing below l and nothing left of p. So the rows of a
bucket are run from its leftmost token on, with the target run's keys and values of the tokens
before it, and each row joins the others at its own layer, as the target run's residual stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._rounding import rounding
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import components
from nnpatch_core.engine.controls import Controls, controls
from nnpatch_core.engine.edits import Edit, Edits, edits_of
from nnpatch_core.engine.head import Head
from nnpatch_core.engine.parts import Part
from nnpatch_core.engine.plan import Bucket, Plan
from nnpatch_core.engine.prefix import prefix
from nnpatch_core.engine.rows import INPUT, INSIDE, OUTPUT, STAGES, Booleans, Integers, Rows, Stop
from nnpatch_core.engine.target import TargetRun
from nnpatch_core.errors import EngineError, MemoryWarning
from nnpatch_core.tracing import Replacement, forward, of_rows


@attrs.frozen(eq=False)
class ConeRun:
    """A planned sweep over some prompts.

    Args:
        nnmodel: the model, wrapped by nnsight.
        layers: path of the list of layers.
        stops: each cell's sites.
        replacement: what is put there.
        target: the recorded target run.
        plan: what runs together.
        head: the model's output projection, of which some columns will do; None if it is none.
    """

    nnmodel: Any
    layers: str
    stops: Sequence[Sequence[Stop]]
    replacement: Replacement
    target: TargetRun
    plan: Plan
    head: Head | None

    @property
    def logits(self) -> Tensor:
        """`[batch, vocab]`, of the unpatched run."""
        return self.target.logits

    @property
    def elided(self) -> Booleans:
        """`[cells, batch]`: where what is put is, bitwise, what was there."""
        found = np.ones((self.plan.cells, self.plan.batch), dtype=np.bool_)
        for bucket in self.plan.buckets:
            found[bucket.rows.cell, bucket.rows.prompt] = False
        return found

    @property
    def begun(self) -> int:
        """The plan tells."""
        return self.plan.begun

    def work(self, done: Booleans) -> float:
        """Token-layers."""
        return sum(self.plan.token_layers_of(bucket) for _, bucket in self._left(done))

    def parts(self, done: Booleans, columns: Tensor | None) -> Iterator[Part]:
        """One part for each bucket, or for each half of one that does not fit.

        Some buckets carry unpatched rows along, which must come out as the target run did.

        Raises:
            EngineError: one did not, or the model cannot be run in this way.
        """
        columns = None if self.head is None else columns
        for number, bucket in self._left(done):
            watch = controls(self.plan, number, bucket, self._lengths)
            yield from self._within_memory(bucket, columns, watch)

    def _left(self, done: Booleans) -> list[tuple[int, Bucket]]:
        """The buckets, numbered, of which an earlier call has not run every row."""
        return [
            (number, bucket)
            for number, bucket in enumerate(self.plan.buckets)
            if not done[bucket.rows.cell, bucket.rows.prompt].all()
        ]

    @property
    def _lengths(self) -> Integers:
        """`[batch]`: the tokens of each prompt."""
        found: Integers = self.target.batch.mask.sum(1).cpu().numpy()
        return found

    def _run_and_compare(
        self, bucket: Bucket, columns: Tensor | None, watch: Controls | None
    ) -> Tensor:
        """`_run`, with unpatched rows that must come out as the target run did."""
        if watch is None:
            return self._run(bucket, columns)
        if len(bucket.rows) + len(watch) <= bucket.fitting:
            rows, unpatched = watch.within(bucket.rows)
            logits = self._run(attrs.evolve(bucket, rows=rows), columns)
            self._compare(watch.rows, logits[unpatched], columns)
            return logits[~unpatched]
        # There is no room for them among the others: they run before, a few at a time.
        for first in range(0, len(watch), bucket.fitting):
            some = watch.rows.take(slice(first, first + bucket.fitting))
            self._compare(some, self._run(attrs.evolve(bucket, rows=some), columns), columns)
        return self._run(bucket, columns)

    def _compare(self, rows: Rows, found: Tensor, columns: Tensor | None) -> None:
        """Raise `EngineError` unless the logits of unpatched rows are those of the target run."""
        whole = self.target.logits[torch.from_numpy(rows.prompt)]
        expected = whole if columns is None else whole[:, columns]
        allowed = rounding(_dtype(self.nnmodel)) * whole.abs().amax(1)
        gaps = (found - expected).abs().amax(1)
        wrong = ~(gaps <= allowed)
        if wrong.any():
            worst = int(gaps.nan_to_num(torch.inf).where(wrong, -1.0).argmax())
            raise EngineError(
                "run from the middle of a prompt, the model gives other logits than run as a "
                f"whole: off by {float(gaps[worst]):.3g}, where rounding explains "
                f"{float(allowed[worst]):.3g}"
            )

    def _within_memory(
        self, bucket: Bucket, columns: Tensor | None, watch: Controls | None
    ) -> Iterator[Part]:
        """The bucket, in halves where the device has too little memory for the whole."""
        try:
            logits = self._run_and_compare(bucket, columns, watch)
        except torch.OutOfMemoryError:
            alone = len(bucket.rows) < 2
            if alone and (watch is None or bucket.fitting < 2):
                raise
        else:
            yield self._part(bucket, logits, columns)
            return
        # Outside of the handler, whose traceback would keep the failed run's tensors alive.
        if alone:
            yield from self._within_memory(attrs.evolve(bucket, fitting=1), columns, watch)
            return
        warn(
            f"{len(bucket.rows)} runs of {self.plan.seq_len - bucket.start} tokens do not fit on "
            "the device at once: going on with half of them; a smaller memory_budget= avoids this",
            MemoryWarning,
        )
        first, second = bucket.halves()
        # In halves there is no room for more: these rows run on their own.
        yield from self._within_memory(first, columns, watch)
        yield from self._within_memory(second, columns, None)

    def _part(self, bucket: Bucket, logits: Tensor, columns: Tensor | None) -> Part:
        work = self.plan.token_layers_of(bucket)
        return Part(bucket.rows.cell, bucket.rows.prompt, logits, columns, work)

    def _run(self, bucket: Bucket, columns: Tensor | None) -> Tensor:
        """`[rows, columns]`: the logits of a bucket's rows."""
        real = self.replacement.mask.bool().cpu().numpy()
        ascent = _Ascent(self, bucket, edits_of(bucket, self.stops, real), columns)
        try:
            return ascent.run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise EngineError(
                "the model does not run from the middle of a prompt: "
                f"{type(error).__name__}: {error}"
            ) from error


def _dtype(nnmodel: Any) -> torch.dtype:
    return next(module_of(nnmodel).parameters()).dtype


class _Ascent:
    """One trace: the rows of a bucket on their way up."""

    def __init__(self, run: ConeRun, bucket: Bucket, edits: Edits, columns: Tensor | None) -> None:
        self.cone = run
        self.start = bucket.start
        self.edits = edits
        self.columns = columns
        # The trace's own batch is the prompts that occur; each layer then has its own rows.
        occurring, which = np.unique(bucket.rows.prompt, return_inverse=True)
        self.used = torch.from_numpy(_unmistakable(occurring, run.plan.seq_len, self.start))
        self.prompts = torch.from_numpy(bucket.rows.prompt)
        self.which = torch.from_numpy(which)
        n_layers = run.plan.n_layers
        ends = np.arange(n_layers * STAGES)
        #: For each stage the rows that have entered by then: they are sorted by it.
        self.present = np.searchsorted(bucket.rows.stage, ends, side="right").tolist()
        self.n_layers = n_layers

    def run(self) -> Tensor:
        target = self.cone.target
        inside = [self.prompts[: self._entered(layer, INSIDE)] for layer in range(self.n_layers)]
        cache = {target.keyword: prefix(target.kept, self.start, inside)}
        return forward(
            self.cone.nnmodel,
            target.batch.rows(self.used.to(target.batch.tokens.device)),
            self._visit,
            cache=cache,
            start=self.start,
        )

    def _entered(self, layer: int, stage: int) -> int:
        return self.present[layer * STAGES + stage] if layer >= 0 else 0

    def _visit(self, traced: Any) -> None:
        for layer in range(self.n_layers):
            envoy = follow(traced, f"{self.cone.layers}.{layer}")
            if self._entered(layer, INSIDE):
                self._enter(envoy, layer)
                self._edit_inside(traced, layer)
                self._leave(envoy, layer)
            else:
                self._skip(envoy, layer)
        if self.columns is not None and self.cone.head is not None:
            self.cone.head.restrict(traced, self.columns)

    def _enter(self, envoy: Any, layer: int) -> None:
        """Before a layer: rows join, and all else that the layer takes gets as many."""
        args, kwargs = envoy.inputs
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]
        came, count = self._entered(layer - 1, OUTPUT), self._entered(layer, INSIDE)
        state = self._joined(hidden, came, count, self.cone.target.inputs, layer)
        state = self._edited(state, layer, INPUT, own=count > came)
        which = self.which[:count]
        if name is None:
            rest = tuple(of_rows(value, which, len(self.used)) for value in args[1:])
            others = {key: of_rows(value, which, len(self.used)) for key, value in kwargs.items()}
            envoy.inputs = ((state, *rest), others)
        else:
            others = {key: of_rows(value, which, len(self.used)) for key, value in kwargs.items()}
            envoy.inputs = ((), {**others, name: state})

    def _edit_inside(self, traced: Any, layer: int) -> None:
        shape = (self._entered(layer, INSIDE), self.cone.plan.seq_len - self.start)
        edits = list(self.edits.get(layer * STAGES + INSIDE, ()))
        while edits:
            # Heads of a fused projection are parts of one activation, which is read once.
            location = edits[0].location
            here = [edit for edit in edits if edit.location == location]
            edits = [edit for edit in edits if edit.location != location]
            envoy = follow(traced, location[0])
            activation = components.read(envoy, here[0].row, shape).clone()
            self._apply(activation, here)
            components.write(envoy, here[0].row, activation)

    def _leave(self, envoy: Any, layer: int) -> None:
        """After a layer: rows of its output join."""
        came, count = self._entered(layer, INSIDE), self._entered(layer, OUTPUT)
        if count == came and layer * STAGES + OUTPUT not in self.edits:
            return
        output = envoy.output
        hidden = output[0] if isinstance(output, tuple | list) else output
        state = self._joined(hidden, came, count, self.cone.target.outputs, layer)
        state = self._edited(state, layer, OUTPUT, own=count > came)
        if isinstance(output, tuple | list):
            envoy.output = type(output)([state, *output[1:]])
        else:
            envoy.output = state

    def _skip(self, envoy: Any, layer: int) -> None:
        """A layer that no row has to pass; rows of its output may still join."""
        target = self.cone.target
        hidden = envoy.input
        count = self._entered(layer, OUTPUT)
        if count:
            hidden = self._joined(hidden, 0, count, target.outputs, layer)
            hidden = self._edited(hidden, layer, OUTPUT, own=True)
        rest = target.rests[layer]
        envoy.skip(hidden if rest is None else (hidden, *rest))

    def _joined(self, hidden: Tensor, came: int, count: int, kept: Any, layer: int) -> Tensor:
        """`hidden` `[came, ...]`, with the rows that enter after those."""
        if count == came:
            return hidden
        value = kept[layer]
        new = value[self.prompts[came:count].to(value.device), self.start :].to(hidden.device)
        return torch.cat([hidden, new]) if came else new

    def _edited(self, state: Tensor, layer: int, stage: int, *, own: bool) -> Tensor:
        edits = self.edits.get(layer * STAGES + stage, ())
        if not edits:
            return state
        # What was not made here may still be looked at elsewhere.
        state = state if own else state.clone()
        self._apply(state, edits)
        return state

    def _apply(self, activation: Tensor, edits: Sequence[Edit]) -> None:
        for edit in edits:
            edit.apply(activation, self.start, self.cone.replacement, self.cone.nnmodel)


def _unmistakable(prompts: Integers, seq_len: int, start: int) -> Integers:
    """The prompts, some twice if need be, so that their number is no number of tokens.

    By it a layer's masks and position embeddings are told from what has no row for each prompt.
    """
    lengths = (seq_len, seq_len - start)
    more = next(more for more in range(3) if len(prompts) + more not in lengths)
    return np.concatenate([prompts, np.repeat(prompts[:1], more)])
