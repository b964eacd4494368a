"""What a sweep has to run: for each cell and prompt whether, and from which token and layer on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Component, row_of, table_of
from nnpatch_core.seq_pos import Group
from nnpatch_core.site import AnySite, Location, Site, execution_order

#: Adapter, component and layer: the sites there differ in heads and positions only.
Place: TypeAlias = tuple[str, str, int]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Booleans: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

#: A layer has three stages: its input, what is inside, its output.
STAGES = 3
INPUT, INSIDE, OUTPUT = range(STAGES)


def place_of(site: Site) -> Place:
    """Where a site is, whatever its head and positions."""
    return (site.api.name, site.component, site.layer)


def one_each_place(sites: Iterable[Site]) -> list[Site]:
    """One site for each place of each adapter, two of which may share a name."""
    return list({(id(site.api), site.component, site.layer): site for site in sites}.values())


def stage_of(layer: int, component: Component) -> int:
    """When a forward reaches a component: three stages a layer, from 0."""
    if component.module:
        return STAGES * layer + INSIDE
    return STAGES * layer + (INPUT if component.side == "input" else OUTPUT)


def first_layer(stage: Integers) -> Integers:
    """The first layer that runs for what enters at a stage; the number of layers if none does."""
    return (stage + 1) // STAGES


@attrs.frozen(eq=False)
class Rows:
    """Patched runs, one row each: a cell patched into a prompt.

    Args:
        cell: `[rows]`, the cell's number.
        prompt: `[rows]`, the prompt's number.
        start: `[rows]`, the leftmost position that the patch changes.
        stage: `[rows]`, where the patch comes in; see `stage_of`.
    """

    cell: Integers
    prompt: Integers
    start: Integers
    stage: Integers

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, index: Integers | Booleans | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.cell[index], self.prompt[index], self.start[index], self.stage[index])

    def then(self, other: Rows) -> Rows:
        """These rows, and after them others."""
        pairs = zip(attrs.astuple(self), attrs.astuple(other), strict=True)
        return Rows(*(np.concatenate(pair) for pair in pairs))


@attrs.frozen(eq=False)
class Stop:
    """One site of a cell, with what a forward must know of it.

    Args:
        site: the site.
        stage: when a forward reaches it; see `stage_of`.
        order: its component's place in the layer's table.
        turn: how many sites of its cell were at the same activation before it.
        row: where the activation is.
        location: the same, so that sites which share it are known.
        group: its positions.
    """

    site: Site
    stage: int
    order: int
    turn: int
    row: Component
    location: Location
    group: Group


def stops_of(cells: Sequence[AnySite], nnmodel: Any, seq_len: int) -> list[list[Stop]]:
    """Each cell's sites, in the order in which a forward reaches them."""
    model = module_of(nnmodel)
    known: dict[Place, tuple[int, int, Component, Location]] = {}
    found = []
    for cell in cells:
        stops: list[Stop] = []
        for site in execution_order(cell.sites, nnmodel):
            place = place_of(site)
            if place not in known:
                row = row_of(site.api, model, site.layer, site.component)
                order = list(table_of(site.api, model, site.layer)).index(site.component)
                known[place] = (stage_of(site.layer, row), order, row, site.location(nnmodel))
            stage, order, row, location = known[place]
            turn = sum(stop.location == location for stop in stops)
            stops.append(Stop(site, stage, order, turn, row, location, site.group(seq_len)))
        found.append(stops)
    return found


def rows_of(
    cells: Sequence[Sequence[Stop]], batch: int, seq_len: int, changed: Mapping[Place, Booleans]
) -> Rows:
    """The rows of a sweep; a cell that changes nothing in a prompt has none there.

    What stands left of a patch, or below it, is the target run's own: so a row begins at the first
    token, and at the first site, where what is put differs from what was there.

    Args:
        cells: the sites of each cell, by `stops_of`.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        changed: for each place `[batch, seq, heads or 1]`: where patching puts something else.
    """
    everyone = np.arange(batch)
    found: list[tuple[Integers, Integers, Integers, Integers]] = []
    for number, stops in enumerate(cells):
        start = np.full(batch, seq_len)
        stage = np.full(batch, -1)
        for stop in stops:
            here: Booleans = np.take(changed[place_of(stop.site)], stop.group, axis=1)
            head = stop.site.head
            differs = np.any(here, axis=-1) if head is None else np.take(here, head, axis=-1)
            touched = np.any(differs, axis=1)
            first = np.asarray(stop.group)[differs.argmax(1)]
            start = np.where(touched, np.minimum(start, first), start)
            stage = np.where(touched & (stage < 0), stop.stage, stage)
        runs = stage >= 0
        prompts = everyone[runs]
        found.append((np.full_like(prompts, number), prompts, start[runs], stage[runs]))
    return Rows(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
