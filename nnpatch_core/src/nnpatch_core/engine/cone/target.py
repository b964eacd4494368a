"""The recorded target run: what the cone engine starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core._models import follow, module_of
from nnpatch_core._upstream import KeysValues, cache_keywords, recorded, recording
from nnpatch_core.adapters import OUTPUT, STAGES, Place
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone.patched_runs import Changed
from nnpatch_core.errors import EngineError, PatchingError
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    BoundSite,
    Intervention,
    Patches,
    Prepared,
    differs,
    forward,
    read,
    read_component,
)


@attrs.frozen(eq=False)
class TargetRun:
    """The target run, as far as patched runs need it.

    Args:
        batch: its prompts.
        logits: `[batch, vocab]` at each prompt's last token, in float32 on the CPU; or
            `[batch, places, vocab]`, where `batch.read` asks for others.
        inputs: the residual stream before each layer that has sites inside, `[batch, seq, width]`.
        outputs: the same after each layer that has a site there.
        rests: for each layer what it gives besides the residual stream; None if it gives no tuple.
        kept: the keys and values of each layer.
        keyword: under which the model's forward takes them.
        changed: where patching changes anything that is read.
    """

    batch: Batch
    logits: Tensor
    inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    rests: Mapping[int, tuple[Any, ...] | None]
    kept: Sequence[KeysValues]
    keyword: str
    changed: Changed


def record_target(
    patches: Patches,
    batch: Batch,
    intervention: Intervention,
    store: torch.device | None = None,
) -> TargetRun:
    """Run `batch`, and keep what runs that enter above, or to the right, will need.

    Args:
        patches: what a sweep patches, all of one list of layers.
        batch: the target prompts.
        intervention: what is put there.
        store: where what is kept lies; None is where it was computed.

    Raises:
        EngineError: the model does not hand out its keys and values.
    """
    shape, stages = (len(batch), batch.seq_len), {place.stage for place in patches.places}
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    rests: dict[int, tuple[Any, ...] | None] = {}
    changes = _Changes(patches, intervention, batch.reaching[..., None])

    def visit(traced: Any) -> None:
        for layer in range(patches.n_layers):
            envoy = follow(traced, f"{patches.layers}.{layer}")
            # Runs that begin at an output enter after the layer, all others before it.
            if stages & set(range(layer * STAGES, layer * STAGES + OUTPUT)):
                inputs[layer] = _stored(read_component(envoy, LAYER_INPUT), store)
            for place in patches.places:
                if place.layer == layer:
                    changes.note(place, read(traced, place, shape))
            output = envoy.output
            rests[layer] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            if layer * STAGES + OUTPUT in stages:
                outputs[layer] = _stored(read_component(envoy, LAYER_OUTPUT), store)

    keyword, logits, kept = _with_cache(patches.nnmodel, batch, visit, patches.n_layers)
    if store is not None:
        kept = [None if pair is None else (pair[0].to(store), pair[1].to(store)) for pair in kept]
    return TargetRun(batch, logits, inputs, outputs, rests, kept, keyword, changes.at)


@attrs.frozen(eq=False)
class _Changes:
    """Where patching changes anything that is read, `[batch, seq, heads or 1]` for each place.

    `reaching` is `[batch, seq, 1]`: the tokens that logits which are read can see. Where the
    intervention looks at the cell, for each cell and site.
    """

    patches: Patches
    intervention: Intervention
    reaching: Tensor | bool = True
    _known: dict[object, Tensor] = attrs.field(factory=dict, init=False)
    _picked: dict[object, Booleans] = attrs.field(factory=dict, init=False)
    #: The intervention, if it knows what it moves.
    _knowing: Prepared | None = attrs.field(init=False)

    @_knowing.default
    def _if_prepared(self) -> Prepared | None:
        return self.intervention if isinstance(self.intervention, Prepared) else None

    def note(self, place: Place, activation: Tensor) -> None:
        """Compare what stands at a place with what is put there."""
        if self._knowing is not None:
            return
        if not self.intervention.by_cell:
            for alignment, limit in self.patches.put_at[place]:
                changed = differs(activation, place, self.intervention, alignment, limit=limit)
                self._known[place, alignment, limit] = changed.cpu() & self.reaching
            return
        for number, cell in enumerate(self.patches.cells):
            for site in cell.sites:
                if site.place is place:
                    at = site.positions
                    changed = differs(activation, place, self.intervention, at, number, site.limit)
                    self._known[number, site] = changed.cpu() & self.reaching

    def at(self, cell: int, site: BoundSite) -> Booleans:
        """`[batch, positions]` at one site of a cell."""
        if self._knowing is not None:
            moved = self._knowing.moves(cell, site)
            # Cells that move the same tokens share a tensor.
            known = self._picked.get((id(moved), site.positions))
            if known is None:
                reaching = self.reaching
                seen = moved if isinstance(reaching, bool) else moved & reaching[..., 0]
                known = site.positions.picked(seen).numpy()
                self._picked[id(moved), site.positions] = known
            return known
        key: object = (site.place, self.patches.alignment(site.positions), site.limit)
        if self.intervention.by_cell:
            key = (cell, site)
        # Once for all heads at the same positions.
        by_head = self._picked.get((key, site.positions))
        if by_head is None:
            by_head = site.positions.picked(self._known[key]).numpy()
            self._picked[key, site.positions] = by_head
        if site.head is not None:
            return by_head[..., site.head]
        changed: Booleans = np.any(by_head, axis=-1)
        return changed


def _with_cache(
    nnmodel: Any, batch: Batch, visit: Callable[[Any], None], n_layers: int
) -> tuple[str, Tensor, Sequence[KeysValues]]:
    """Run `batch`, and find under which keyword the model leaves its keys and values.

    Raises:
        EngineError: under none.
    """
    problems = []
    for keyword in cache_keywords(module_of(nnmodel)):
        cache = recording(n_layers)
        try:
            logits = forward(nnmodel, batch, visit, cache={keyword: cache})
        except (PatchingError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problems.append(f"given {keyword}=, {type(error).__name__}: {error}")
            continue
        kept = recorded(cache)
        if any(pair is not None for pair in kept):
            return keyword, logits, kept
        problems.append(f"given {keyword}=, it leaves nothing in it")
    raise EngineError(f"the model does not hand out keys and values: {'; '.join(problems)}")


def _stored(value: Tensor, store: torch.device | None) -> Tensor:
    # A copy: later layers may work in place.
    return value.clone() if store is None else value.to(store, copy=True)
