"""The recorded target run: what the cone engine starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._host_memory import in_host
from nnpatch_core._models import follow
from nnpatch_core._upstream import KeysValues, recorded
from nnpatch_core.adapters import OUTPUT, STAGES, Place
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone.patched_runs import NEVER, Changed, leftmost
from nnpatch_core.seq_pos import Positions
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    Cells,
    Intervention,
    Patches,
    Prepared,
    begin,
    differs,
    forward,
    read,
    read_component,
    with_cache,
)


@attrs.frozen(eq=False)
class TargetRun:
    """The target run, as far as patched runs need it.

    Args:
        batch: its prompts.
        logits: `[batch, vocab]` at each prompt's last token, in float32 on the CPU; or
            `[batch, places, vocab]`, where `batch.read` asks for others.
        first: the leftmost position that is patched: left of it no activation is kept.
        inputs: the residual stream before each layer that has sites inside, `[batch, positions from
            first on, width]`.
        outputs: the same after each layer that has a site there.
        rests: for each layer what it gives besides the residual stream; None if it gives no tuple.
        kept: the keys and values of each layer.
        keyword: under which the model's forward takes them.
        changed: where patching changes anything that is read.
    """

    batch: Batch
    logits: Tensor
    first: int
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
    first: int | None = None,
    edges: Sequence[tuple[int, int]] = (),
) -> TargetRun:
    """Run `batch`, and keep what runs that enter above, or to the right, will need.

    Args:
        patches: what a sweep patches, all of one list of layers.
        batch: the target prompts.
        intervention: what is put there.
        store: where what is kept lies; None is where it was computed.
        first: the first position of which activations are kept; None is the first that is patched.
        edges: the pieces in which what is left of that is run before, if not at once.

    Raises:
        EngineError: the model does not hand out its keys and values.
    """
    first = patches.first if first is None else first
    begun = begin(patches.nnmodel, batch, edges, patches.n_layers, store) if edges else None
    start = 0 if begun is None else begun.start
    shape = (len(batch), batch.seq_len - start)
    stages = {place.stage for place in patches.places}
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    rests: dict[int, tuple[Any, ...] | None] = {}
    changes = _Changes(patches, intervention, batch.reaching[..., None], start)

    def visit(traced: Any) -> None:
        for layer in range(patches.n_layers):
            envoy = follow(traced, f"{patches.layers}.{layer}")
            # Runs that begin at an output enter after the layer, all others before it.
            if stages & set(range(layer * STAGES, layer * STAGES + OUTPUT)):
                inputs[layer] = _stored(
                    read_component(envoy, LAYER_INPUT)[:, first - start :], store
                )
            for place in patches.places:
                if place.layer == layer:
                    changes.note(place, read(traced, place, shape))
            output = envoy.output
            rests[layer] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            if layer * STAGES + OUTPUT in stages:
                outputs[layer] = _stored(
                    read_component(envoy, LAYER_OUTPUT)[:, first - start :], store
                )

    def run(cache: Mapping[str, Any]) -> Tensor:
        return forward(patches.nnmodel, batch, visit, cache=cache, start=start)

    if begun is None:
        keyword, logits, cache = with_cache(patches.nnmodel, patches.n_layers, run, store)
        kept = recorded(cache)
    else:
        logits = run(begun.given)
        keyword, kept = begun.keyword, begun.kept
    return TargetRun(batch, logits, first, inputs, outputs, rests, kept, keyword, changes)


@attrs.frozen(eq=False)
class _Changes:
    """Where patching changes anything that is read, `[batch, seq, heads or 1]` for each place.

    `reaching` is `[batch, seq, 1]`: the tokens that logits which are read can see. Where the
    intervention looks at the cell, for each cell too.
    """

    patches: Patches
    intervention: Intervention
    reaching: Tensor | bool = True
    #: The position of the first token that is read; left of it nothing is patched.
    start: int = 0
    _known: dict[object, Tensor] = attrs.field(factory=dict, init=False)
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
                changed = differs(
                    activation,
                    place,
                    self.intervention,
                    alignment,
                    limit=limit,
                    start=self.start,
                )
                self._known[place, alignment, limit] = changed.cpu() & self.reaching
            return
        cells = self.patches.cells
        own = [number for number, each in enumerate(cells.places) if each is place]
        sites = np.isin(cells.sites.place, own).nonzero()[0]
        for site, cell in zip(sites.tolist(), cells.cell_of_sites()[sites].tolist(), strict=True):
            at = cells.positions[cells.sites.positions[site]]
            limit = cells.limit(int(cells.sites.space[site]), int(cells.sites.head[site]))
            key = (cell, place, at, limit)
            if key not in self._known:
                changed = differs(activation, place, self.intervention, at, cell, limit, self.start)
                self._known[key] = changed.cpu() & self.reaching

    def starts(self, cells: Cells, first: int) -> Integers:
        """See `Changed.starts`."""
        if self._knowing is not None or self.intervention.by_cell:
            return self._of_each(cells, first)
        sites = cells.sites
        starts = np.full((len(sites), self._batch), NEVER, dtype=np.int32)
        tokens = np.array([_only_token(each) for each in cells.positions], dtype=np.int64)
        token = tokens[sites.positions]
        aligned = np.zeros(len(tokens), dtype=np.int64)
        used = cells.used("positions")
        aligned[used] = _numbered([self.patches.alignment(cells.positions[n]) for n in used])
        columns = sites.place, aligned[sites.positions], sites.space, sites.head >= 0
        # One token each, as most are: all at once, for each place.
        for rows in _alike(np.flatnonzero(token >= 0), columns):
            known = self._at(cells, int(rows[0]))
            heads = sites.head[rows]
            whole: Booleans = np.any(known, -1, keepdims=True) if heads[0] < 0 else known
            here = whole[:, token[rows], np.maximum(heads, 0)]
            starts[rows] = np.where(here, token[rows], NEVER).T
        columns = sites.place, sites.positions, sites.space, sites.head >= 0
        for rows in _alike(np.flatnonzero(token < 0), columns):
            at = cells.positions[sites.positions[rows[0]]]
            here = at.picked(torch.from_numpy(self._at(cells, int(rows[0])))).numpy()
            heads = sites.head[rows]
            if heads[0] < 0:
                here = here.any(-1, keepdims=True)
            starts[rows] = leftmost(at, here)[:, np.maximum(heads, 0)].T
        return starts

    def _of_each(self, cells: Cells, first: int) -> Integers:
        """The same where the intervention looks at the cell."""
        sites, found = cells.sites, []
        known: dict[object, Integers] = {}
        for site, cell in enumerate((cells.cell_of_sites() + first).tolist()):
            at, head = cells.positions[sites.positions[site]], int(sites.head[site])
            if self._knowing is not None:
                here = self._knowing.moves(cell, cells.bound(site))
                # Cells that move the same tokens share a tensor.
                key: object = (id(here), at)
            else:
                limit = cells.limit(int(sites.space[site]), head)
                place = cells.places[sites.place[site]]
                here, key = self._known[cell, place, at, limit], (cell, place, at, limit, head)
            if key not in known:
                if self._knowing is not None:
                    reaching = self.reaching
                    seen = here if isinstance(reaching, bool) else here & reaching[..., 0]
                else:
                    seen = here.any(-1) if head < 0 else here[..., head]
                known[key] = leftmost(at, at.picked(seen).numpy())
            found.append(known[key])
        return np.array(found, dtype=np.int32).reshape(len(sites), -1)

    def _at(self, cells: Cells, site: int) -> Booleans:
        """`[batch, seq, heads or 1]`: where a site of some cells changes."""
        sites = cells.sites
        place, at = cells.places[sites.place[site]], cells.positions[sites.positions[site]]
        limit = cells.limit(int(sites.space[site]), int(sites.head[site]))
        known: Booleans = self._known[place, self.patches.alignment(at), limit].numpy()
        return known

    @property
    def _batch(self) -> int:
        return len(self.intervention.mask)


def _only_token(positions: Positions) -> int:
    """The one token that positions are, in each prompt; -1 where they are others."""
    return int(positions.at[0, 0]) if positions.at.shape == (1, 1) else -1


def _numbered(values: Sequence[Any]) -> Integers:
    """The number of each value, equal ones having the same."""
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(id(value), len(numbers)) for value in values])


def _alike(rows: Integers, columns: Sequence[Integers | Booleans]) -> Iterator[Integers]:
    """Some rows in groups that have the same number in each column."""
    if not len(rows):
        return
    keys = np.stack([column[rows] for column in columns], 1)
    _, which = np.unique(keys, axis=0, return_inverse=True)
    order = np.argsort(which.reshape(-1), kind="stable")
    edges = np.flatnonzero(np.diff(which.reshape(-1)[order])) + 1
    yield from np.split(rows[order], edges)


def _stored(value: Tensor, store: torch.device | None) -> Tensor:
    # A copy: later layers may work in place.
    return value.clone() if store is None else in_host(value, store)
