"""One trace of the cone engine: rows join it on its way up, each at its own layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core._models import follow
from nnpatch_core.adapters import INPUT, INSIDE, OUTPUT, STAGES, Place, place_of, table_of
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.engine.cone.edits import Edit, edits_of
from nnpatch_core.engine.cone.entries import Entries
from nnpatch_core.engine.cone.last_layer import mlp_inside, only_last_token
from nnpatch_core.engine.cone.prefix import prefix
from nnpatch_core.engine.cone.reading import read_from
from nnpatch_core.engine.cone.target import TargetRun
from nnpatch_core.engine.cone.unembedding import Unembedding
from nnpatch_core.tracing import (
    Intervention,
    Kept,
    Patches,
    any_shape,
    forward,
    of_rows,
    read,
    skip,
    write,
)


class Ascent:
    """One trace: the runs of a bucket, each a row, on their way up.

    Args:
        patches: the cells.
        intervention: what is put there.
        target: the recorded target run.
        unembedding: the model's output projection, of which some ids will do, or None.
        bucket: the runs.
        ids: which ids of the vocabulary are wanted; None is all.
    """

    def __init__(
        self,
        patches: Patches,
        intervention: Intervention,
        target: TargetRun,
        unembedding: Unembedding | None,
        bucket: Bucket,
        ids: Tensor | None,
    ) -> None:
        self.patches = patches
        self.intervention = intervention
        self.target = target
        self.unembedding = unembedding
        self.start = bucket.start
        self.ids = ids
        real = intervention.mask.bool().cpu().numpy()
        self.edits = edits_of(bucket, patches.cells, real)
        # The trace's own batch is the prompts that occur; each layer then has its own rows.
        occurring, which = np.unique(bucket.runs.prompt, return_inverse=True)
        seq_len = target.batch.seq_len
        self.used = torch.from_numpy(_unmistakable(occurring, seq_len, self.start))
        self.prompts = torch.from_numpy(bucket.runs.prompt)
        self.which = torch.from_numpy(which)
        self.n_layers = patches.n_layers
        #: Of the residual stream, once a layer has been reached.
        self.width = 0
        ends = np.arange(self.n_layers * STAGES)
        #: For each stage the rows that have entered by then: they are sorted by it.
        self.present = np.searchsorted(bucket.runs.stage, ends, side="right").tolist()
        self.entries = Entries(target, self.start, self.prompts, self.present)
        self.read = None
        if target.batch.read is not None:
            restricted = unembedding is not None
            self.read = read_from(
                target, self.prompts, self.start, ids, restricted, self._entered_at
            )

    def run(self, kept: Kept | None = None, *, gradients: bool = False) -> Tensor:
        """The logits `[rows, ids]` at each run's last token, or `[rows, places, ids]`.

        Args:
            kept: what is kept of them; None is what the prompts ask for, on the CPU.
            gradients: whether they have their graph.
        """
        target = self.target
        inside = [self.prompts[: self._entered(layer, INSIDE)] for layer in range(self.n_layers)]
        cache = {target.keyword: prefix(target.kept, self.start, inside)}
        # Each layer of each bucket has another number of rows.
        with any_shape():
            return forward(
                self.patches.nnmodel,
                target.batch.rows(self.used.to(target.batch.tokens.device)),
                self._visit,
                cache=cache,
                start=self.start,
                kept=self.read.kept if kept is None and self.read is not None else kept,
                gradients=gradients,
            )

    def _entered(self, layer: int, stage: int) -> int:
        return self.present[layer * STAGES + stage] if layer >= 0 else 0

    def _entered_at(self, place: Place) -> int:
        stage = OUTPUT if place.stage % STAGES == OUTPUT else INSIDE
        return self._entered(place.layer, stage)

    def _visit(self, traced: Any) -> None:
        for layer in range(self.n_layers):
            envoy = follow(traced, f"{self.patches.layers}.{layer}")
            if self._entered(layer, INSIDE):
                self._enter(envoy, layer)
                self._edit_inside(traced, layer)
                self._narrow(traced, layer)
                self._leave(envoy, layer)
            else:
                self._skip(envoy, layer)
        if self.read is not None and self.unembedding is not None:
            self.unembedding.restrict(traced, self.ids, self.read.tokens)
        elif self.ids is not None and self.unembedding is not None:
            self.unembedding.restrict(traced, self.ids)

    def _enter(self, envoy: Any, layer: int) -> None:
        """Before a layer: rows join, and masks and positions get a row for each of them."""
        args, kwargs = envoy.inputs
        name = None if args else next(iter(kwargs))
        hidden = args[0] if name is None else kwargs[name]
        self.width = hidden.shape[-1]
        came, count = self._entered(layer - 1, OUTPUT), self._entered(layer, INSIDE)
        state = self.entries.joined(hidden, layer, INPUT)
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
        shape = (self._entered(layer, INSIDE), self.target.batch.seq_len - self.start)
        edits = list(self.edits.get(layer * STAGES + INSIDE, ()))
        while edits:
            # Heads of a fused projection are parts of one activation, which is read once.
            place = edits[0].place
            here = [edit for edit in edits if edit.place.location == place.location]
            edits = [edit for edit in edits if edit.place.location != place.location]
            activation = read(traced, place, shape).clone()
            self._apply(activation, here)
            write(traced, place, activation)

    def _narrow(self, traced: Any, layer: int) -> None:
        """In the last layer: the MLP need not see tokens that nobody reads."""
        last, target = self.n_layers - 1, self.target
        if layer < last or target.batch.read is not None or self.start + 1 >= target.batch.seq_len:
            return
        places = [place for place in self.patches.places if place.layer == layer]
        if any(place.component.module and place.name == "mlp" for place in places):
            return
        path, model = f"{self.patches.layers}.{layer}", self.patches.model
        api = self.patches.adapters[0]
        heads = next(
            (name for name in ("o", "q", "attn") if name in table_of(api, model, layer)), None
        )
        if heads is None:
            return
        inside = mlp_inside(model.get_submodule(path), place_of(api, model, layer, heads))
        if inside is not None:
            only_last_token(traced, f"{path}.{inside}", self.width)

    def _leave(self, envoy: Any, layer: int) -> None:
        """After a layer: rows of its output join."""
        came, count = self._entered(layer, INSIDE), self._entered(layer, OUTPUT)
        if count == came and layer * STAGES + OUTPUT not in self.edits:
            return
        output = envoy.output
        hidden = output[0] if isinstance(output, tuple | list) else output
        state = self.entries.joined(hidden, layer, OUTPUT)
        state = self._edited(state, layer, OUTPUT, own=count > came)
        if isinstance(output, tuple | list):
            envoy.output = type(output)([state, *output[1:]])
        else:
            envoy.output = state

    def _skip(self, envoy: Any, layer: int) -> None:
        """A layer that no row has to pass; rows of its output may still join."""
        hidden = envoy.input
        if self._entered(layer, OUTPUT):
            hidden = self.entries.joined(hidden, layer, OUTPUT)
            hidden = self._edited(hidden, layer, OUTPUT, own=True)
        rest = self.target.rests[layer]
        skip(envoy, hidden if rest is None else (hidden, *rest))

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
            edit.apply(activation, self.start, self.intervention)


def _unmistakable(prompts: Integers, seq_len: int, start: int) -> Integers:
    """The prompts, some twice if need be, so that their number is no number of tokens.

    By it a layer's masks and position embeddings are told from what has no row for each prompt.
    """
    lengths = (seq_len, seq_len - start)
    more = next(more for more in range(3) if len(prompts) + more not in lengths)
    return np.concatenate([prompts, np.repeat(prompts[:1], more)])
