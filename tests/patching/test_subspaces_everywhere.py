"""Sweeps of sites in a subspace, against plain hooks: every entry point, every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from nnsight import NNsight
from torch import Tensor

from nnpatch_core import (
    MultiSite,
    Outcome,
    PromptPairs,
    Site,
    Sites,
    Span,
    Spans,
    activation_patching,
    attribution_patching,
    cache_average,
    plan_sweep,
)
from nnpatch_core.errors import MetricError, PositionError, SubspaceError
from nnpatch_core.spaces import Subspace
from nnpatch_core.testing import tiny_model, tiny_tokenizer
from tests.helpers.families import FAMILIES, LAID_OUT_AS, model_of
from tests.helpers.family_oracle import LAYOUTS as FAMILY_LAYOUTS
from tests.helpers.family_oracle import FamilyOracle
from tests.helpers.oracle import Donor, Place, Prompt, lay_out, part_spanned, random_prompts
from tests.helpers.pairs import LAYERS, Pairs, unlike_pairs
from tests.helpers.refusals import raises
from tests.helpers.strategies import lists_in_spaces, pairs_of, subspace

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

ATOL = 5e-5
WIDTH, HEAD = 32, 8
WHOLE, HEADED = ("resid_pre", "attn", "mlp", "resid"), ("q", "k", "v", "o")
engines = pytest.mark.parametrize("engine", ["cone", "full"])


def places(cell: Any, width: int) -> list[Place]:
    """A cell as the oracle names it."""
    return [
        Place(
            site.component,
            site.layer,
            site.head,
            tuple(width - at for at in site.group(width)),
            part_spanned(site.subspace),
        )
        for site in cell.sites
    ]


def check(
    out: Outcome, pairs: Pairs, sites: Any, donors: list[Donor], *, least: float = 0.0
) -> Tensor:
    """Every prompt of every cell is what hooks give; how far each was moved."""
    moved = []
    targets = pairs.difference(torch.stack([pairs.oracle.logits(each) for each in pairs.target]))
    torch.testing.assert_close(out.baseline.target, targets, atol=ATOL, rtol=0)
    for name, grid in sites.grids(pairs.model, pairs.api, pairs.width).items():
        numbers = {tuple(index): row for row, index in enumerate(out.cells[name].index.tolist())}
        for index, cell in zip(map(tuple, grid.index.tolist()), grid.sites, strict=True):
            if tuple(index) not in numbers:
                continue
            where = places(cell, pairs.width)
            logits = [
                pairs.oracle.replaced(prompt, where, donor)
                for prompt, donor in zip(pairs.target, donors, strict=True)
            ]
            expected = pairs.difference(torch.stack(logits))
            (raw,) = out.raw.values()
            torch.testing.assert_close(raw[name][numbers[index]], expected, atol=ATOL, rtol=0)
            moved.append((expected - targets).abs())
    found = torch.stack(moved)
    assert found.max() >= least
    return found


def from_sources(pairs: Pairs) -> list[Donor]:
    return [pairs.oracle.of_prompt(prompt) for prompt in pairs.source]


def grids(rank: int = 2, **positions: Any) -> list[Sites]:
    """Each component: the whole of it, or each head, in a subspace."""
    positions = positions or {"seq_pos_type": "lastk", "seq_pos": 3}
    return [
        Sites(list(names), subspace=subspace(width, rank), **positions)
        for names, width in ((WHOLE, WIDTH), (HEADED, HEAD))
    ]


PADDED = [("left", None), ("right", None), ("mixed", 1)]


@engines
@pytest.mark.parametrize("variant", ["llama", "gemma2", "gemma3, one key", "mistral, one key"])
@pytest.mark.parametrize(("layout", "batch_size"), PADDED)
def test_every_component_and_head(
    engine: str, variant: str, layout: str, batch_size: int | None
) -> None:
    pairs = attrs.evolve(unlike_pairs(variant, 6, 4, 5), layout=layout)
    for sites in grids():
        out = pairs.sweep(sites, engine, batch_size=batch_size)
        assert out.info["engine"] == engine
        moved = check(out, pairs, sites, from_sources(pairs), least=0.01)
        assert (moved > 10 * ATOL).float().mean() > 0.5


@engines
@given(st.data(), pairs_of(), st.sampled_from([None, 1, 2]))
@settings(max_examples=25)
def test_any_sites(engine: str, data: st.DataObject, pairs: Pairs, batch_size: int | None) -> None:
    """Some in a subspace and some not, several together, at the same activation too."""
    sites = data.draw(lists_in_spaces(pairs))
    try:
        out = pairs.sweep(sites, engine, batch_size=batch_size)
    except (MetricError, PositionError):
        reject()
    check(out, pairs, sites, from_sources(pairs))


ABLATIONS: dict[str, Callable[[Pairs], Donor]] = {
    "zero": lambda pairs: pairs.oracle.zeros,
    "mean": lambda pairs: pairs.oracle.mean(pairs.target),
    "per position": lambda pairs: pairs.oracle.mean_per_position(pairs.target),
}


@engines
@pytest.mark.parametrize("method", ABLATIONS)
@pytest.mark.parametrize("layout", ["left", "mixed"])
def test_ablations(engine: str, method: str, layout: str) -> None:
    """Zeros are put into the subspace: not the coordinates 0, where it has a mean."""
    pairs = attrs.evolve(unlike_pairs("llama", 6, 4, 5), layout=layout)
    options: dict[str, Any] = {"method": method}
    if method == "per position":
        options = {"method": "mean", "per_position": True}
    for sites in grids():
        out = pairs.ablate(sites, engine, **options)
        donors = [ABLATIONS[method](pairs)] * len(pairs.target)
        check(out, pairs, sites, donors, least=0.001)


@engines
def test_resampling(engine: str) -> None:
    """Of two prompts each is given the other's."""
    pairs = unlike_pairs("llama", 6, 6)
    for sites in grids():
        out = pairs.ablate(sites, engine, method="resample", seed=1)
        donors = [pairs.oracle.of_prompt(prompt) for prompt in reversed(pairs.target)]
        check(out, pairs, sites, donors, least=0.01)


