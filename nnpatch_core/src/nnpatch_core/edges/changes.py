"""The changes of senders in the residual stream, where their activations are another run's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.nodes import Sender
from nnpatch_core.seq_pos import Positions

#: A row's number, one of its senders, and `[batch, seq]`, bool: where that is changed.
_InRow: TypeAlias = "tuple[int, Sender, Tensor]"


class Changes(Protocol):
    """The changes in the stream of the entries of a sweep, each some senders."""

    @property
    def moved(self) -> Tensor:
        """`[entries, batch, seq]`, bool: where an entry may change anything."""
        ...

    def at(self, entries: Integers, prompts: Tensor, step: int) -> Tensor:
        """The addition to the stream at a step, `[rows, seq, width]`.

        Args:
            entries: `[rows]`, the number of each row's entry.
            prompts: `[rows]`, the number of its prompt.
            step: as `Nodes.read` counts them.
        """
        ...


@attrs.frozen(eq=False)
class Given:
    """The activations that senders get in place of the target run's.

    Args:
        stream: the stream before layer 0, `[batch or 1, seq, width]`.
        heads: for each layer what its heads hand on, `[batch or 1, seq, any]`.
        mlp: for each layer its component `mlp`.
        mask: `[batch, seq]`: 1 where a prompt may be changed.
    """

    stream: Tensor
    heads: Sequence[Tensor]
    mlp: Sequence[Tensor]
    mask: Tensor


@attrs.frozen(eq=False)
class Entry:
    """Senders that are changed together.

    Args:
        senders: the senders.
        positions: for each where it is changed; None is everywhere.
    """

    senders: tuple[Sender, ...]
    positions: tuple[Positions | None, ...]

    def rows(self, rows: slice) -> Entry:
        """The same in some of the prompts."""
        some = (None if each is None else each.rows(rows) for each in self.positions)
        return Entry(self.senders, tuple(some))

    def members(self, moved: Mapping[Sender, Tensor]) -> list[tuple[Sender, Tensor]]:
        """Each sender, and `[batch, seq]`, bool: where it is changed.

        Args:
            moved: the same of each sender at all positions.
        """
        found = []
        for sender, positions in zip(self.senders, self.positions, strict=True):
            whole = moved[sender]
            where = whole if positions is None else whole & positions.mask(whole.shape[1])
            found.append((sender, where))
        return found


@attrs.frozen(eq=False)
class SenderChanges:
    """The senders' own changes, with everything between them and a receiver held.

    Args:
        layers: the layers, and the target run.
        given: what senders get.
        members: for each entry its senders, and where each is changed.
        moved: `[entries, batch, seq]`, bool: where that is another activation than was there.
    """

    layers: Layers
    given: Given
    members: Sequence[Sequence[tuple[Sender, Tensor]]]
    moved: Tensor

    @classmethod
    def of(cls, layers: Layers, given: Given, entries: Sequence[Entry]) -> SenderChanges:
        """The changes of some entries."""
        senders = dict.fromkeys(sender for entry in entries for sender in entry.senders)
        known = {sender: _moved(layers, given, sender) for sender in senders}
        members = [entry.members(known) for entry in entries]
        moved = torch.stack([torch.stack([own for _, own in each]).any(0) for each in members])
        return cls(layers, given, members, moved)

    def at(self, entries: Integers, prompts: Tensor, step: int) -> Tensor:
        """See `Changes.at`: that of the senders which have written by then."""
        target = self.layers.target
        total = torch.zeros_like(target.streams[0][prompts])
        for layer in range(-1, (step + 1) // 2):
            self._add(total, entries, prompts, layer, step)
        return total

    def _add(
        self, total: Tensor, entries: Integers, prompts: Tensor, layer: int, step: int
    ) -> None:
        """Add what the senders of a layer change, in place; layer -1 is the input."""
        by_kind: dict[str, list[_InRow]] = {}
        for row, number in enumerate(entries.tolist()):
            for sender, where in self.members[number]:
                own = -1 if sender.kind == "input" else sender.layer
                if own == layer and written(sender) <= step:
                    by_kind.setdefault(sender.kind, []).append((row, sender, where))
        if "input" in by_kind:
            stream = self.layers.target.streams[0]
            self._add_difference(total, prompts, by_kind["input"], self.given.stream, stream, 1.0)
        if "head" in by_kind:
            self._add_heads(total, prompts, by_kind["head"], layer)
        if "mlp" in by_kind:
            own, factor = self.layers.target.mlp[layer], self.layers.mlp[layer]
            self._add_difference(total, prompts, by_kind["mlp"], self.given.mlp[layer], own, factor)

    def _add_difference(
        self,
        total: Tensor,
        prompts: Tensor,
        members: list[_InRow],
        given: Tensor,
        there: Tensor,
        factor: float,
    ) -> None:
        rows = torch.tensor([row for row, _, _ in members], device="cpu")
        some = prompts[rows]
        difference = factor * (_of(given, some) - there[some])
        total[rows] += difference * self._where(members, prompts)[..., None].to(difference)

    def _add_heads(
        self,
        total: Tensor,
        prompts: Tensor,
        members: list[_InRow],
        layer: int,
    ) -> None:
        there = self.layers.target.heads[layer]
        columns = self.layers.places[layer]["o"].columns(there.shape[-1])
        assert columns is not None
        where = self._where(members, prompts)
        rows = sorted({row for row, _, _ in members})
        index = torch.tensor(rows, device="cpu")
        some = prompts[index]
        heads, given = there[some].clone(), _of(self.given.heads[layer], some)
        for number, (row, sender, _) in enumerate(members):
            at = rows.index(row)
            assert sender.head is not None
            own = columns[sender.head].to(heads.device)
            here = where[number].nonzero().flatten().to(heads.device)[:, None]
            heads[at, here, own] = given[at, here, own].to(heads)
        changed = self.layers.added_by_heads(layer, heads, some)
        unchanged = self.layers.attn[layer] * self.layers.target.attn[layer][some]
        # Elsewhere what is added is the target run's own, to the last bit.
        put = torch.zeros(len(rows), where.shape[1], dtype=torch.bool, device="cpu")
        for number, (row, _, _) in enumerate(members):
            put[rows.index(row)] |= where[number]
        total[index] += (changed - unchanged) * put[..., None].to(changed)

    @staticmethod
    def _where(members: list[_InRow], prompts: Tensor) -> Tensor:
        """`[members, seq]`, bool: where each is changed in its prompt."""
        return torch.stack([where[int(prompts[row])] for row, _, where in members])


def written(sender: Sender) -> int:
    """The step from which on the stream holds what a sender writes; see `Nodes.written`."""
    return 0 if sender.kind == "input" else 2 * sender.layer + (1 if sender.kind == "head" else 2)


def _of(given: Tensor, prompts: Tensor) -> Tensor:
    return given[prompts if len(given) > 1 else torch.zeros_like(prompts)]


def _moved(layers: Layers, given: Given, sender: Sender) -> Tensor:
    """`[batch, seq]`, bool: where a sender gets another activation than it had, bitwise."""
    target = layers.target
    if sender.kind == "input":
        own, other = target.streams[0], given.stream
    elif sender.kind == "mlp":
        own, other = target.mlp[sender.layer], given.mlp[sender.layer]
    else:
        own, other = target.heads[sender.layer], given.heads[sender.layer]
        columns = layers.places[sender.layer]["o"].columns(own.shape[-1])
        assert columns is not None
        assert sender.head is not None
        chosen = columns[sender.head].to(own.device)
        own, other = own[..., chosen], other[..., chosen]
    moved = (own != other.to(own)).any(-1).cpu()
    return moved & given.mask.bool().cpu()
