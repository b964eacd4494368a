"""Hypothesis strategies: prompts, and what is patched in them."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import torch
from hypothesis import strategies as st

from nnpatch_core import MultiSite, Site, Sites
from nnpatch_core.spaces import Subspace
from tests.helpers.attribution import Runs
from tests.helpers.oracle import COMPONENTS, Place, random_prompts
from tests.helpers.pairs import LAYERS, LAYOUTS, VARIANTS, Pairs


@st.composite
def pairs_of(draw: st.DrawFn) -> Pairs:
    count, seed = draw(st.integers(1, 4)), draw(st.integers(0, 10_000))
    lengths = draw(st.lists(st.integers(2, 9), min_size=count, max_size=count))
    source = random_prompts(lengths, seed)
    target = []
    for prompt, other in zip(source, random_prompts(lengths, seed + 1), strict=True):
        kind = draw(st.sampled_from(["from here on", "here and there", "other length", "same"]))
        if kind == "from here on":
            here = draw(st.integers(0, len(prompt) - 1))
            target.append(prompt[:here] + other[here:])
        elif kind == "here and there":
            there = draw(st.sets(st.integers(0, len(prompt) - 1), min_size=1))
            pairs = zip(prompt, other, strict=True)
            target.append(tuple(two[at in there] for at, two in enumerate(pairs)))
        elif kind == "other length":
            target += random_prompts([draw(st.integers(2, 9))], seed + 2)
        else:
            target.append(prompt)
    return Pairs(
        draw(st.sampled_from(sorted(VARIANTS))),
        source,
        target,
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 1)),
    )


@st.composite
def grids(draw: st.DrawFn, pairs: Pairs) -> Sites:
    """Components, layers, heads and positions, each cell patched alone."""
    names = draw(st.lists(st.sampled_from(COMPONENTS), min_size=1, max_size=3, unique=True))
    layers = draw(st.none() | st.lists(st.integers(0, LAYERS - 1), min_size=1, unique=True))
    counts = [len(found) for name in names if (found := pairs.oracle.heads(name)) != [None]]
    heads = None
    if counts:
        some = st.lists(st.integers(0, min(counts) - 1), min_size=1, max_size=2, unique=True)
        heads = draw(st.none() | some)
    numbers = st.integers(-pairs.width, -1) | st.just(-1)
    positions = draw(st.lists(numbers, min_size=1, max_size=4, unique=True))
    kind = draw(
        st.sampled_from([None, "each", "last", "lastk", "custom", "custom_constant", "custom"])
    )
    seq_pos: Any = positions if kind in ("custom", "custom_constant") else None
    if kind == "lastk":
        seq_pos = draw(st.integers(1, min(3, pairs.width)))
    return Sites(names, layers, kind, seq_pos, heads)


@st.composite
def lists_of_sites(draw: st.DrawFn, pairs: Pairs) -> Any:
    """Cells of one to four sites; one component may come several times, and sites may overlap."""
    cells = []
    for _ in range(draw(st.integers(1, 6))):
        sites = []
        for _ in range(draw(st.integers(1, 4))):
            component = draw(st.sampled_from(COMPONENTS))
            layer = draw(st.integers(0, LAYERS - 1))
            head = draw(st.none() | st.sampled_from(pairs.oracle.heads(component)))
            numbers = st.integers(-pairs.width, -1)
            positions = draw(st.none() | st.lists(numbers, min_size=1, max_size=3, unique=True))
            sites.append(Site.get_site(pairs.api, component, layer, head, positions))
        cells.append(sites[0] if len(sites) == 1 else MultiSite(sites))
    return Sites.from_sites(cells)


@st.composite
def lists_in_spaces(draw: st.DrawFn, pairs: Pairs) -> Any:
    """The same, most of them in a subspace: of a head, or of the whole. Some share one."""

    def given(site: Site) -> Site:
        if draw(st.integers(0, 3)) == 0:
            return site
        whole = pairs.oracle.activation(pairs.target[0], site.component, site.layer)
        width = pairs.oracle.part(whole, Place(site.component, site.layer, site.head)).shape[-1]
        rank = draw(st.sampled_from([1, 2, width]))
        return attrs.evolve(site, subspace=subspace(width, rank, draw(st.integers(0, 1))))

    cells = draw(lists_of_sites(pairs)).sites
    return Sites.from_sites(
        [
            attrs.evolve(cell, sites=[given(site) for site in cell.sites])
            if isinstance(cell, MultiSite)
            else given(cell)
            for cell in cells
        ]
    )


@functools.cache
def subspace(width: int, rank: int, seed: int = 0) -> Subspace:
    """In float64, where an oracle is met to many digits; its mean must not matter."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    mean = torch.linspace(-1, 1, width, dtype=torch.float64)
    return Subspace(torch.linalg.qr(drawn).Q, mean=mean)


@st.composite
def ablations(draw: st.DrawFn) -> Runs:
    """Zeros and means, of a data set or of the prompts themselves."""
    reference = draw(st.lists(st.integers(2, 9), max_size=3))
    return Runs(
        draw(pairs_of()),
        ablation=draw(st.sampled_from(["zero", "mean", "mean"])),
        reference=tuple(random_prompts(reference, seed=9)),
        per_position=draw(st.booleans()),
    )
