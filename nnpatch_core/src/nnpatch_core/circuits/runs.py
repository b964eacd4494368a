"""Runs in which the edges of a circuit carry what this very run computes, and no others do.

A run goes up layer by layer. Each receiver reads the stream of a base run, with what the senders of
its edges in the circuit add in this run in place of what they add there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core._models import follow
from nnpatch_core._rounding import as_typed
from nnpatch_core.batch import Batch
from nnpatch_core.edges import Given, Layers, Nodes
from nnpatch_core.tracing import forward, skip

#: So many times the room of its heads a layer needs as it is computed.
_WORK = 6


@attrs.frozen(eq=False)
class Base:
    """The run that all edges outside of a circuit carry: the target run, or an ablated one.

    Args:
        given: what its senders are.
        streams: the stream at each step, `[batch, seq, width]`; see `Nodes.read`.
        attention: for each layer its queries, keys and values, by name.
    """

    given: Given
    streams: Sequence[Tensor]
    attention: Sequence[Mapping[str, Tensor]]

    @classmethod
    def of(cls, layers: Layers, given: Given | None) -> Base:
        """The base of some prompts.

        Args:
            layers: the layers, and the target run.
            given: what senders are in place of the target run's; None is the target run itself.
        """
        target, nodes = layers.target, layers.nodes
        everyone = torch.arange(len(target.batch), device="cpu")
        own = Given(target.streams[0], target.heads, target.mlp, target.batch.mask)
        base = own if given is None else _whole(given, own)
        streams = [base.stream]
        for layer in range(nodes.n_layers):
            if given is None:
                attn = layers.attn[layer] * target.attn[layer]
            else:
                attn = layers.added_by_heads(layer, base.heads[layer], everyone)
            streams.append(streams[-1] + attn)
            behind = streams[-1] + layers.mlp[layer] * base.mlp[layer]
            above = target.streams[layer + 1]
            streams.append(above if given is None else behind.to(above.device))
        attention = [
            layers.received(layer, streams[2 * layer], everyone) for layer in range(nodes.n_layers)
        ]
        return cls(base, streams, attention)


def _whole(given: Given, own: Given) -> Given:
    """The values of senders, for each prompt, where a prompt may be changed; else the run's own."""
    real = given.mask.bool()[..., None]

    def of(one: Tensor, other: Tensor) -> Tensor:
        return torch.where(real.to(other.device), one.to(other), other)

    return Given(
        of(given.stream, own.stream),
        [of(*pair) for pair in zip(given.heads, own.heads, strict=True)],
        [of(*pair) for pair in zip(given.mlp, own.mlp, strict=True)],
        given.mask,
    )


@attrs.frozen
class _Wires:
    """The numbers of a layer's senders and receivers.

    Args:
        heads: its heads, as senders.
        mlp: its MLP, as a sender.
        attends: the receivers that its attention reads by.
        transforms: the receiver that its MLP reads by.
    """

    heads: tuple[int, ...]
    mlp: int
    attends: tuple[int, ...]
    transforms: int

    @classmethod
    def of(cls, nodes: Nodes) -> list[_Wires]:
        """Those of each layer."""
        layers: list[_Wires] = []
        for layer in range(nodes.n_layers):
            written = [n for n, each in enumerate(nodes.senders) if each.layer == layer]
            heads = tuple(n for n in written if nodes.senders[n].kind == "head")
            (mlp,) = (n for n in written if nodes.senders[n].kind == "mlp")
            read = [n for n, each in enumerate(nodes.receivers) if each.layer == layer]
            (transforms,) = (n for n in read if nodes.receivers[n].kind == "mlp")
            attends = tuple(n for n in read if nodes.receivers[n].kind in ("q", "k", "v"))
            layers.append(cls(heads, mlp, attends, transforms))
        return layers