@engines
@pytest.mark.parametrize("screen", ["attribution", "atp*"])
def test_screened_cells_are_exact(engine: str, screen: str) -> None:
    pairs = unlike_pairs("llama", 6, 4, 5)
    for sites in grids():
        whole = pairs.sweep(sites, "full")
        out = pairs.sweep(sites, engine, screen=screen, top_k=6)
        count = 0
        for name in out:
            exact = out.exact(name)
            count += int(exact.sum())
            assert (out.patched(name)[exact] - whole.patched(name)[exact]).abs().max() < ATOL
        assert count >= 6


@engines
@pytest.mark.parametrize(("component", "width"), [("q", 32), ("k", 16), ("v", 16), ("o", 32)])
def test_a_component_as_a_whole_though_it_has_heads(
    engine: str, component: str, width: int
) -> None:
    pairs = unlike_pairs("llama", 6, 4)
    cells = [
        Site.get_site(pairs.api, component, layer, None, [-1, -2], subspace=subspace(width, 3))
        for layer in range(LAYERS)
    ]
    sites = Sites.from_sites(cells)
    check(pairs.sweep(sites, engine), pairs, sites, from_sources(pairs), least=1e-3)


@engines
@pytest.mark.parametrize(
    "family",
    ["gpt2", "gpt_neox", "phi3", "falcon, by group", "gemma2", "mixtral", "olmo2", "opt", "bloom"],
)
def test_families(engine: str, family: str) -> None:
    """Heads of fused projections, post-norms, experts: the part is of the right columns."""
    if engine == "cone" and not FAMILIES[family].api.cone:
        engine = "full"
    model, api = model_of(family), FAMILIES[family].api
    layout = FAMILY_LAYOUTS[LAID_OUT_AS.get(family, family)]
    oracle = FamilyOracle(model, layout)
    source, target = random_prompts([5, 4], seed=1), random_prompts([5, 4], seed=2)
    answers = torch.tensor([7, 8]), torch.tensor([50, 49])
    cells, expected = [], []
    for component in layout.table(1):
        heads = oracle.heads(component, 1)
        whole = oracle.activation(target[0], component, 1).shape[-1]
        for head in {None, heads[-1]}:
            width = HEAD if head is not None else whole if heads == [None] else HEAD * len(heads)
            space = subspace(width, 2)
            cells.append(Site.get_site(api, component, 1, head, [-2, -1], subspace=space))
            spots = [(component, 1, head, back) for back in (1, 2)]
            part = part_spanned(space)
            assert part is not None
            logits = [
                oracle.patched(one, other, spots, part.projector)
                for one, other in zip(target, source, strict=True)
            ]
            expected.append(
                [float(row[a] - row[b]) for row, a, b in zip(logits, *answers, strict=True)]
            )
    sites = [MultiSite([cell], name=str(number)) for number, cell in enumerate(cells)]
    (tokens, mask), (others, _) = lay_out(source, "left", 5), lay_out(target, "left", 5)
    out = activation_patching(
        model, api, Sites.from_sites(sites), tokens, others, *answers,
        attention_mask=mask, engine=engine, progress=False,
    )  # fmt: skip
    (raw,) = out.raw.values()
    for number, each in enumerate(expected):
        torch.testing.assert_close(raw[str(number)][0], torch.tensor(each), atol=ATOL, rtol=0)
    moved = torch.tensor(expected) - out.baseline.target
    assert (moved.abs() > 10 * ATOL).float().mean() > 0.6


