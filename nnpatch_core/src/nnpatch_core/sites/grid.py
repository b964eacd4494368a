"""The cells of one site name: their places in a result, and their sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import attrs
import numpy as np

from nnpatch_core._arrays import Integers
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.seq_pos import CellPositions
from nnpatch_core.site import AnySite, Site
from nnpatch_core.spaces import Space


@attrs.frozen
class Axis:
    """One axis of a result: its name and the label of each place on it."""

    name: str
    labels: tuple[int | str, ...]


def _places(index: Any) -> Integers:
    """`[cells, axes]`."""
    places: Integers = np.asarray(index, dtype=np.int64)
    return places if places.ndim == 2 else places.reshape(len(places), -1)


@attrs.frozen(eq=False)
class Grid:
    """The cells of one site name: each a site, and its place in the result.

    Args:
        axes: the result's axes.
        index: `[cells, axes]`: for each cell its place; no two cells share one.
        sites: for each cell what is patched.
    """

    axes: tuple[Axis, ...]
    index: Integers = attrs.field(converter=_places)
    sites: Sequence[AnySite]

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's shape."""
        return tuple(len(axis.labels) for axis in self.axes)

    def take(self, index: Integers) -> Grid:
        """Some of the cells, by number."""
        sites = self.sites
        some = sites.take(index) if isinstance(sites, GridSites) else [sites[n] for n in index]
        return Grid(self.axes, self.index[index], some)


@attrs.frozen(eq=False)
class GridSites(Sequence[Site]):
    """The sites of a grid by number: each is made when it is asked for.

    Args:
        api: the adapter.
        component: the component's own name.
        name: the name by which it was asked for.
        layer: `[cells]`.
        head: `[cells]`; -1 is none.
        at: `[cells]`: which of `places`.
        places: the positions that are swept.
        spaces: for each layer the part of its activations that is patched; a layer without one is
            patched as a whole.
    """

    api: ModelAPI
    component: str
    name: str
    layer: Integers
    head: Integers
    at: Integers
    places: tuple[CellPositions, ...]
    spaces: Mapping[int, Space]

    def __len__(self) -> int:
        return len(self.layer)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> GridSites: ...

    def __getitem__(self, index: int | slice) -> Site | GridSites:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return self._site(*(int(each[index]) for each in (self.layer, self.head, self.at)))

    def __iter__(self) -> Iterator[Site]:
        columns = (each.tolist() for each in (self.layer, self.head, self.at))
        return (self._site(*numbers) for numbers in zip(*columns, strict=True))

    def take(self, index: Integers) -> GridSites:
        """Some of the sites, by number."""
        return attrs.evolve(self, layer=self.layer[index], head=self.head[index], at=self.at[index])

    def first_of_each(self) -> Iterator[tuple[int, Site]]:
        """A site at each of `places`, with the number of these."""
        numbers, first = np.unique(self.at, return_index=True)
        pairs = zip(numbers.tolist(), first.tolist(), strict=True)
        return ((number, self[cell]) for number, cell in pairs)

    def _site(self, layer: int, head: int, at: int) -> Site:
        place = self.places[at]
        return Site(
            self.api,
            self.component,
            layer,
            None if head < 0 else head,
            place.seq_pos,
            source_seq_pos=place.source,
            subspace=self.spaces.get(layer),
            asked=self.name,
            where=place.name,
        )
