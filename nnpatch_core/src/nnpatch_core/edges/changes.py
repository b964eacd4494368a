"""The changes of senders in the residual stream, where their activations are another run's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core.edges.layers import Layers
from nnpatch_core.edges.nodes import Sender
from nnpatch_core.seq_pos import NONE, Positions, spread

#: A sender of an entry, and `[batch, seq]`: from where in the other run each token gets another
#: activation, -1 where it keeps its own.
Member: TypeAlias = "tuple[Sender, Tensor]"
#: The same in a row.
_InRow: TypeAlias = "tuple[int, Sender, Tensor]"
#: At a step, as `Nodes.read` counts them: `[rows]`, the number of each row's entry, and `[rows]`,
#: that of its prompt.
Rows: TypeAlias = "tuple[Integers, Tensor]"


class Changes(Protocol):
    """The changes in the stream of the entries of a sweep, each some senders."""

    @property
    def moved(self) -> Tensor:
        """`[entries, batch, seq]`, bool: where an entry may change anything."""
        ...

    def along(self, wanted: Mapping[int, Rows]) -> Iterator[tuple[int, Tensor]]:
        """The additions to the stream at some steps, from the lowest up.

        Args:
            wanted: for each step the rows that are asked for.

        Returns:
            Each step, and `[rows, seq, width]`.
        """
        ...


class Writes(Protocol):
    """The writing to the stream of the entries of a sweep, each sender once."""

    @property
    def moved(self) -> Tensor:
        """`[entries, batch, seq]`, bool: where an entry may write anything else."""
        ...

    def senders(self, entry: int) -> frozenset[Sender]:
        """The senders of an entry."""
        ...

    def written(
        self, entries: Integers, prompts: Tensor, until: Integers
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The writing at each step, from the lowest up.

        Args:
            entries: `[rows]`, the number of each row's entry.
            prompts: `[rows]`, the number of its prompt.
            until: `[rows]`, the last step that is asked for.

        Returns:
            The step; `[some]`, int64 on the CPU, which rows have something written then, each once
            at a time; and `[some, seq, width]`, what is added to their stream.
        """
        ...


@attrs.frozen(eq=False)
class Climb:
    """The rows of several steps as one, for whoever goes up the layers once.

    Args:
        entries: `[rows]`, the number of each row's entry.
        prompts: `[rows]`, the number of its prompt.
        until: `[rows]`, the last step at which it is asked for.
        index: for each step, from the lowest up, which rows it asks for.
    """

    entries: Integers
    prompts: Tensor
    until: Integers
    index: Mapping[int, Tensor]

    @classmethod
    def of(cls, wanted: Mapping[int, Rows]) -> Climb:
        """The rows that are wanted at any of some steps."""
        steps = sorted(wanted)
        pairs = [np.stack([wanted[step][0], wanted[step][1].numpy()], 1) for step in steps]
        rows, places = np.unique(np.concatenate(pairs), axis=0, return_inverse=True)
        ends = np.cumsum([len(each) for each in pairs])[:-1]
        index = dict(zip(steps, np.split(places.reshape(-1), ends), strict=True))
        until = np.zeros(len(rows), dtype=np.int64)
        for step in steps:
            until[index[step]] = step
        found = {step: torch.from_numpy(each.copy()) for step, each in index.items()}
        return cls(rows[:, 0].copy(), torch.from_numpy(rows[:, 1].copy()), until, found)


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
        """The same in some of the prompts, which may stand several times after one another."""
        return Entry(self.senders, positions_of(self.positions, rows))


def positions_of(
    positions: Sequence[Positions | None], rows: slice
) -> tuple[Positions | None, ...]:
    """Positions in some of the prompts, which may stand several times after one another."""
    index = torch.arange(rows.start, rows.stop, device="cpu")
    return tuple(None if each is None else each.rows(index % len(each.at)) for each in positions)