# Positions.


@engines
@pytest.mark.parametrize("batch_size", [None, 1])
def test_positions_of_each_prompt_and_of_its_source(engine: str, batch_size: int | None) -> None:
    pairs = unlike_pairs("llama", 6, 6)
    space = subspace(WIDTH, 2)
    at, taken = [[1, 4], [2, 3]], [[0, 5], [5, 1]]
    site = Site.get_site(pairs.api, "resid", 1, None, at, source_seq_pos=taken, subspace=space)
    out = pairs.sweep(Sites.from_sites([site]), engine, batch_size=batch_size)
    logits = []
    for row, (target, source) in enumerate(zip(pairs.target, pairs.source, strict=True)):
        given = dict(zip((6 - here for here in at[row]), taken[row], strict=True))
        there = pairs.oracle.activation(source, "resid", 1)
        place = Place("resid", 1, None, tuple(given), part_spanned(space))
        logits.append(
            pairs.oracle.replaced(
                target, [place], lambda _, back, given=given, there=there: there[given[back]]
            )
        )
    (raw,) = out.raw.values()
    expected = pairs.difference(torch.stack(logits))
    torch.testing.assert_close(raw["resid"][0], expected, atol=ATOL, rtol=0)
    assert (expected - out.baseline.target).abs().min() > 10 * ATOL


@engines
@pytest.mark.parametrize("batch_size", [None, 1])
def test_spans_of_another_length_in_each_prompt(engine: str, batch_size: int | None) -> None:
    """Source and target have theirs at other places."""
    pairs = unlike_pairs("llama", 6, 6)
    there, here = [[0, 2], [1, 4]], [[3, 5], [2, 5]]
    spans = {"name": Span(torch.tensor(there), torch.tensor(here))}
    sites = Sites("resid", seq_pos_type=Spans("name", token="all"), subspace=subspace(WIDTH, 2))
    out = pairs.sweep(sites, engine, spans=spans, batch_size=batch_size)
    (raw,) = out.raw.values()
    for layer in range(LAYERS):
        logits = []
        rows = zip(pairs.target, pairs.source, there, here, strict=True)
        for target, source, (start, _), (first, end) in rows:
            donor = {6 - at: start + at - first for at in range(first, end)}
            values = pairs.oracle.activation(source, "resid", layer)
            place = Place("resid", layer, None, tuple(donor), part_spanned(subspace(WIDTH, 2)))
            logits.append(
                pairs.oracle.replaced(
                    target, [place], lambda _, back, donor=donor, values=values: values[donor[back]]
                )
            )
        expected = pairs.difference(torch.stack(logits))
        torch.testing.assert_close(raw["resid"][layer, :], expected, atol=ATOL, rtol=0)
        assert (expected - out.baseline.target).abs().min() > 10 * ATOL or layer == LAYERS - 1


