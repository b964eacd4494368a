"""Runs in which the edges of a circuit carry what this very run computes, and no others do.

A run goes up layer by layer. Each receiver reads the stream of a base run, with what the senders of
its edges in the circuit add in this run in place of what they add there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow
from nnpatch_core.edges import Given, Layers, Nodes
from nnpatch_core.tracing import forward, skip


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
            streams.append(target.streams[layer + 1] if given is None else behind)
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


@attrs.frozen(eq=False)
class CircuitRuns:
    """Some prompts, in which circuits are run.

    Args:
        layers: the layers, and the target run.
        base: the run that edges outside of a circuit carry.
        stream: the source run's stream before layer 0, `[batch, seq, width]`.
        start: the first position at which this run may differ from the base.
    """

    layers: Layers
    base: Base
    stream: Tensor
    start: int

    @classmethod
    def of(cls, layers: Layers, stream: Tensor, given: Given | None) -> CircuitRuns:
        """Circuits in some prompts.

        Args:
            layers: the layers, and the target run.
            stream: the source run's stream before layer 0.
            given: what senders outside of a circuit are; None is the target run's.
        """
        base = Base.of(layers, given)
        moved = (stream != base.streams[0]).any(-1).any(0)
        if given is not None:
            # Ablated senders differ from what a run computes wherever there is a token.
            moved = moved | layers.target.batch.mask.bool().any(0).to(moved.device)
        start = int(moved.nonzero()[0]) if moved.any() else len(moved) - 1
        return cls(layers, base, stream, start)

    def logits(self, kept: Tensor) -> Tensor:
        """The logits of each circuit in each prompt, as `forward` gives them.

        Args:
            kept: `[circuits, senders, receivers]`, bool: the edges of each circuit.

        Returns:
            `[circuits, batch, vocab]` or `[circuits, batch, places, vocab]`.
        """
        run = _Run(self, kept)
        for layer in range(self.layers.nodes.n_layers):
            run.attend(layer)
            run.transform(layer)
        return self._finished(run.final(), len(kept))

    def _finished(self, final: Tensor, circuits: int) -> Tensor:
        """The logits of final streams `[circuits * batch, seq, width]`."""
        layers, batch = self.layers, self.layers.target.batch
        rows = torch.arange(len(batch), device="cpu").repeat(circuits)
        some = batch.rows(rows.to(batch.tokens.device))
        nodes, rests = layers.nodes, layers.target.rests

        def visit(traced: Any) -> None:
            for layer in range(nodes.n_layers):
                rest = rests[layer]
                skip(
                    follow(traced, f"{layers.path}.{layer}"),
                    final if rest is None else (final, *rest),
                )

        logits = forward(layers.nnmodel, some, visit)
        return logits.view(circuits, len(batch), *logits.shape[1:])


class _Run:
    """One run of several circuits, as far as it has come.

    What senders add in this run, less what they add in the base run, is kept in parts: of a layer
    whose heads are added one by one each head is a part; where a norm follows, each set of heads
    that some receiver reads together is one.
    """

    def __init__(self, runs: CircuitRuns, kept: Tensor) -> None:
        self.runs, self.layers = runs, runs.layers
        self.nodes: Nodes = runs.layers.nodes
        self.kept = kept
        self.circuits, self.batch = len(kept), len(runs.layers.target.batch)
        self.prompts = torch.arange(self.batch, device="cpu").repeat(self.circuits)
        steps = torch.from_numpy(self.nodes.read)
        self.receivers = {
            step: (steps == step).nonzero().flatten() for step in sorted({*steps.tolist()})
        }
        self.numbers = {each: number for number, each in enumerate(self.nodes.senders)}
        #: `[circuits, batch, parts, (seq - start) * width]`, and `[circuits, parts, receivers]`.
        self.parts: list[Tensor] = []
        self.chosen: list[Tensor] = []
        base = runs.base.streams[0]
        difference = (runs.stream.to(base) - base)[:, runs.start :]
        self._add(difference.expand(self.circuits, *difference.shape)[:, :, None], kept[:, :1])

    def _add(self, parts: Tensor, chosen: Tensor) -> None:
        """Parts `[circuits, batch, parts, tokens, width]`, and which receivers read each."""
        self.parts.append(parts.flatten(3))
        self.chosen.append(chosen.to(parts.dtype))

    def _read(self, step: int, receivers: Tensor) -> tuple[Tensor, Tensor]:
        """The streams that receivers read at a step, each stream once.

        Returns:
            `[circuits, batch, streams, tokens, width]` from `start` on, and `[receivers]`: which
            each reads.
        """
        parts = torch.cat(self.parts, 2)
        chosen = torch.cat(self.chosen, 1)[..., receivers]
        columns, which = torch.unique(chosen, dim=2, return_inverse=True)
        read = columns.transpose(1, 2)[:, None].to(parts.device) @ parts
        base = self.runs.base.streams[step][:, self.runs.start :]
        shape = self.circuits, self.batch, columns.shape[2], *base.shape[1:]
        return read.view(shape) + base[None, :, None], which

    def attend(self, layer: int) -> None:
        """A layer's attention, and what its heads add."""
        step = 2 * layer
        receivers = torch.tensor(
            [
                number
                for number in self.receivers[step].tolist()
                if self.nodes.receivers[number].kind != "mlp"
            ],
            device="cpu",
        )
        streams, which = self._read(step, receivers)
        given = self._received(layer, streams)
        base = self.runs.base
        values: dict[str, Tensor] = {}
        places = self.layers.places[layer]
        written: dict[Any, Tensor] = {}
        for number, own in zip(receivers.tolist(), which.tolist(), strict=True):
            receiver = self.nodes.receivers[number]
            place = places[receiver.kind]
            if place.location not in written:
                whole = base.attention[layer][receiver.kind]
                written[place.location] = whole.repeat(self.circuits, 1, 1)
            value = written[place.location]
            columns = place.columns(value.shape[-1])
            assert columns is not None
            assert receiver.head is not None
            index = columns[receiver.head].to(value.device)
            value[:, self.runs.start :, index] = given[receiver.kind][:, :, own].flatten(0, 1)[
                ..., index
            ]
            values[receiver.kind] = value
        heads = self.layers.attended(layer, values, self.prompts)
        self._add_heads(layer, heads)

    def _received(self, layer: int, streams: Tensor) -> dict[str, Tensor]:
        """Queries, keys and values of streams, `[circuits, batch, streams, tokens, any]`."""
        count = streams.shape[2]
        rows = streams.flatten(0, 2)
        prompts = self.prompts.repeat_interleave(count)
        if not self.layers.structure.tokenwise[layer]:
            left = self.runs.base.streams[2 * layer][prompts, : self.runs.start]
            rows = torch.cat([left, rows], 1)
        found = self.layers.received(layer, rows, prompts)
        tokens = streams.shape[3]
        return {
            name: each[:, -tokens:].view(self.circuits, self.batch, count, tokens, -1)
            for name, each in found.items()
        }

    def _add_heads(self, layer: int, heads: Tensor) -> None:
        """The addition of a layer's heads, given what they hand on, `[rows, seq, any]`."""
        base = self.runs.base.given.heads[layer][self.prompts]
        columns = self.layers.places[layer]["o"].columns(heads.shape[-1])
        assert columns is not None
        numbers = [
            self.numbers[each]
            for each in self.nodes.senders
            if each.kind == "head" and each.layer == layer
        ]
        own = self.kept[:, numbers]
        if self.layers.structure.direct[layer]:
            sets = torch.eye(len(numbers), dtype=torch.bool, device="cpu")
            chosen = own
        else:
            # Each set of heads that some receiver reads together, but for none at all.
            after = torch.from_numpy(self.nodes.mask[numbers[0]])
            every = torch.unique(own[..., after].transpose(1, 2).flatten(0, 1), dim=0)
            sets = every[every.any(1)]
            chosen = (own[:, None] == sets[None, :, :, None]).all(2)
        start, parts = self.runs.start, []
        there = self.layers.added_by_heads(layer, base[:, start:], self.prompts, start)
        for members in sets:
            mixed = base[:, start:].clone()
            index = columns[members].flatten().to(mixed.device)
            mixed[..., index] = heads[:, start:][..., index]
            added = self.layers.added_by_heads(layer, mixed, self.prompts, start)
            parts.append((added - there).view(self.circuits, self.batch, *added.shape[1:]))
        if parts:
            self._add(torch.stack(parts, 2), chosen)

    def transform(self, layer: int) -> None:
        """A layer's MLP, and what it adds."""
        nodes, base = self.nodes, self.runs.base
        step = 2 * layer + (not nodes.parallel[layer])
        receiver = torch.tensor(
            [
                number
                for number in self.receivers[step].tolist()
                if nodes.receivers[number].kind == "mlp"
            ],
            device="cpu",
        )
        streams, _ = self._read(step, receiver)
        rows = base.streams[step][self.prompts]
        rows[:, self.runs.start :] = streams[:, :, 0].flatten(0, 1)
        # The stream that the MLP reads has its attention already.
        nothing = torch.zeros_like(rows)
        mlp = self.layers.mlp_of(layer, rows, self.prompts, nothing)
        own = base.given.mlp[layer][self.prompts]
        added = self.layers.mlp[layer] * (mlp - own)[:, self.runs.start :]
        number = self.numbers[next(e for e in nodes.senders if (e.kind, e.layer) == ("mlp", layer))]
        shape = self.circuits, self.batch, 1, *added.shape[1:]
        self._add(added.view(shape), self.kept[:, [number]])

    def final(self) -> Tensor:
        """The final streams, `[circuits * batch, seq, width]`."""
        step = 2 * self.nodes.n_layers
        streams, _ = self._read(step, self.receivers[step])
        final = self.runs.base.streams[step][self.prompts]
        final[:, self.runs.start :] = streams[:, :, 0].flatten(0, 1)
        return final
