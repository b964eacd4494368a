"""Receivers computed from a changed stream, as an intervention of the engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core.adapters import Location, Place
from nnpatch_core.edges.changes import Changes, Rows
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.nodes import Receiver
from nnpatch_core.tracing import BoundSite, PatchedTokens

#: Receivers that are a part of a layer's attention.
ATTENTION = frozenset(("q", "k", "v"))


@attrs.frozen(eq=False)
class _Known:
    """The values of one activation in some patched runs.

    Args:
        keys: `[runs]`, ascending: which cell in which prompt, as one number.
        rows: `[runs]`, which of the values each has.
        values: `[rows, seq, width]`.
    """

    keys: Integers
    rows: Integers
    values: Tensor


@attrs.frozen(eq=False)
class Received:
    """Receivers, each computed from the stream that it reads, with a change added to it.

    A cell is an entry of senders, and some receivers. Where no cell has several, an MLP enters as
    the stream behind its layer, which holds no other change.

    Args:
        layers: the layers, and the target run.
        changes: what each entry adds to the stream.
        entries: `[cells]`, the entry of each cell.
        receivers: for each cell its receivers.
        mask: `[batch, seq]`: 1 where a prompt may be changed.
        alone: whether an MLP is put behind its layer; else as what the MLP gives.
    """

    layers: Layers
    changes: Changes
    entries: Integers
    receivers: Sequence[tuple[Receiver, ...]]
    mask: Tensor
    alone: bool = True
    by_cell: bool = attrs.field(default=True, init=False)
    _moved: tuple[Tensor, ...] = attrs.field(init=False)
    _known: dict[Location, _Known] = attrs.field(factory=dict, init=False)

    @_moved.default
    def _by_entry(self) -> tuple[Tensor, ...]:
        return tuple(self.changes.moved)

    def moves(self, cell: int, site: BoundSite) -> Tensor:
        """See `Prepared.moves`."""
        return self._moved[int(self.entries[cell])]

    def ready(self, cells: Tensor, prompts: Tensor) -> None:
        """See `Prepared.ready`."""
        self._known.clear()
        if not len(cells):
            # Rows that control others may run alone.
            return
        own, rows = cells.numpy(), prompts.numpy()
        wanted: dict[Receiver, list[int]] = {}
        for run, cell in enumerate(own.tolist()):
            for receiver in self.receivers[cell]:
                # Heads of a layer are computed together.
                wanted.setdefault(attrs.evolve(receiver, head=None), []).append(run)
        steps: dict[int, dict[Receiver, Integers]] = {}
        for receiver, numbers in wanted.items():
            steps.setdefault(self.layers.nodes.step(receiver), {})[receiver] = np.array(numbers)
        read: dict[int, Rows] = {}
        which: dict[int, tuple[Integers, Integers]] = {}
        for step, receivers in steps.items():
            every = np.unique(np.concatenate([*receivers.values()]))
            pairs = np.stack([self.entries[own[every]], rows[every]], 1)
            streams, places = np.unique(pairs, axis=0, return_inverse=True)
            read[step] = streams[:, 0], torch.from_numpy(streams[:, 1].copy())
            which[step] = every, places.reshape(-1)
        kept: dict[Location, list[_Known]] = {}
        for step, change in self.changes.along(read):
            receivers, some = steps[step], read[step][1]
            every, places = which[step]
            values = self._computed(step, [*receivers], self._stream(step)[some] + change, some)
            for receiver, runs in receivers.items():
                place, value = values[receiver]
                index = places[np.searchsorted(every, runs)]
                keys = own[runs] * len(self.mask) + rows[runs]
                order = np.argsort(keys, kind="stable")
                kept.setdefault(place, []).append(_Known(keys[order], index[order], value))
        self._known.update({place: _joined(each) for place, each in kept.items()})

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`."""
        known = self._known[place.location]
        keys = tokens.cells.numpy() * len(self.mask) + tokens.prompts.numpy()
        rows = torch.from_numpy(known.rows[np.searchsorted(known.keys, keys)])
        device = known.values.device
        values = known.values[rows.to(device), tokens.positions.to(device)]
        return values.to(there)

    def _stream(self, step: int) -> Tensor:
        """The target's stream before the layer of a step."""
        return self.layers.target.streams[step // 2]

    def _computed(
        self, step: int, receivers: Sequence[Receiver], changed: Tensor, prompts: Tensor
    ) -> Mapping[Receiver, tuple[Location, Tensor]]:
        """For each receiver of a step where its value goes, and the value."""
        layers, layer, found = self.layers, step // 2, {}
        given = read_by(layers, step, {each.kind for each in receivers}, changed, prompts)
        for receiver in receivers:
            if receiver.kind in ATTENTION:
                place = layers.places[layer][receiver.kind].location
            elif receiver.kind == "mlp":
                place = layers.end(layer) if self.alone else layers.places[layer]["mlp"].location
            else:
                place = layers.end(layer - 1) if layer else layers.start
            found[receiver] = place, given[receiver.kind]
        mlp = next((each for each in receivers if each.kind == "mlp"), None)
        if mlp is not None and self.alone:
            change = given["mlp"] - layers.target.mlp[layer][prompts]
            behind = layers.target.streams[layer + 1][prompts].to(change.device)
            found[mlp] = found[mlp][0], behind + layers.mlp[layer] * change
        return found


def read_by(
    layers: Layers, step: int, kinds: Collection[str], stream: Tensor, prompts: Tensor
) -> dict[str, Tensor]:
    """The activations that receivers of a layer have, `[rows, seq, any]` by their kind.

    Args:
        layers: the layers.
        step: at which they read the stream.
        kinds: of receivers that read at that step.
        stream: `[rows, seq, width]`, the stream before the layer, with a change added to it.
        prompts: `[rows]`, the prompt of each row.
    """
    found: dict[str, Tensor] = {}
    if not ATTENTION.isdisjoint(kinds):
        found.update(layers.received(step // 2, stream, prompts))
    if "mlp" in kinds:
        found["mlp"] = layers.mlp_of(step // 2, stream, prompts)
    return {"resid_pre": stream, "logits": stream, **found}


def _joined(parts: Sequence[_Known]) -> _Known:
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(part.values) for part in parts[:-1])])
    keys = np.concatenate([part.keys for part in parts])
    rows = np.concatenate(
        [part.rows + start for part, start in zip(parts, first.tolist(), strict=True)]
    )
    order = np.argsort(keys, kind="stable")
    device = parts[0].values.device
    return _Known(keys[order], rows[order], torch.cat([part.values.to(device) for part in parts]))