# Laws.


def cells_of(out: Outcome) -> Tensor:
    (raw,) = out.raw.values()
    return torch.cat([raw[name] for name in out])


@engines
def test_a_subspace_of_full_rank_is_the_whole(engine: str) -> None:
    pairs = unlike_pairs("llama", 6, 4, 5)
    for names, width in ((WHOLE, WIDTH), (HEADED, HEAD)):
        whole = pairs.sweep(Sites(list(names), seq_pos_type="each"), engine)
        full = Sites(list(names), seq_pos_type="each", subspace=subspace(width, width))
        gap = cells_of(pairs.sweep(full, engine)) - cells_of(whole)
        assert gap.abs().max() < ATOL


@engines
def test_subspaces_that_complete_each_other_are_the_whole_when_put_together(engine: str) -> None:
    pairs = unlike_pairs("llama", 6, 4)
    basis = subspace(WIDTH, WIDTH).basis
    get = lambda space: Site.get_site(pairs.api, "resid", 1, None, [-1], subspace=space)  # noqa: E731
    both = MultiSite([get(Subspace(basis[:, :5])), get(Subspace(basis[:, 5:]))], name="both")
    out = pairs.sweep(Sites.from_sites([both, MultiSite([get(None)], name="whole")]), engine)
    (raw,) = out.raw.values()
    torch.testing.assert_close(raw["both"], raw["whole"], atol=ATOL, rtol=0)


@engines
def test_what_is_the_same_in_both_runs_is_elided(engine: str) -> None:
    """Before the first token that differs, where runs are bitwise the same."""
    pairs = unlike_pairs("llama", 6)
    pairs = attrs.evolve(pairs, target=[pairs.source[0][:3] + pairs.target[0][3:]])
    sites = Sites("resid", seq_pos_type="each", subspace=subspace(WIDTH, 2))
    out = pairs.sweep(sites, engine)
    early = out.cells["resid"].index[:, 1] < 3
    (raw,) = out.raw.values()
    assert (raw["resid"][early] == out.baseline.target).all()
    assert (raw["resid"][~early & (out.cells["resid"].index[:, 0] < 2)] != raw["resid"][0]).all()
    elided = out.cells["resid"].elided[:, 0]
    assert elided.equal(early) or (engine == "full" and not elided.any())


def test_a_subspace_in_which_runs_agree_is_elided_though_they_differ() -> None:
    """What is left to patch there is nothing, bitwise."""
    pairs = unlike_pairs("llama", 5)
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.5
    (source, _), (target, _) = lay_out(pairs.source, "left"), lay_out(pairs.target, "left")
    for space in (Subspace(torch.eye(WIDTH)[:, :1]), Subspace(torch.eye(WIDTH)[:, :2])):
        sites = Sites("resid_pre", layers=[0], seq_pos_type="each", subspace=space)
        runs = source, target, *pairs.answers
        estimate = attribution_patching(model, pairs.api, sites, *runs, progress=False)
        for out in (pairs.sweep(sites, "cone", model), estimate):
            assert bool(out.cells["resid_pre"].elided.all()) == (space.rank == 1)
            assert bool(out.cells["resid_pre"].elided.any()) == (space.rank == 1)


