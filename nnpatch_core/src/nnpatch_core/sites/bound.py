"""Sites found in a model, as cells of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from torch import nn

from nnpatch_core._arrays import Integers
from nnpatch_core._models import module_of
from nnpatch_core.adapters import ModelAPI, Place, place_of
from nnpatch_core.seq_pos import Positions, PromptBatch, are_per_prompt, present_in
from nnpatch_core.site import AnySite, Site
from nnpatch_core.sites.grid import GridSites
from nnpatch_core.spaces import Space
from nnpatch_core.tracing import Cells, Numbers, Patches, ends_of


def bind_cells(
    cells: Iterable[AnySite], nnmodel: Any, seq_len: int, prompts: PromptBatch | None = None
) -> Patches:
    """Sites found in a model, for prompts of `seq_len` tokens: each place is looked up once.

    Args:
        cells: what is patched, each alone.
        nnmodel: the model, wrapped by nnsight.
        seq_len: tokens per prompt.
        prompts: the prompts, where they are known.

    Raises:
        PatchingError: one of its kinds, if the model or the prompts lack a site.
    """
    return bind_grids([list(cells)], nnmodel, seq_len, prompts)


def bind_grids(
    grids: Sequence[Sequence[AnySite]],
    nnmodel: Any,
    seq_len: int,
    prompts: PromptBatch | None = None,
) -> Patches:
    """The sites of several grids found in a model, one grid after another; see `bind_cells`."""
    model = module_of(nnmodel)
    found = _positions_of(_representatives(grids), seq_len, prompts)
    known = _Known(model, found)
    # The numbers first: they say which places, positions and spaces there are.
    parts = [known.numbers(grid) for grid in grids]
    named: Sequence[AnySite] = grids[0] if len(grids) == 1 else _Chained(grids)
    cells = Cells(
        tuple(known.places),
        tuple(known.positions),
        tuple(known.spaces),
        Numbers.joined([numbers for numbers, _ in parts]),
        ends_of(np.concatenate([counts for _, counts in parts])),
        named,
    )
    common = None
    if prompts is not None and prompts.source is not None:
        common = (prompts.source.mask.cpu() * prompts.target.mask.cpu()).bool()
    shifted = any(each.source is not None for each in found.values())
    return Patches(nnmodel, cells, common if shifted else None)


class _Known:
    """Places, positions and spaces, each with a number by which the sites of cells name it."""

    def __init__(self, model: nn.Module, positions: Mapping[_Named, Positions]) -> None:
        self.places: list[Place] = []
        self.positions: list[Positions] = []
        self.spaces: list[Space | None] = []
        self._model = model
        self._found = positions
        self._place_of: dict[tuple[int, int, str], int] = {}
        self._position_of: dict[int, int] = {}
        self._space_of: dict[int, int] = {}

    def numbers(self, grid: Sequence[AnySite]) -> tuple[Numbers, Integers]:
        """The sites of a grid by number, and how many each of its cells has."""
        if isinstance(grid, GridSites):
            return self._of_arrays(grid), np.ones(len(grid), dtype=np.int64)
        # Cells may share a site, as edges share a receiver.
        known: dict[int, tuple[int, int, int, int]] = {}
        rows: list[tuple[int, int, int, int]] = []
        for cell in grid:
            own = []
            for site in cell.sites:
                if id(site) not in known:
                    known[id(site)] = self._row(site)
                own.append(known[id(site)])
            if len(own) > 1:
                own.sort(key=self._reached)
            rows += own
        columns = np.array(rows, dtype=np.int32).reshape(-1, 4).T.copy()
        return Numbers(*columns), np.array([len(cell.sites) for cell in grid], dtype=np.int64)

    def _of_arrays(self, grid: GridSites) -> Numbers:
        layers, which = np.unique(grid.layer, return_inverse=True)
        place = [self._place(grid.api, layer, grid.component) for layer in layers.tolist()]
        space = [self._space(grid.spaces.get(layer)) for layer in layers.tolist()]
        at = np.full(len(grid.places), -1, dtype=np.int32)
        for number, site in grid.first_of_each():
            at[number] = self._position(site)
        return Numbers(
            np.array(place, dtype=np.int32)[which],
            grid.head,
            at[grid.at],
            np.array(space, dtype=np.int32)[which],
        )

    def _row(self, site: Site) -> tuple[int, int, int, int]:
        return (
            self._place(site.api, site.layer, site.component),
            -1 if site.head is None else site.head,
            self._position(site),
            self._space(site.subspace),
        )

    def _reached(self, row: tuple[int, int, int, int]) -> tuple[int, int]:
        place = self.places[row[0]]
        return place.layer, place.order

    def _place(self, api: ModelAPI, layer: int, component: str) -> int:
        at = (id(api), layer, component)
        if at not in self._place_of:
            self._place_of[at] = len(self.places)
            self.places.append(place_of(api, self._model, layer, component))
        return self._place_of[at]

    def _position(self, site: Site) -> int:
        found = self._found[id(site.seq_pos), id(site.source_seq_pos)]
        return _number(self._position_of, self.positions, found)

    def _space(self, space: Space | None) -> int:
        return _number(self._space_of, self.spaces, space)


_Any = TypeVar("_Any")


def _number(numbers: dict[int, int], values: list[_Any], value: _Any) -> int:
    """The number of a value, by its identity."""
    number = numbers.setdefault(id(value), len(values))
    if number == len(values):
        values.append(value)
    return number


class _Chained(Sequence[AnySite]):
    """The sites of several grids, one grid after another."""

    def __init__(self, parts: Sequence[Sequence[AnySite]]) -> None:
        self._parts = parts
        self._ends = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[AnySite]:
        return chain.from_iterable(self._parts)

    @overload
    def __getitem__(self, index: int) -> AnySite: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[AnySite]: ...

    def __getitem__(self, index: int | slice) -> AnySite | Sequence[AnySite]:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]
        part = int(np.searchsorted(self._ends, number, side="right")) - 1
        return self._parts[part][number - int(self._ends[part])]

    def take(self, index: Integers) -> Sequence[AnySite]:
        """Some of the sites, by ascending number."""
        edges = np.searchsorted(index, self._ends)
        parts: list[Sequence[AnySite]] = []
        for part, begin, first, last in zip(
            self._parts, self._ends[:-1], edges[:-1], edges[1:], strict=True
        ):
            own = index[first:last] - begin
            parts.append(
                part.take(own) if isinstance(part, GridSites) else [part[n] for n in own.tolist()]
            )
        return _Chained(parts)


def _representatives(grids: Iterable[Sequence[AnySite]]) -> Iterator[Site]:
    """Sites that have all positions which there are."""
    for grid in grids:
        if isinstance(grid, GridSites):
            yield from (site for _, site in grid.first_of_each())
        else:
            yield from (site for cell in grid for site in cell.sites)


#: The identities of a site's positions and of their sources.
_Named: TypeAlias = tuple[int, int]


def _positions_of(
    given: Iterable[Site], seq_len: int, prompts: PromptBatch | None
) -> dict[_Named, Positions]:
    """The positions of sites; equal ones are one, but for those of each prompt, which are long."""
    # By identity first: the sites of a grid share theirs, and to compare them costs more.
    sites = {(id(site.seq_pos), id(site.source_seq_pos)): site for site in given}
    known: dict[object, Positions] = {}
    found: dict[_Named, Positions] = {}
    for named, site in sites.items():
        own = are_per_prompt(site.seq_pos)
        key: object = named if own else (site.seq_pos, site.source_seq_pos)
        if key not in known:
            known[key] = site.positions(seq_len, prompts)
        found[named] = known[key]
    if prompts is None or prompts.source is None:
        return found
    if all(positions.source is None for positions in known.values()):
        return found
    # Where some take their values from elsewhere, each knows where both prompts have a token.
    explicit = {id(each): _explicit(each, prompts) for each in known.values()}
    return {named: explicit[id(positions)] for named, positions in found.items()}


def _explicit(positions: Positions, prompts: PromptBatch) -> Positions:
    """The same positions, with sources that stand there."""
    if positions.source is not None:
        return positions
    if len(positions.at) > 1:
        return Positions(positions.at, positions.at)
    return present_in(prompts, positions.groups[0])
