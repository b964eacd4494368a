"""The terms of cells, found by arrays: what objects, one cell after another, say they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import MultiSite, Site, Sites
from nnpatch_core.gradients import Terms, cells_apart, terms_of
from nnpatch_core.sites import bind_grids
from nnpatch_core.spaces import Subspace
from nnpatch_core.testing import tiny_api, tiny_model
from nnpatch_core.tracing import Patches

MODEL, API = tiny_model("llama"), tiny_api()
BATCH, SEQ = 3, 6
SPACE = Subspace(torch.eye(32)[:, :2])


@st.composite
def positions(draw: st.DrawFn) -> dict[str, Any]:
    """None, some for all prompts, or some of each; perhaps with values from elsewhere."""
    kind = draw(st.sampled_from(["all", "some", "each prompt"]))
    if kind == "all":
        return {}
    count = draw(st.integers(1, 3))
    some = st.lists(st.integers(0, SEQ - 1), min_size=count, max_size=count, unique=True)
    rows = draw(st.lists(some, min_size=BATCH, max_size=BATCH)) if kind == "each prompt" else None
    at: Any = rows or draw(some)
    if not draw(st.booleans()):
        return {"seq_pos": at}
    return {"seq_pos": at, "source_seq_pos": [draw(some) for _ in at] if rows else draw(some)}


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Few places, so that several are at one."""
    name = draw(st.sampled_from(["resid", "q", "k"]))
    heads = {"q": 4, "k": 2}.get(name, 0)
    head = draw(st.none() | st.integers(0, heads - 1)) if heads else None
    limited = {"subspace": SPACE} if not heads and draw(st.booleans()) else {}
    return Site.get_site(API, name, draw(st.integers(0, 1)), head, **draw(positions()), **limited)


CELLS = st.lists(st.lists(sites(), min_size=1, max_size=2), min_size=1, max_size=6)


def told(terms: Terms, patches: Patches, grouped: bool) -> Counter[Any]:
    """Each term of each prompt, as a cell, what it is of, and where."""
    found: Counter[Any] = Counter()
    of = terms.place.location, terms.place.name, id(terms.alignment), terms.limit
    for cell, slot, head in zip(terms.cells, terms.slots, terms.heads, strict=True):
        for prompt in range(BATCH):
            own = int(slot if slot.ndim == 0 else slot[prompt])
            at: Any = own
            if grouped and terms.groups:
                at = id(terms.groups[own])
            if own >= 0:
                found[int(cell), prompt, *of, at, int(head)] += 1
    return found


@given(cells=CELLS, apart=st.booleans(), grouped=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=100)
def test_terms_are_those_of_each_cell(
    cells: list[list[Site]], apart: bool, grouped: bool, data: st.DataObject
) -> None:
    given = [MultiSite(each, name="x") if len(each) > 1 else each[0] for each in cells]
    patches = bind_grids([tuple(given)], MODEL, SEQ)
    wanted = sorted(data.draw(st.sets(st.integers(0, len(cells) - 1), min_size=1)))
    expected: Counter[Any] = Counter()
    order: list[Any] = []
    for number in wanted:
        for site in patches.cells[number].sites:
            where = site.positions
            aligned = patches.apart[where] if apart else patches.alignment(where)
            of = site.place.location, site.place.name, id(aligned), site.limit
            if of not in order:
                order.append(of)
            head = -1 if site.head is None else site.head
            for prompt in range(BATCH):
                by_group = grouped and site.place.name == "k"
                for at in [id(where)] if by_group else where.group(prompt):
                    expected[number, prompt, *of, at, head] += 1
    names = ("k",) if grouped else ()
    every = terms_of(patches, np.array(wanted), names, apart=apart)
    found: Counter[Any] = Counter()
    for terms in every:
        found += told(terms, patches, grouped and terms.place.name == "k")
    assert found == expected
    # In the order in which they are met.
    assert order == [
        (each.place.location, each.place.name, id(each.alignment), each.limit) for each in every
    ]


@given(cells=CELLS)
@settings(deadline=None, max_examples=100)
def test_cells_whose_sites_add_up(cells: list[list[Site]]) -> None:
    given = [MultiSite(each, name="x") if len(each) > 1 else each[0] for each in cells]
    patches = bind_grids([tuple(given)], MODEL, SEQ)
    for cell, apart in zip(patches.cells, cells_apart(patches.cells), strict=True):
        one_place = len({site.place for site in cell.sites}) == 1
        heads = len({site.head is None for site in cell.sites}) == 1
        if len(cell.sites) == 1:
            assert apart
            continue
        one, two = cell.sites
        disjoint = one.head != two.head or not _meet(one, two)
        assert apart == (one_place and heads and disjoint)


def _meet(one: Any, two: Any) -> bool:
    """Whether two sites have a position in common, in some prompt."""
    return any(
        {*one.positions.group(prompt)} & {*two.positions.group(prompt)} for prompt in range(BATCH)
    )


def test_a_grid_is_terms_by_place() -> None:
    grids = Sites(["o", "resid"], seq_pos_type="each").grids(MODEL, API, SEQ)
    patches = bind_grids([grid.sites for grid in grids.values()], MODEL, SEQ)
    every = terms_of(patches, np.arange(len(patches.cells)))
    assert [(each.place.name, each.place.layer) for each in every] == [
        (name, layer) for name in ("o", "resid") for layer in range(3)
    ]
    assert sum(len(each.cells) for each in every) == len(patches.cells)
    assert len({int(cell) for each in every for cell in each.cells}) == len(patches.cells)