def test_engines_agree_where_one_subspace_is_put_on_another() -> None:
    """Their order matters, as they are not at right angles."""
    pairs = unlike_pairs("llama", 6, 4)
    get = lambda seed: Site.get_site(  # noqa: E731
        pairs.api, "resid", 0, None, [-1], subspace=subspace(WIDTH, 4, seed)
    )
    cells = [MultiSite([get(0), get(1)], name="one"), MultiSite([get(1), get(0)], name="other")]
    sites = Sites.from_sites(cells)
    outs = [pairs.sweep(sites, engine) for engine in ("cone", "full")]
    for out in outs:
        check(out, pairs, sites, from_sources(pairs))
        (raw,) = out.raw.values()
        assert (raw["one"] - raw["other"]).abs().max() > 100 * ATOL


# Grids.


@engines
def test_each_layer_may_have_its_own(engine: str) -> None:
    pairs = unlike_pairs("llama", 6, 4)
    mapping = {2: subspace(WIDTH, 1), 0: subspace(WIDTH, 3, 1)}
    sites = Sites(["mlp", "resid"], seq_pos_type="last", subspace=mapping)
    assert sites.layers == (0, 2)
    out = pairs.sweep(sites, engine)
    assert out.info["subspace"].count("Subspace(") == 2
    check(out, pairs, sites, from_sources(pairs), least=0.01)
    some = Sites("resid", [2], seq_pos_type="last", subspace=mapping)
    (cell,) = some.grids(pairs.model, pairs.api, 6)["resid"].sites
    assert cell.sites[0].subspace is mapping[2]


@pytest.mark.parametrize(
    ("sites", "parts"),
    [
        (lambda: Sites("resid", subspace=subspace(HEAD, 1)), ["8 wide", "resid of layer 0", "32"]),
        (lambda: Sites("q", subspace=subspace(WIDTH, 1)), ["32 wide", "head 0 of q", "8 wide"]),
        (lambda: Sites(["resid", "q"], subspace=subspace(WIDTH, 1)), ["head 0 of q"]),
        (lambda: Sites("resid", [0, 1], subspace={1: subspace(WIDTH, 1)}), ["none for layers [0]"]),
    ],
)
def test_a_grid_that_does_not_fit_is_refused_before_anything_runs(
    sites: Callable[[], Any], parts: list[str]
) -> None:
    pairs = unlike_pairs("llama", 4)
    model = NNsight(pairs.model)
    with raises(SubspaceError, *parts):
        pairs.sweep(sites(), "auto", model)
    with raises(SubspaceError, *parts):
        pairs.ablate(sites(), "auto", model)
    tokens, mask = lay_out(pairs.target, "left", 4)
    with raises(SubspaceError, *parts):
        plan_sweep(model, pairs.api, sites(), tokens, tokens, attention_mask=mask)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "mixtral", "opt", "bloom"])
@pytest.mark.parametrize("head", [None, 0])
def test_widths_are_known_before_anything_runs(family: str, head: int | None) -> None:
    """Of every component of families of many layouts."""
    model, api = model_of(family), FAMILIES[family].api
    for component in api.components:
        if head is not None and api.components[component].heads is None:
            continue
        site = Site.get_site(api, component, 0, head, subspace=subspace(7, 1))
        with raises(SubspaceError, "7 wide", f"{component} of layer 0"):
            Sites.from_sites([site]).grids(model, api, 4)


# Own traces.


def traced(pairs: Pairs, site: Site, patch: Callable[[NNsight], None]) -> Tensor:
    """`[vocab]` at the last token of the first target."""
    model = NNsight(pairs.model)
    with torch.no_grad(), model.trace(torch.tensor([pairs.target[0]])):
        patch(model)
        logits = model.output.logits.save()
    return logits[0, -1].float()


