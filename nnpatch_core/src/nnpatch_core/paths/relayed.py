"""Receivers amid a path as senders of what they write once they see a change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core.adapters import Location
from nnpatch_core.edges import (
    Changes,
    Layers,
    Receiver,
    Rows,
    Sender,
    positions_of,
    read_by,
)
from nnpatch_core.paths.order import writers
from nnpatch_core.seq_pos import Positions


@attrs.frozen(eq=False)
class Relay:
    """Receivers of one entry amid a path.

    Args:
        receivers: the receivers.
        positions: for each where it sees the change; None is everywhere.
    """

    receivers: tuple[Receiver, ...]
    positions: tuple[Positions | None, ...]

    def rows(self, rows: slice) -> Relay:
        """The same in some of the prompts, which may stand several times after one another."""
        return Relay(self.receivers, positions_of(self.positions, rows))

    def masks(self, seq_len: int) -> list[tuple[Receiver, Tensor | None]]:
        """Each receiver, and `[batch or 1, seq]`, bool: where it sees the change."""
        where = (None if each is None else each.mask(seq_len) for each in self.positions)
        return list(zip(self.receivers, where, strict=True))


@attrs.frozen(eq=False)
class Relayed:
    """The changes that entries amid a path write, as they see the entries before them.

    A head that reads a changed query, key or value hands on another z, with all else of its layer
    as in the target run.

    Args:
        layers: the layers, and the target run.
        changes: what the entries of the member before change in the stream.
        before: `[entries]`, for each entry which of those it sees.
        relays: `[entries]`, for each its receivers, and where they see it.
        moved: `[entries, batch, seq]`, bool: where it may write anything else.
    """

    layers: Layers
    changes: Changes
    before: Integers
    relays: Sequence[Sequence[tuple[Receiver, Tensor | None]]]
    moved: Tensor

    @classmethod
    def of(
        cls,
        layers: Layers,
        changes: Changes,
        before: Integers,
        relays: Sequence[Relay],
        mask: Tensor,
    ) -> Relayed:
        """Find out where entries may write anything else.

        Args:
            layers: see above.
            changes: see above.
            before: see above.
            relays: for each entry its receivers.
            mask: `[batch, seq]`: 1 where a prompt may be changed.
        """
        masks = [relay.masks(mask.shape[1]) for relay in relays]
        moved = torch.zeros(len(relays), *mask.shape, dtype=torch.bool, device="cpu")
        real = mask.bool().cpu()
        for number, each in enumerate(masks):
            seen = changes.moved[int(before[number])]
            for receiver, where in each:
                own = seen if where is None else seen & where
                # A key or a value is seen from every later token.
                own = own.cumsum(1).bool() if receiver.kind in ("k", "v") else own
                moved[number] |= own & real
        return cls(layers, changes, before, masks, moved)

    def senders(self, entry: int) -> frozenset[Sender]:
        """See `Writes.senders`."""
        nodes = self.layers.nodes
        return frozenset(each for node, _ in self.relays[entry] for each in writers(nodes, node))

    def written(
        self, entries: Integers, prompts: Tensor, until: Integers
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See `Writes.written`."""
        nodes = self.layers.nodes
        reading: dict[int, dict[int, list[tuple[Receiver, Tensor | None]]]] = {}
        for row, (entry, last) in enumerate(zip(entries.tolist(), until.tolist(), strict=True)):
            for receiver, where in self.relays[entry]:
                if writers(nodes, receiver)[0].step <= last:
                    by_row = reading.setdefault(nodes.step(receiver), {})
                    by_row.setdefault(row, []).append((receiver, where))
        wanted: dict[int, Rows] = {}
        for step, by_row in reading.items():
            some_rows = torch.tensor(sorted(by_row), device="cpu")
            wanted[step] = self.before[entries[some_rows.numpy()]], prompts[some_rows]
        for step, change in self.changes.along(wanted):
            rows, (_, some) = torch.tensor(sorted(reading[step]), device="cpu"), wanted[step]
            members = [reading[step][row] for row in rows.tolist()]
            layer, kinds = step // 2, {node.kind for each in members for node, _ in each}
            stream = self.layers.target.streams[layer][some] + change
            given = read_by(self.layers, step, kinds, stream, some)
            moved = self.moved[torch.from_numpy(entries[rows.numpy()]), some]
            for kind, found in (("heads", self._heads), ("mlp", self._mlp)):
                mine = [
                    [each for each in own if (each[0].kind == "mlp") == (kind == "mlp")]
                    for own in members
                ]
                index = torch.tensor([n for n, own in enumerate(mine) if own], device="cpu")
                if len(index):
                    sent = found(
                        layer,
                        {name: each[index] for name, each in given.items()},
                        some[index],
                        [mine[n] for n in index.tolist()],
                    )
                    here = moved[index][..., None].to(sent.device)
                    sender = writers(nodes, mine[int(index[0])][0][0])[0]
                    yield sender.step, rows[index], torch.where(here, sent, 0.0).to(sent)

    def _mlp(
        self,
        layer: int,
        given: Mapping[str, Tensor],
        prompts: Tensor,
        members: Sequence[Sequence[tuple[Receiver, Tensor | None]]],
    ) -> Tensor:
        """`[rows, seq, width]`: what an MLP adds to the stream, less what it added before."""
        own = self.layers.target.mlp[layer][prompts]
        mixed = own.clone()
        for row, each in enumerate(members):
            for _, where in each:
                here = self._here(where, int(prompts[row])).to(own.device)
                mixed[row, here] = given["mlp"][row, here]
        return self.layers.mlp[layer] * (mixed - own)

    def _heads(
        self,
        layer: int,
        given: Mapping[str, Tensor],
        prompts: Tensor,
        members: Sequence[Sequence[tuple[Receiver, Tensor | None]]],
    ) -> Tensor:
        """The same of the heads that read another query, key or value."""
        layers, places = self.layers, self.layers.places[layer]
        some, which = torch.unique(prompts, return_inverse=True)
        own = layers.received(layer, layers.target.streams[layer][some], some)
        kinds = {node.kind for each in members for node, _ in each}
        # Projections may be one, of which each has its columns.
        mixed: dict[Location, Tensor] = {
            places[kind].location: own[kind][which].clone() for kind in kinds
        }
        heads = layers.target.heads[layer][prompts].clone()
        columns = places["o"].columns(heads.shape[-1])
        assert columns is not None
        for row, each in enumerate(members):
            for node, where in each:
                into = mixed[places[node.kind].location]
                chosen = places[node.kind].columns(into.shape[-1])
                assert chosen is not None
                assert node.head is not None
                here = self._here(where, int(prompts[row])).nonzero().to(into.device)
                at = chosen[node.head].to(into.device)
                into[row, here, at] = given[node.kind][row, here, at]
        put: dict[str, Tensor] = {kind: mixed[places[kind].location] for kind in kinds}
        changed = layers.attended(layer, put, prompts)
        for row, each in enumerate(members):
            for sender in {one for node, _ in each for one in writers(layers.nodes, node)}:
                assert sender.head is not None
                at = columns[sender.head].to(heads.device)
                heads[row, :, at] = changed[row, :, at]
        return layers.changed_by_heads(layer, heads, prompts)

    def _here(self, where: Tensor | None, prompt: int) -> Tensor:
        """`[seq]`, bool: where a receiver sees the change in a prompt."""
        if where is None:
            return torch.ones(self.moved.shape[-1], dtype=torch.bool, device="cpu")
        return where[prompt if len(where) > 1 else 0]