def told_of(positions: Positions | None) -> list[int]:
    """Positions as numbers that are others for other positions."""
    if positions is None:
        return [-1]
    parts = [each for each in (positions.at, positions.source) if each is not None]
    return [number for part in parts for number in (*part.shape, *part.flatten().tolist())]


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
        known: dict[Sender, Tensor] = {}
        members = [_members(layers, given, entry, known) for entry in entries]
        moved = torch.stack(
            [torch.stack([taken for _, taken in each]).amax(0) != NONE for each in members]
        )
        return cls(layers, given, members, moved)

    def senders(self, entry: int) -> frozenset[Sender]:
        """See `Writes.senders`."""
        return frozenset(sender for sender, _ in self.members[entry])

    def at(self, entries: Integers, prompts: Tensor, step: int) -> Tensor:
        """The addition to the stream at one step, `[rows, seq, width]`; see `along`."""
        ((_, change),) = self.along({step: (entries, prompts)})
        return change

    def along(self, wanted: Mapping[int, Rows]) -> Iterator[tuple[int, Tensor]]:
        """See `Changes.along`: the senders' own alone, of those which have written by then."""
        yield from added_up(self.layers, self, wanted)

    def written(
        self, entries: Integers, prompts: Tensor, until: Integers
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """See `Writes.written`."""
        by_step: dict[int, list[_InRow]] = {}
        for row, (number, last) in enumerate(zip(entries.tolist(), until.tolist(), strict=True)):
            for sender, taken in self.members[number]:
                if (step := written(sender)) <= last:
                    by_step.setdefault(step, []).append((row, sender, taken))
        target, given = self.layers.target, self.given
        for step in sorted(by_step):
            members, layer = by_step[step], by_step[step][0][1].layer
            kind = members[0][1].kind
            if kind == "head":
                yield step, *self._of_heads(prompts, members, layer)
            elif kind == "mlp":
                other, factor = given.mlp[layer], self.layers.mlp[layer]
                yield step, *self._difference(prompts, members, other, target.mlp[layer], factor)
            else:
                yield (
                    step,
                    *self._difference(prompts, members, given.stream, target.streams[0], 1.0),
                )

    def _difference(
        self,
        prompts: Tensor,
        members: list[_InRow],
        given: Tensor,
        there: Tensor,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        rows, taken = self._taken(members, prompts)
        some = prompts[rows]
        difference = factor * (_of(given, some, taken) - there[some])
        return rows, _where(taken != NONE, difference)

    def _of_heads(
        self, prompts: Tensor, members: list[_InRow], layer: int
    ) -> tuple[Tensor, Tensor]:
        there = self.layers.target.heads[layer]
        columns = self.layers.places[layer]["o"].columns(there.shape[-1])
        assert columns is not None
        every, taken = self._taken(members, prompts)
        rows, at = torch.unique(every, return_inverse=True)
        some = prompts[rows]
        heads = there[some].clone()
        # Elsewhere what is added is the target run's own, to the last bit.
        put = torch.zeros(len(rows), taken.shape[1], dtype=torch.bool, device="cpu")
        given = _of(self.given.heads[layer], prompts[every], taken)
        for number, (_, sender, _) in enumerate(members):
            assert sender.head is not None
            own, here = columns[sender.head].to(heads.device), taken[number] != NONE
            index = here.nonzero().flatten().to(heads.device)[:, None]
            heads[int(at[number]), index, own] = given[number, index, own].to(heads)
            put[at[number]] |= here
        return rows, _where(put, self.layers.changed_by_heads(layer, heads, some))

    @staticmethod
    def _taken(members: list[_InRow], prompts: Tensor) -> tuple[Tensor, Tensor]:
        """`[members]`, the row of each; `[members, seq]`, where its activations come from."""
        rows = torch.tensor([row for row, _, _ in members], device="cpu")
        taken = [each[prompt] for (_, _, each), prompt in zip(members, prompts[rows], strict=True)]
        return rows, torch.stack(taken)


def added_up(
    layers: Layers, writes: Writes, wanted: Mapping[int, Rows]
) -> Iterator[tuple[int, Tensor]]:
    """The writing of senders by some steps, and nothing else; see `Changes.along`."""
    if not wanted:
        return
    climb = Climb.of(wanted)
    total = torch.zeros_like(layers.target.streams[0][climb.prompts])
    left = list(climb.index)
    for step, rows, change in writes.written(climb.entries, climb.prompts, climb.until):
        while left[0] < step:
            yield left[0], at_step(layers, left[0], total[climb.index[left.pop(0)]])
        total = total.to(change.device)
        total[rows] += change
    for each in left:
        yield each, at_step(layers, each, total[climb.index[each]])


def at_step(layers: Layers, step: int, change: Tensor) -> Tensor:
    """A change on the device of the layer that reads the stream at a step."""
    return change.to(layers.target.streams[step // 2].device)


def written(sender: Sender) -> int:
    """The step from which on the stream holds what a sender writes; see `Nodes.written`."""
    return sender.step


def _members(
    layers: Layers, given: Given, entry: Entry, known: dict[Sender, Tensor]
) -> list[Member]:
    """The senders of an entry, each once; `known` are those that are changed everywhere."""
    found: dict[Sender, Tensor] = {}
    for sender, positions in zip(entry.senders, entry.positions, strict=True):
        if sender not in known:
            known[sender] = _changed(layers, given, sender, _own(given))
        own = known[sender]
        if positions is not None and positions.source is None:
            own = own.where(positions.mask(own.shape[1]), NONE)
        elif positions is not None:
            taken = spread(positions.at, own.shape[1], positions.source)
            own = _changed(layers, given, sender, taken.expand_as(own))
        found[sender] = own if sender not in found else own.where(own != NONE, found[sender])
    return list(found.items())


def _own(given: Given) -> Tensor:
    """`[batch, seq]`: each token's own position."""
    return torch.arange(given.mask.shape[1], device="cpu").expand_as(given.mask)


def _where(here: Tensor, change: Tensor) -> Tensor:
    """A change, and 0 elsewhere: at padding a model may give what is no number."""
    return change.masked_fill(~here.to(change.device)[..., None], 0)


def _of(given: Tensor, prompts: Tensor, taken: Tensor) -> Tensor:
    """`[rows, seq, any]`: the other run's activations, each from where it is taken."""
    rows = given[prompts if len(given) > 1 else torch.zeros_like(prompts)]
    own = torch.arange(taken.shape[1], device="cpu")
    if bool(((taken == NONE) | (taken == own)).all()):
        return rows
    index = torch.arange(len(rows), device="cpu")[:, None]
    return rows[index, taken.clamp(min=0)]


def _changed(layers: Layers, given: Given, sender: Sender, taken: Tensor) -> Tensor:
    """`[batch, seq]`: from where tokens get another activation than they had, bitwise; else -1.

    `taken` is from where they get one.
    """
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
    other = _of(other, torch.arange(len(own), device="cpu"), taken)
    moved = (own != other.to(own)).any(-1).cpu() & given.mask.bool().cpu()
    return taken.where(moved, NONE)