@pytest.mark.parametrize(
    ("component", "head", "width"),
    [("resid", None, WIDTH), ("q", 2, HEAD), ("k", 1, HEAD), ("v", None, 16), ("mlp", None, WIDTH)],
)
@pytest.mark.parametrize("zero", [False, True])
def test_own_traces(component: str, head: int | None, width: int, zero: bool) -> None:
    pairs = unlike_pairs("llama", 5)
    space = subspace(width, 2)
    site = Site.get_site(pairs.api, component, 1, head, [-1, -3], subspace=space)
    model = NNsight(pairs.model)
    with torch.no_grad(), model.trace(torch.tensor([pairs.source[0]])):
        site.cache(model)
    # The whole of it is kept: the subspace says what is put.
    assert site.value.flatten(2).shape == (1, 2, width)
    found = traced(pairs, site, lambda model: site.patch(model, zero=zero))
    donor = pairs.oracle.zeros if zero else pairs.oracle.of_prompt(pairs.source[0])
    place = Place(component, 1, head, (1, 3), part_spanned(space))
    expected = pairs.oracle.replaced(pairs.target[0], [place], donor)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    assert (expected - pairs.oracle.logits(pairs.target[0])).abs().max() > 10 * ATOL
    site.clear()
    with torch.no_grad(), model.trace(torch.tensor([pairs.target[0]])):
        site.cache(model)
    same = traced(pairs, site, site.patch)
    assert same.equal(traced(pairs, site, lambda model: None))


def test_own_traces_of_averages() -> None:
    pairs = unlike_pairs("llama", 5, 5, 5)
    space = subspace(WIDTH, 2)
    site = Site.get_site(pairs.api, "resid", 1, None, [-1], subspace=space)
    cache_average(NNsight(pairs.model), [site], [lay_out(pairs.source, "left")])
    found = traced(pairs, site, site.patch)

    def donor(place: Place, back: int) -> Tensor:
        rows = [pairs.oracle.activation(each, "resid", 1)[5 - back] for each in pairs.source]
        return torch.stack(rows).double().mean(0)

    place = Place("resid", 1, None, (1,), part_spanned(space))
    expected = pairs.oracle.replaced(pairs.target[0], [place], donor)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_a_multi_site_of_ones_own_trace() -> None:
    """Two subspaces of one activation, and a site without one."""
    pairs = unlike_pairs("llama", 5)
    get = lambda name, space: Site.get_site(pairs.api, name, 1, None, [-1], subspace=space)  # noqa: E731
    both = MultiSite(
        [get("resid", subspace(WIDTH, 2)), get("resid", subspace(WIDTH, 2, 1)), get("mlp", None)]
    )
    model = NNsight(pairs.model)
    with torch.no_grad(), model.trace(torch.tensor([pairs.source[0]])):
        both.cache(model)
    found = traced(pairs, both.sites[0], both.patch)
    source = pairs.oracle.of_prompt(pairs.source[0])
    expected = pairs.oracle.replaced(pairs.target[0], places(both, 5), source)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


# Prompts.


def test_splits_and_batches_of_pairs_are_those_of_the_whole() -> None:
    rows = unlike_pairs("llama", 6, 4, 5, 3)
    texts = [["a b c d", "b a c e", "c c b d", "e d a a"], ["a e c d", "b a e e", "c a b d"]]
    texts[1].append("e d c a")
    answers = [[" a", " b", " c", " d"], [" e", " d", " a", " b"]]
    words = tiny_tokenizer([" a b c d e", *texts[0], *texts[1]])
    pairs = PromptPairs.from_texts(*texts, *answers, words)
    sites, model = grids()[0], rows.model

    def run(some: PromptPairs) -> Tensor:
        return cells_of(activation_patching(model, rows.api, sites, some, progress=False))

    whole = run(pairs)
    parts = torch.cat([run(each) for each in pairs.batches(3)], 1)
    assert (parts - whole).abs().max() < ATOL
    assert (run(pairs[[2, 0]]) - whole[:, [2, 0]]).abs().max() < ATOL
    assert whole.std() > 100 * ATOL


def test_prompts_may_be_one_alone() -> None:
    pairs = unlike_pairs("llama", 3)
    prompts: list[Prompt] = pairs.target
    assert len(prompts) == 1
    for sites in grids(seq_pos_type="last"):
        check(pairs.sweep(sites, "cone"), pairs, sites, from_sources(pairs), least=1e-3)