@attrs.frozen(eq=False)
class CircuitRuns:
    """Some prompts, in which circuits are run.

    Args:
        layers: the layers, and the target run.
        base: the run that edges outside of a circuit carry.
        source: the source prompts, on which circuits are run.
        stream: the source run's stream before layer 0, `[batch, seq, width]`.
        start: the first position at which this run may differ from the base.
        ablated: whether the base is an ablated run. Where it is not, whatever reads nothing of a
            circuit is as in the base.
        room: bytes that runs may take.
    """

    layers: Layers
    base: Base
    source: Batch
    stream: Tensor
    start: int
    ablated: bool
    room: int

    @classmethod
    def of(
        cls, layers: Layers, source: Batch, stream: Tensor, given: Given | None, room: int
    ) -> CircuitRuns:
        """Circuits in some prompts.

        Args:
            layers: the layers, and the target run.
            source: the source prompts.
            stream: the source run's stream before layer 0.
            given: what senders outside of a circuit are; None is the target run's.
            room: bytes that runs may take.
        """
        base = Base.of(layers, given)
        stream = stream.to(base.streams[0].device)
        moved = (stream != base.streams[0]).any(-1).any(0)
        if given is not None:
            # Ablated senders differ from what a run computes wherever there is a token.
            moved = moved | layers.target.batch.mask.bool().any(0).to(moved.device)
        start = int(moved.nonzero()[0]) if moved.any() else len(moved) - 1
        return cls(layers, base, source, stream, start, given is not None, room)

    @functools.cached_property
    def wires(self) -> list[_Wires]:
        """The senders and receivers of each layer."""
        return _Wires.of(self.layers.nodes)

    def logits(self, kept: Tensor, done: Callable[[int], None] | None = None) -> Tensor:
        """The logits of each circuit in each prompt, as `forward` gives them.

        Args:
            kept: `[circuits, senders, receivers]`, bool: the edges of each circuit.
            done: called with how many circuits were run.

        Returns:
            `[circuits, batch, vocab]` or `[circuits, batch, places, vocab]`.
        """
        live = [self._leading(each) for each in kept.numpy()]
        found: list[Tensor] = []
        for circuits, size in self._together(live):
            every = torch.arange(len(self.layers.target.batch), device="cpu")
            some = [
                self._run(circuits, every[first : first + size])
                for first in range(0, len(every), size)
            ]
            found.append(torch.cat(some, 1))
            if done is not None:
                done(len(circuits))
        return torch.cat(found)

    def _run(self, circuits: Sequence[Booleans], prompts: Tensor) -> Tensor:
        run = _Run(self, circuits, prompts)
        for layer in range(self.layers.nodes.n_layers):
            run.attend(layer)
            run.transform(layer)
        return self._finished(run.final(), prompts.repeat(len(circuits)), len(circuits))

    def _together(self, live: Sequence[Booleans]) -> Iterator[tuple[list[Booleans], int]]:
        """Circuits that are run together, and of how many prompts at a time."""
        batch, seq_len, width = self.stream.shape
        one = (seq_len - self.start) * width * self.stream.element_size()
        heads = max(len(each.heads) for each in self.wires)
        circuits: list[Booleans] = []
        total = 0
        for each in live:
            # Parts, those of them that are read, and what a layer makes of its streams.
            need = (2 * sum(map(len, self._sets(each))) + _WORK * heads) * one
            if circuits and total + need * batch > self.room:
                yield circuits, max(min(self.room // (total // batch), batch), 1)
                circuits, total = [], 0
            circuits, total = [*circuits, each], total + need * batch
        yield circuits, max(min(self.room // (total // batch), batch), 1)

    def _leading(self, kept: Booleans) -> Booleans:
        """The edges of a circuit but those into what no edge of it leads on from.

        The heads of a layer are taken together: a norm of all queries makes each see the others'.
        """
        kept = kept.copy()
        for wires in reversed(self.wires):
            if not kept[wires.mlp].any():
                kept[:, wires.transforms] = False
            if not kept[list(wires.heads)].any():
                kept[:, list(wires.attends)] = False
        return kept

    def _sets(self, kept: Booleans) -> list[Booleans]:
        """For each layer `[parts, heads]`, bool: which of its heads each part is of."""
        found = []
        for layer, wires in enumerate(self.wires):
            own = kept[list(wires.heads)]
            if self.layers.structure.direct[layer]:
                sets = np.eye(len(own), dtype=np.bool_)[own.any(1)]
            else:
                # Each set of heads that some receiver reads together, but for none at all.
                sets = np.unique(own[:, own.any(0)], axis=1).T
            found.append(sets)
        return found

    def _finished(self, final: Tensor, rows: Tensor, circuits: int) -> Tensor:
        """The logits of final streams `[rows, seq, width]`, of these prompts."""
        layers, some = self.layers, self.source.rows(rows.to(self.source.tokens.device))
        nodes, rests = layers.nodes, layers.target.rests

        def visit(traced: Any) -> None:
            for layer in range(nodes.n_layers):
                rest = rests[layer]
                skip(
                    follow(traced, f"{layers.path}.{layer}"),
                    final if rest is None else (final, *rest),
                )

        logits = forward(layers.nnmodel, some, visit)
        return logits.view(circuits, -1, *logits.shape[1:])


class _Run:
    """One run of several circuits in some prompts, as far as it has come.

    The additions of senders in this run, less those in the base run, are kept in parts: of a layer
    whose heads are added one by one each head is a part; where a norm follows, each set of heads
    that some receiver reads together is one. Nothing is computed that no receiver reads.
    """

    def __init__(self, runs: CircuitRuns, kept: Sequence[Booleans], prompts: Tensor) -> None:
        self.runs, self.layers, self.base = runs, runs.layers, runs.base
        self.kept, self.prompts, self.start = kept, prompts, runs.start
        self.sets = [runs._sets(each) for each in kept]
        base = self.base.streams[0]
        input_ = (runs.stream.to(base) - base)[prompts, self.start :]
        self.shape = input_.shape
        #: For each circuit `[parts, batch * tokens * width]`, and who reads each.
        self.parts = [
            base.new_empty(1 + len(sets) + sum(map(len, sets)), input_.numel())
            for sets in self.sets
        ]
        self.read: list[list[Booleans]] = [[] for _ in kept]
        for circuit, own in enumerate(kept):
            self._add(circuit, input_, own[0])

    def _add(self, circuit: int, part: Tensor, read: Booleans) -> None:
        """A part `[batch, tokens, width]` of a circuit, and `[receivers]`: which read it."""
        if read.any():
            self.parts[circuit][len(self.read[circuit])] = part.flatten()
            self.read[circuit].append(read)

    def _streams(
        self, circuit: int, step: int, receivers: Sequence[int]
    ) -> tuple[Tensor, dict[int, int]]:
        """The streams that receivers of a circuit read at a step, but for the base's own.

        Returns:
            `[streams, batch, tokens, width]`, and by receiver the number of its stream.
        """
        parts, known = self.parts[circuit], self.read[circuit]
        read = np.stack(known)[:, receivers] if known else np.zeros((0, len(receivers)), np.bool_)
        numbers: dict[bytes, int] = {}
        which: dict[int, int] = {}
        columns: list[Booleans] = []
        for place in np.flatnonzero(read.any(0)).tolist():
            column = read[:, place]
            number = numbers.setdefault(column.tobytes(), len(columns))
            if number == len(columns):
                columns.append(column)
            which[receivers[place]] = number
        if not columns:
            return self.base.streams[step].new_empty(0, *self.shape), {}
        chosen = np.stack(columns)
        used = np.flatnonzero(chosen.any(0))
        # A copy of few parts costs less than products with zeros.
        if 2 * len(used) < len(known):
            some, chosen = parts[torch.from_numpy(used).to(parts.device)], chosen[:, used]
        else:
            some = parts[: len(known)]
        with as_typed(some):
            streams = torch.from_numpy(chosen).to(some) @ some
        base = self.base.streams[step][self.prompts, self.start :]
        # All parts lie with the first layer, and what reads them may be on another device.
        return streams.view(-1, *self.shape).to(base.device) + base, which

    def attend(self, layer: int) -> None:
        """A layer's attention, and the parts of its heads."""
        wires = self.runs.wires[layer]
        active: list[int] = []
        rows: list[Tensor] = []
        owners: list[dict[int, int]] = []
        for circuit, sets in enumerate(self.sets):
            if not len(sets[layer]):
                continue
            streams, which = self._streams(circuit, 2 * layer, wires.attends)
            if not which and not self.runs.ablated:
                continue
            first = sum(len(each) for each in rows)
            owners.append({number: first + own for number, own in which.items()})
            rows.append(streams)
            active.append(circuit)
        if active:
            heads = self._attended(layer, torch.cat(rows), owners)
            self._add_heads(layer, active, heads)

    def _attended(self, layer: int, streams: Tensor, owners: Sequence[Mapping[int, int]]) -> Tensor:
        """The output of a layer's heads, `[circuits, batch, seq, any]`.

        Args:
            layer: the layer.
            streams: `[streams, batch, tokens, width]`.
            owners: for each circuit which of these its receivers read; others read the base's.
        """
        given = self._received(layer, streams) if len(streams) else {}
        places, nodes = self.layers.places[layer], self.layers.nodes
        rows = self.prompts.repeat(len(owners))
        written: dict[Any, Tensor] = {}
        values: dict[str, Tensor] = {}
        for kind in ("q", "k", "v"):
            location = places[kind].location
            if location not in written:
                written[location] = self.base.attention[layer][kind][rows]
            values[kind] = written[location]
        for circuit, which in enumerate(owners):
            own = slice(circuit * len(self.prompts), (circuit + 1) * len(self.prompts))
            for number, stream in which.items():
                receiver = nodes.receivers[number]
                value = values[receiver.kind]
                columns = places[receiver.kind].columns(value.shape[-1])
                assert columns is not None
                assert receiver.head is not None
                index = columns[receiver.head].to(value.device)
                value[own, self.start :, index] = given[receiver.kind][stream][..., index]
        heads = self.layers.attended(layer, values, rows)
        return heads.view(len(owners), len(self.prompts), *heads.shape[1:])

    def _received(self, layer: int, streams: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values of streams, `[streams, batch, tokens, any]`."""
        rows, prompts = streams.flatten(0, 1), self.prompts.repeat(len(streams))
        if not self.layers.structure.tokenwise(layer):
            left = self.base.streams[2 * layer][prompts, : self.start]
            rows = torch.cat([left, rows], 1)
        found = self.layers.received(layer, rows, prompts)
        tokens = streams.shape[2]
        return {
            name: each[:, -tokens:].view(*streams.shape[:2], tokens, -1)
            for name, each in found.items()
        }

    def _add_heads(self, layer: int, active: Sequence[int], heads: Tensor) -> None:
        """The parts of a layer's heads, given their output `[circuits, batch, seq, any]`."""
        start, wires = self.start, self.runs.wires[layer]
        base = self.base.given.heads[layer][self.prompts, start:]
        columns = self.layers.places[layer]["o"].columns(base.shape[-1])
        assert columns is not None
        # The base itself comes first.
        mixed = [base]
        for circuit, own in zip(active, heads[:, :, start:], strict=True):
            for members in self.sets[circuit][layer]:
                some = torch.zeros(base.shape[-1], dtype=torch.bool, device="cpu")
                some[columns[torch.from_numpy(members)].flatten()] = True
                mixed.append(torch.where(some.to(own.device), own, base))
        added = self.layers.added_by_heads(
            layer, torch.cat(mixed), self.prompts.repeat(len(mixed)), start
        )
        added = added.view(len(mixed), *self.shape)
        parts = iter(added[1:] - added[0])
        for circuit in active:
            read = self.kept[circuit][list(wires.heads)]
            for members in self.sets[circuit][layer]:
                if self.layers.structure.direct[layer]:
                    readers = read[members][0]
                else:
                    readers = (read == members[:, None]).all(0)
                self._add(circuit, next(parts), readers)

    def transform(self, layer: int) -> None:
        """A layer's MLP, and its part."""
        wires, nodes = self.runs.wires[layer], self.layers.nodes
        step = 2 * layer + (not nodes.parallel[layer])
        active, streams = [], []
        for circuit, kept in enumerate(self.kept):
            if not kept[wires.mlp].any():
                continue
            stream, which = self._streams(circuit, step, [wires.transforms])
            if which or self.runs.ablated:
                active.append(circuit)
                streams.append(stream[0] if which else None)
        if not active:
            return
        rows = self._whole(step, streams)
        # The stream that the MLP reads has its attention already.
        nothing = rows.new_zeros(()).expand_as(rows)
        prompts = self.prompts.repeat(len(active))
        mlp = self.layers.mlp_of(layer, rows, prompts, nothing, self.start)
        own = self.base.given.mlp[layer][prompts, self.start :]
        added = self.layers.mlp[layer] * (mlp - own)
        for circuit, part in zip(active, added.view(-1, *self.shape), strict=True):
            self._add(circuit, part, self.kept[circuit][wires.mlp])

    def final(self) -> Tensor:
        """The final streams, `[circuits * batch, seq, width]`."""
        step, last = 2 * self.layers.nodes.n_layers, len(self.layers.nodes.receivers) - 1
        streams = []
        for circuit in range(len(self.kept)):
            stream, which = self._streams(circuit, step, [last])
            streams.append(stream[0] if which else None)
        return self._whole(step, streams)

    def _whole(self, step: int, streams: Sequence[Tensor | None]) -> Tensor:
        """The stream of each circuit at all positions, `[circuits * batch, seq, width]`.

        None is the base's own.
        """
        base = self.base.streams[step][self.prompts.repeat(len(streams))]
        for number, stream in enumerate(streams):
            if stream is not None:
                count = len(self.prompts)
                base[number * count : (number + 1) * count, self.start :] = stream
        return base
