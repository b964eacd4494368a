"""The cells of a sweep, found in a model: arrays of numbers, from which each cell is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import attrs
import numpy as np
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.adapters import Place
from nnpatch_core.seq_pos import Positions
from nnpatch_core.spaces import Limit, Space


def columns_of(place: Place, head: int | None, width: int) -> Tensor | None:
    """`[columns]` of a head, or of the component if `head` is None; None is all of them."""
    columns = place.columns(width)
    if columns is None:
        return None
    return (columns if head is None else columns[head]).flatten()


@attrs.frozen(eq=False)
class BoundSite:
    """A site found in a model, for prompts of one width.

    Args:
        place: where the whole activation is.
        head: one head, or None for the whole component.
        positions: the token positions.
        space: the part of the activation that is patched; None is all of it.
    """

    place: Place
    head: int | None
    positions: Positions
    space: Space | None = None

    @property
    def limit(self) -> Limit | None:
        """To which part of the activation it is limited."""
        return None if self.space is None else Limit(self.space, self.head is not None)

    def columns(self, width: int) -> Tensor | None:
        """`[columns]` of its head or of its component; None is all of the activation."""
        return columns_of(self.place, self.head, width)


@attrs.frozen(eq=False)
class Cell:
    """The sites that one forward patches together, in the order in which it reaches them.

    Args:
        sites: the sites.
        named: the user's `Site` or `MultiSite`.
    """

    sites: tuple[BoundSite, ...]
    named: Any

    @property
    def label(self) -> str:
        """A short name for a table or a picture."""
        return str(self.named.label)


@attrs.frozen(eq=False)
class Numbers:
    """Sites by number, `[sites]` each: which place, head (-1 is none), positions and space.

    A million of them take some megabytes, where a million objects take more than a gigabyte.
    """

    place: Integers
    head: Integers
    positions: Integers
    space: Integers

    def __len__(self) -> int:
        return len(self.place)

    def take(self, index: Integers | slice) -> Numbers:
        """Some of the sites."""
        return Numbers(*(each[index] for each in self._columns))

    @classmethod
    def joined(cls, parts: Sequence[Numbers]) -> Numbers:
        """The sites of several, one after another."""
        return cls(*map(np.concatenate, zip(*(part._columns for part in parts), strict=True)))

    @property
    def _columns(self) -> tuple[Integers, Integers, Integers, Integers]:
        return self.place, self.head, self.positions, self.space


@attrs.frozen(eq=False)
class Cells(Sequence[Cell]):
    """Cells, each made when it is asked for.

    Args:
        places: the places that `sites` number.
        positions: the positions that `sites` number.
        spaces: the parts of activations that `sites` number; None is all of it.
        sites: the sites of all cells, one cell after another.
        ends: `[cells + 1]`: cell `n` has the sites from `ends[n]` to `ends[n + 1]`.
        named: for each cell the user's `Site` or `MultiSite`.
    """

    places: tuple[Place, ...]
    positions: tuple[Positions, ...]
    spaces: tuple[Space | None, ...]
    sites: Numbers
    ends: Integers
    named: Sequence[Any]

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Cells:
        """Cells that are there already."""
        if isinstance(cells, cls):
            return cells
        given = list(cells)
        places: dict[int, tuple[int, Place]] = {}
        positions: dict[int, tuple[int, Positions]] = {}
        spaces: dict[int, tuple[int, Space | None]] = {}
        rows = [
            (
                places.setdefault(id(site.place), (len(places), site.place))[0],
                -1 if site.head is None else site.head,
                positions.setdefault(id(site.positions), (len(positions), site.positions))[0],
                spaces.setdefault(id(site.space), (len(spaces), site.space))[0],
            )
            for cell in given
            for site in cell.sites
        ]
        numbers = np.array(rows, dtype=np.int32).reshape(-1, 4).T.copy()
        return cls(
            tuple(each for _, each in places.values()),
            tuple(each for _, each in positions.values()),
            tuple(each for _, each in spaces.values()),
            Numbers(*numbers),
            ends_of([len(cell.sites) for cell in given]),
            [cell.named for cell in given],
        )

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, index: int) -> Cell: ...

    @overload
    def __getitem__(self, index: slice) -> Cells: ...

    def __getitem__(self, index: int | slice) -> Cell | Cells:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]
        first, last = self.ends[number : number + 2].tolist()
        return Cell(tuple(self.bound(site) for site in range(first, last)), self.named[number])

    def __iter__(self) -> Iterator[Cell]:
        return (self[number] for number in range(len(self)))

    @property
    def alone(self) -> bool:
        """Whether each cell has one site."""
        return len(self.sites) == len(self) and bool((np.diff(self.ends) == 1).all())

    @cached_property
    def limits(self) -> tuple[tuple[Limit | None, Limit | None], ...]:
        """For each of `spaces` the limit of a whole component, and that of a head."""
        return tuple(
            (None, None) if space is None else (Limit(space, False), Limit(space, True))
            for space in self.spaces
        )

    def limit(self, space: int, head: int) -> Limit | None:
        """The limit of a site, by its numbers."""
        return self.limits[space][head >= 0]

    def bound(self, number: int) -> BoundSite:
        """A site, by its number among those of all cells."""
        sites = self.sites
        head = int(sites.head[number])
        return BoundSite(
            self.places[sites.place[number]],
            None if head < 0 else head,
            self.positions[sites.positions[number]],
            self.spaces[sites.space[number]],
        )

    def cell_of_sites(self) -> Integers:
        """`[sites]`: the cell of each."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends))

    def any_site(self, flags: Booleans) -> Booleans:
        """`[sites, ...]` as `[cells, ...]`: whether any site of a cell has a flag."""
        if self.alone:
            return flags
        found: Booleans = np.logical_or.reduceat(flags, self.ends[:-1], axis=0)
        return found

    def take(self, index: Integers) -> Cells:
        """Some of the cells, by number."""
        named = self.named
        some = named.take(index) if hasattr(named, "take") else [named[n] for n in index.tolist()]
        counts = np.diff(self.ends)[index]
        which = index if self.alone else within(self.ends[:-1][index], counts)
        return attrs.evolve(self, sites=self.sites.take(which), ends=ends_of(counts), named=some)

    def moved(self, positions: Mapping[int, Positions]) -> Cells:
        """The same cells at other positions, given by the identity of their own."""
        return attrs.evolve(
            self, positions=tuple(positions.get(id(each), each) for each in self.positions)
        )

    def used(self, name: str) -> list[int]:
        """Which of `places`, `positions` or `spaces` some site has, in the order of the sites."""
        numbers, first = np.unique(getattr(self.sites, name), return_index=True)
        found: list[int] = numbers[np.argsort(first)].tolist()
        return found


def ends_of(counts: Sequence[int] | Integers) -> Integers:
    """`[cells + 1]`: where the sites of each cell begin, and where the last end."""
    ends = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=ends[1:])
    return ends


def within(starts: Integers, counts: Integers) -> Integers:
    """The numbers from each start on, so many of each, one after another.

    Examples:
        >>> import numpy as np
        >>> within(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    numbers: Integers = np.repeat(starts - ends_of(counts)[:-1], counts) + np.arange(counts.sum())
    return numbers
