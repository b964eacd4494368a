"""Laws: of the position strategies, of the grid, and of patching itself, on random examples."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nnsight import NNsight

from nnpatch_core import (
    AllPositions,
    Custom,
    CustomConstant,
    Each,
    Last,
    LastK,
    MultiSite,
    Outcome,
    Site,
    Sites,
    activation_patching,
)
from nnpatch_core.batch import Batch, pack_left
from nnpatch_core.components import SYNONYMS, canonical_name
from nnpatch_core.engine.full import open_full
from nnpatch_core.errors import PositionError
from nnpatch_core.interventions import Recorded
from nnpatch_core.memory import limits_of
from nnpatch_core.sites import bind_cells
from nnpatch_core.sweep import cells as running
from nnpatch_core.testing import tiny_model
from nnpatch_core.tracing import forward, record
from nnpatch_gemma import Gemma2
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.oracle import COMPONENTS, Oracle, Place, Prompt, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

ATOL = 1e-4
#: The same sums in another order.
ROUNDING = 3e-5
FAMILIES = {"llama": Llama3, "mistral": Mistral, "gemma2": Gemma2}
LAYOUTS = ("left", "right", "mixed", "holes")
HEADS = {"q": 4, "k": 2, "v": 2, "o": 4}
LAYERS = 3


# The strategies.


@st.composite
def positions(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A length, and positions of it, from 0 and without duplicates, in any order."""
    seq_len = draw(st.integers(1, 12))
    found = draw(st.lists(st.integers(0, seq_len - 1), min_size=1, unique=True))
    return seq_len, found


@st.composite
def spelled(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A length, positions of it, and the same with some of them counted from the end."""
    seq_len, found = draw(positions())
    return seq_len, found, [each - draw(st.sampled_from([0, seq_len])) for each in found]


@st.composite
def strategies(draw: st.DrawFn) -> tuple[int, Any]:
    """A length, and a strategy that fits it."""
    seq_len, _, spelling = draw(spelled())
    made = [
        AllPositions(),
        Each(),
        Last(),
        LastK(draw(st.integers(1, seq_len))),
        Custom(spelling),
        CustomConstant(spelling),
    ]
    return seq_len, draw(st.sampled_from(made))


@given(strategies())
def test_groups_are_ascending_positions_of_the_prompt(drawn: tuple[int, Any]) -> None:
    seq_len, strategy = drawn
    groups = strategy.expand(seq_len)
    assert groups
    for group in groups:
        assert group
        assert all(type(position) is int for position in group)
        assert all(0 <= position < seq_len for position in group)
        assert all(one < other for one, other in pairwise(group))
    firsts = [group[0] for group in groups]
    assert firsts == sorted(set(firsts))
    assert strategy.one_by_one or len(groups) == 1
    assert not strategy.one_by_one or all(len(group) == 1 for group in groups)


@given(strategies(), st.integers(1, 12))
def test_a_strategy_is_stable_under_repetition(drawn: tuple[int, Any], other: int) -> None:
    seq_len, strategy = drawn
    twin = attrs.evolve(strategy)
    before = strategy.expand(seq_len)
    kept = list(before)
    before.clear()
    # Neither what was done to an earlier answer nor another length matters.
    with suppress(PositionError):
        strategy.expand(other)
    assert strategy.expand(seq_len) == kept == twin.expand(seq_len)
    assert (strategy, hash(strategy)) == (twin, hash(twin))


@given(spelled(), st.randoms(use_true_random=False))
def test_spellings_and_order_of_positions_do_not_matter(
    drawn: tuple[int, list[int], list[int]], shuffle: random.Random
) -> None:
    seq_len, given_positions, spelling = drawn
    shuffle.shuffle(spelling)
    expected = sorted(given_positions)
    assert Custom(spelling).expand(seq_len) == [(position,) for position in expected]
    assert CustomConstant(spelling).expand(seq_len) == [tuple(expected)]


@given(st.integers(1, 30))
def test_strategies_that_mean_the_same(seq_len: int) -> None:
    assert Last().expand(seq_len) == LastK(1).expand(seq_len) == Custom([-1]).expand(seq_len)
    assert Last().expand(seq_len) == CustomConstant([-1]).expand(seq_len) == [(seq_len - 1,)]
    every = range(seq_len)
    assert Each().expand(seq_len) == Custom(every).expand(seq_len) == [(each,) for each in every]
    assert Each().expand(seq_len) == LastK(seq_len).expand(seq_len)
    assert AllPositions().expand(seq_len) == CustomConstant(every).expand(seq_len)


@given(st.integers(1, 12), st.integers(-40, 40), st.sampled_from([Custom, CustomConstant]))
def test_a_position_outside_the_prompt_is_named(
    seq_len: int, position: int, strategy: Callable
) -> None:
    # Position 0 is in every prompt; it is the other one that is wrong.
    others = [] if position in (0, -seq_len) else [0]
    made = strategy([*others, position])
    if -seq_len <= position < seq_len:
        assert (position % seq_len) in [each for group in made.expand(seq_len) for each in group]
        return
    with pytest.raises(PositionError, match=rf"position {position} .* {seq_len} tokens"):
        made.expand(seq_len)


@given(positions(), st.sampled_from([Custom, CustomConstant]))
def test_two_spellings_of_one_position_are_refused(
    drawn: tuple[int, list[int]], strategy: Callable
) -> None:
    seq_len, found = drawn
    with pytest.raises(PositionError, match=rf"same token .* {seq_len} tokens"):
        strategy([*found, found[0] - seq_len]).expand(seq_len)


@given(st.integers(1, 12), st.integers(1, 12))
def test_lastk_must_fit_the_prompt(seq_len: int, more: int) -> None:
    with pytest.raises(PositionError, match=rf"last {seq_len + more} .* {seq_len} tokens"):
        LastK(seq_len + more).expand(seq_len)


@given(strategies())
def test_names_stand_for_the_strategies(drawn: tuple[int, Any]) -> None:
    _, strategy = drawn
    spelling = {
        AllPositions: {},
        Each: {"seq_pos_type": "each"},
        Last: {"seq_pos_type": "last"},
        LastK: {"seq_pos_type": "lastk", "seq_pos": getattr(strategy, "k", None)},
        Custom: {"seq_pos_type": "custom", "seq_pos": getattr(strategy, "positions", None)},
        CustomConstant: {
            "seq_pos_type": "custom_constant",
            "seq_pos": getattr(strategy, "positions", None),
        },
    }[type(strategy)]
    assert Sites("resid", **spelling) == Sites("resid", seq_pos_type=strategy)


# The grid.


@functools.cache
def shaped_model(n_layers: int, query: int, key_value: int) -> Any:
    return tiny_model(
        "llama",
        num_hidden_layers=n_layers,
        num_attention_heads=query,
        num_key_value_heads=key_value,
    )


@attrs.frozen
class Swept:
    """What some `Sites` mean, worked out without them."""

    sites: Sites
    model: Any
    seq_len: int
    shapes: dict[str, tuple[int, ...]]
    #: Component to place in the outcome to what is patched there: layer, head, positions.
    cells: dict[str, dict[tuple[int, ...], tuple[int, int | None, tuple[int, ...]]]]


@st.composite
def swept_sites(draw: st.DrawFn) -> Swept:
    n_layers, (query, key_value) = draw(st.integers(1, 4)), draw(st.sampled_from([(4, 2), (8, 1)]))
    counts = {"q": query, "o": query, "k": key_value, "v": key_value}
    names = draw(st.lists(st.sampled_from(COMPONENTS), min_size=1, unique=True))
    layers = draw(st.none() | st.lists(st.integers(0, n_layers - 1), min_size=1, unique=True))
    with_heads = [counts[name] for name in names if name in counts]
    heads = None
    if with_heads:
        numbers = st.integers(0, min(with_heads) - 1)
        heads = draw(st.none() | st.lists(numbers, min_size=1, unique=True))
    seq_len, strategy = draw(strategies())
    # Other names of the field, which the outcome keeps.
    others = {name: [each for each, of in SYNONYMS.items() if of == name] for name in names}
    spelled = {name: draw(st.sampled_from([name, *others[name]])) for name in names}
    spelling = [spelled[name] for name in names]
    shapes: dict[str, tuple[int, ...]] = {}
    cells: dict[str, Any] = {}
    for name in names:
        shapes[spelled[name]] = (
            n_layers,
            *([seq_len] if strategy.one_by_one else []),
            *([counts[name]] if name in counts else []),
        )
        cells[spelled[name]] = {}
        for layer in range(n_layers) if layers is None else layers:
            for group in strategy.expand(seq_len):
                for head in (heads or range(counts[name])) if name in counts else [None]:
                    place = [layer, *(group if strategy.one_by_one else [])]
                    cells[spelled[name]][*place, *([] if head is None else [head])] = (
                        layer,
                        head,
                        group,
                    )
    sites = Sites(spelling, layers=layers, heads=heads, seq_pos_type=strategy)
    return Swept(sites, shaped_model(n_layers, query, key_value), seq_len, shapes, cells)


@given(swept_sites())
@settings(max_examples=200)
def test_a_grid_has_every_swept_cell_once_and_no_other(swept: Swept) -> None:
    grids = swept.sites.grids(swept.model, Llama3, swept.seq_len)
    assert list(grids) == list(swept.cells)
    for name, grid in grids.items():
        assert grid.shape == swept.shapes[name]
        places = [tuple(index) for index in grid.index.tolist()]
        assert len(places) == len(set(places)) == len(grid.sites)
        found = {
            index: (site.layer, site.head, site.seq_pos)
            for index, site in zip(places, grid.sites, strict=True)
        }
        assert found == swept.cells[name]
        assert {(site.name, site.component) for site in grid.sites} == {
            (name, canonical_name(name))
        }


@given(swept_sites())
@settings(max_examples=100)
def test_the_dict_of_sites_agrees_with_the_grid(swept: Swept) -> None:
    tokens = torch.ones(2, swept.seq_len, dtype=torch.int64)
    found = swept.sites.get_sites_dict(NNsight(swept.model), Llama3, tokens)
    grids = swept.sites.grids(swept.model, Llama3, swept.seq_len)
    assert {name: tuple(sites) for name, sites in found.items()} == {
        name: tuple(grid.sites) for name, grid in grids.items()
    }


@given(swept_sites())
@settings(max_examples=25)
def test_an_outcome_is_written_where_it_was_swept_once(swept: Swept) -> None:
    """Each patched run is measured as its number."""
    runs = iter(range(10_000))

    def count(metrics: Any, logits: torch.Tensor, context: Any) -> dict[str, torch.Tensor]:
        return {name: torch.full((len(logits),), float(next(runs))) for name in metrics}

    source, target = (torch.full((1, swept.seq_len), token) for token in (5, 6))
    with mock.patch.object(running, "measure", count):
        out = activation_patching(
            swept.model,
            Llama3,
            swept.sites,
            source,
            target,
            torch.tensor([7]),
            torch.tensor([8]),
            engine="full",
            progress=False,
        )
    counted = []
    for name, cells in swept.cells.items():
        patched = out.patched(name)[..., 0]
        assert patched.shape == out[name].shape == swept.shapes[name]
        places = {tuple(place) for place in (~patched.isnan()).nonzero().tolist()}
        assert places == set(cells)
        assert torch.equal(out.swept(name), ~patched.isnan())
        assert bool((out[name][patched.isnan()] == 0).all())
        counted += patched[~patched.isnan()].tolist()
    assert sorted(counted) == list(range(len(counted)))
    assert next(runs) == len(counted)


# Batches.


@st.composite
def masked_tokens(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    bits = st.lists(st.integers(0, 1), min_size=width, max_size=width).filter(any)
    mask = torch.tensor([draw(bits) for _ in range(rows)])
    return torch.arange(rows * width).reshape(rows, width) + 3, mask


@given(masked_tokens(), st.sampled_from([torch.bool, torch.int64, torch.float32]))
def test_packing_keeps_the_tokens_of_each_prompt_in_order(
    drawn: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype
) -> None:
    tokens, mask = drawn
    packed = pack_left(tokens, mask.to(dtype))
    assert packed.tokens.shape == packed.mask.shape == tokens.shape
    for row in range(len(tokens)):
        real = int(mask[row].sum())
        width = tokens.shape[1]
        assert packed.mask[row].tolist() == [0] * (width - real) + [1] * real
        kept = tokens[row][mask[row].bool()].tolist()
        assert packed.tokens[row, width - real :].tolist() == kept
        assert packed.position_ids[row, width - real :].tolist() == list(range(real))
    again = pack_left(packed.tokens, packed.mask)
    assert torch.equal(again.tokens, packed.tokens)
    assert torch.equal(again.mask, packed.mask)


# Patching.


@functools.cache
def model_and_oracle(family: str, seed: int) -> tuple[Any, Any, Oracle]:
    model = tiny_model(family, seed=seed)
    oracle = Oracle(model, family)
    return model, NNsight(model), oracle


@attrs.frozen
class Case:
    """A model, and pairs of prompts in one batch."""

    family: str
    seed: int
    source: list[Prompt]
    target: list[Prompt]
    width: int
    layout: str

    @property
    def api(self) -> Any:
        return FAMILIES[self.family]

    @property
    def model(self) -> Any:
        return model_and_oracle(self.family, self.seed)[0]

    @property
    def nnmodel(self) -> Any:
        return model_and_oracle(self.family, self.seed)[1]

    @property
    def oracle(self) -> Oracle:
        return model_and_oracle(self.family, self.seed)[2]

    def batch(self, prompts: list[Prompt]) -> Batch:
        return pack_left(*lay_out(prompts, self.layout, self.width, self.seed))

    def differences(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[:, 7] - logits[:, 50]

    def sweep(self, sites: Any, rows: list[int] | None = None, **options: Any) -> Any:
        """Of all the prompts, or of some of them in that order."""
        rows = list(range(len(self.source))) if rows is None else rows
        source, target = [self.source[row] for row in rows], [self.target[row] for row in rows]
        source_tokens, source_mask = lay_out(source, self.layout, self.width, self.seed)
        target_tokens, target_mask = lay_out(target, self.layout, self.width, self.seed)
        return activation_patching(
            self.model,
            self.api,
            sites,
            source_tokens,
            target_tokens,
            torch.full((len(rows),), 7),
            torch.full((len(rows),), 50),
            source_attention_mask=source_mask,
            target_attention_mask=target_mask,
            progress=False,
            **options,
        )

    def patch(self, cells: list[Any]) -> list[torch.Tensor]:
        """The patched runs' logits, by the engine."""
        source, target = self.batch(self.source), self.batch(self.target)
        patches, sizes = bind_cells(cells, self.nnmodel, target.seq_len), target.tokens.shape
        _, found = record(self.nnmodel, source, patches.places)
        intervention = Recorded(found, source.mask * target.mask)
        limits = limits_of(patches, *sizes, given="1 GiB", batch_size=None, whole=True)
        run = open_full(patches, target, intervention, limits)
        done = np.zeros((len(cells), len(target)), dtype=np.bool_)
        return [part.logits for part in run.parts(done, None)]


@st.composite
def cases(draw: st.DrawFn, *, same_lengths: bool = True, padded: bool = True) -> Case:
    rows, seed = draw(st.integers(1, 3)), draw(st.integers(0, 10_000))
    # Longer than the sliding window, and not so long that it hides the first tokens altogether.
    one_length = st.integers(1, 6)
    lengths = st.lists(one_length, min_size=rows, max_size=rows)
    source = draw(lengths) if padded else [draw(one_length)] * rows
    target = source if same_lengths else draw(lengths)
    prompts = random_prompts(source, seed), random_prompts(target, seed + 1)
    # Two runs of the same tokens have no difference to restore: prompts of one token can coincide.
    assume(prompts[0] != prompts[1])
    return Case(
        draw(st.sampled_from(sorted(FAMILIES))),
        draw(st.integers(0, 3)),
        *prompts,
        max(source + target) + (draw(st.integers(0, 2)) if padded else 0),
        draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def cells_of(draw: st.DrawFn, case: Case, size: int = 5) -> list[tuple[Place, ...]]:
    """Places of one or more sites each, anywhere in the model and in the batch."""
    found = []
    for _ in range(size):
        places = []
        for _ in range(draw(st.integers(1, 3))):
            component = draw(st.sampled_from(COMPONENTS))
            head = None
            if component in HEADS:
                head = draw(st.none() | st.integers(0, HEADS[component] - 1))
            numbers = st.integers(1, case.width)
            from_end = draw(st.lists(numbers, min_size=1, max_size=4, unique=True))
            places.append(Place(component, draw(st.integers(0, 2)), head, tuple(from_end)))
        found.append(tuple(places))
    return found


def as_site(case: Case, places: tuple[Place, ...]) -> Any:
    sites = [
        Site.get_site(case.api, component, layer, head, [-back for back in from_end])
        for component, layer, head, from_end, _ in places
    ]
    return sites[0] if len(sites) == 1 else MultiSite(sites)


@given(st.data(), cases())
@settings(max_examples=60)
def test_patching_a_run_into_itself_changes_no_bit(data: st.DataObject, case: Case) -> None:
    same = attrs.evolve(case, target=case.source)
    cells = [as_site(case, places) for places in data.draw(cells_of(case))]
    plain = forward(case.nnmodel, same.batch(same.target))
    for logits in same.patch(cells):
        assert torch.equal(logits, plain)


@given(cases())
@settings(max_examples=25)
def test_a_prompt_patched_with_itself_keeps_its_value(case: Case) -> None:
    """The same through a whole sweep, beside prompts that do change."""
    beside = random_prompts([case.width], seed=99)[0], random_prompts([case.width], seed=98)[0]
    case = attrs.evolve(case, source=[*case.source, beside[0]], target=[*case.source, beside[1]])
    out = case.sweep(Sites(["resid_pre", "q", "v", "mlp"], layers=[1], seq_pos_type="each"))
    for name in out:
        patched = out.patched(name)[out.swept(name)][:, :-1]
        assert torch.equal(patched, out.baseline.target[:-1].expand_as(patched))


@given(cases() | cases(padded=False), st.integers(0, 2), st.sampled_from(["resid", "resid_pre"]))
@settings(max_examples=60)
def test_patching_a_whole_residual_stream_gives_the_source_run(
    case: Case, layer: int, component: str
) -> None:
    source = forward(case.nnmodel, case.batch(case.source))
    target = forward(case.nnmodel, case.batch(case.target))
    (patched,) = case.patch([Site.get_site(case.api, component, layer)])
    torch.testing.assert_close(patched, source, atol=ROUNDING, rtol=ROUNDING)
    if all(len(prompt) == case.width for prompt in case.source):
        assert torch.equal(patched, source)
    assert not torch.allclose(patched, target, atol=100 * ROUNDING)


@given(cases(same_lengths=False))
@settings(max_examples=25)
def test_the_end_of_the_residual_stream_is_the_whole_answer(case: Case) -> None:
    """Exactly 1 at the last layer and position, exactly 0 before it."""
    names = ["resid", "attn", "mlp", "o"]
    out = case.sweep(Sites(names, layers=[2], heads=[1], seq_pos_type="each"), engine="full")
    assert out["resid"][-1, -1] == 1
    assert torch.equal(out.patched("resid")[-1, -1], out.baseline.source)
    for name in out:
        assert bool((out[name][-1, :-1] == 0).all())
    last = case.sweep(Sites("resid", seq_pos_type="last"), engine="full")
    assert last["resid"][-1] == 1


@given(st.data(), cases(same_lengths=False))
@settings(max_examples=60)
def test_several_positions_and_sites_are_one_forward_of_plain_hooks(
    data: st.DataObject, case: Case
) -> None:
    cells = data.draw(cells_of(case, size=3))
    found = case.patch([as_site(case, places) for places in cells])
    for places, logits in zip(cells, found, strict=True):
        for row, (source, target) in enumerate(zip(case.source, case.target, strict=True)):
            # Padding of the source is no value to patch with: the oracle leaves it out as well.
            expected = case.oracle.replaced(target, places, case.oracle.of_prompt(source))
            torch.testing.assert_close(logits[row], expected, atol=ATOL, rtol=ATOL)


@given(st.data(), cases(same_lengths=False))
@settings(max_examples=40)
def test_a_group_of_positions_is_one_forward_of_plain_hooks(
    data: st.DataObject, case: Case
) -> None:
    numbers = st.integers(0, case.width - 1)
    group = data.draw(st.lists(numbers, min_size=1, unique=True))
    name = data.draw(st.sampled_from(COMPONENTS))
    sites = Sites(name, seq_pos_type="custom_constant", seq_pos=group)
    rows = zip(case.source, case.target, strict=True)
    longest = max(min(len(source), len(target)) for source, target in rows)
    if max(group) < case.width - longest:
        with pytest.raises(PositionError, match="padding in every prompt"):
            case.sweep(sites)
        return
    out = case.sweep(sites)
    from_end = tuple(case.width - position for position in group)
    for layer in range(LAYERS):
        for head in case.oracle.heads(name):
            place = Place(name, layer, head, from_end)
            index = (layer, *(() if head is None else (head,)))
            rows = zip(case.source, case.target, strict=True)
            logits = torch.stack([case.oracle.patched(t, s, place) for s, t in rows])
            found = out.patched(name)[index]
            torch.testing.assert_close(found, case.differences(logits), atol=ATOL, rtol=0)


@given(st.data(), cases(same_lengths=False))
@settings(max_examples=25)
def test_the_order_of_the_prompts_does_not_matter(data: st.DataObject, case: Case) -> None:
    order = data.draw(st.permutations(range(len(case.source))))
    sites = Sites(["resid_pre", "k", "o"], layers=[1], heads=[1], seq_pos_type="each")
    one, other = case.sweep(sites), case.sweep(sites, rows=order)
    for name in one:
        found, expected = other.patched(name), one.patched(name)[..., order]
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0, equal_nan=True)


def as_it_was(out: Outcome, name: str) -> torch.Tensor:
    """The patched runs; where there was no cell, for every prompt has padding there, the target."""
    patched = out.patched(name)
    return torch.where(patched.isnan(), out.baseline.target, patched)


@given(cases(same_lengths=False))
@settings(max_examples=25)
def test_a_padded_batch_equals_its_prompts_alone(case: Case) -> None:
    sites = Sites(["resid", "q", "v"], layers=[0, 1], heads=[0], seq_pos_type="each")
    together = case.sweep(sites)
    for row, (source, target) in enumerate(zip(case.source, case.target, strict=True)):
        width = max(len(source), len(target))
        alone = attrs.evolve(case, source=[source], target=[target], width=width).sweep(sites)
        for name in sites.site_names:
            found = as_it_was(together, name)[:2, ..., row]
            expected = as_it_was(alone, name)[:2, ..., 0]
            if name != "resid":
                found, expected = found[..., 0], expected[..., 0]
            torch.testing.assert_close(found[:, -width:], expected, atol=ROUNDING, rtol=0)
            # The rest is padding, where nothing is patched.
            rest = found[:, :-width]
            assert torch.equal(rest, together.baseline.target[row].expand_as(rest))


@given(cases(), st.integers(0, 1))
@settings(max_examples=40)
def test_one_tensor_under_two_names(case: Case, layer: int) -> None:
    """What a layer gives is what the next one takes."""
    sites = Sites(["resid_pre", "resid"], seq_pos_type="each")
    out = case.sweep(sites, engine="full")
    given, taken = out.patched("resid")[layer], out.patched("resid_pre")[layer + 1]
    torch.testing.assert_close(given, taken, atol=0, rtol=0, equal_nan=True)


@given(cases(), st.integers(0, 2))
@settings(max_examples=40)
def test_all_heads_one_by_one_are_the_component(case: Case, layer: int) -> None:
    """And queries, keys and values together are everything that attention knows."""
    whole, heads = [], []
    for name, count in HEADS.items():
        whole.append(Site.get_site(case.api, name, layer))
        each = [Site.get_site(case.api, name, layer, head) for head in range(count)]
        heads.append(MultiSite(each[::-1]))
    for one, other in zip(case.patch(whole), case.patch(heads), strict=True):
        assert torch.equal(one, other)
    inputs = MultiSite(Site.get_site(case.api, name, layer) for name in "qkv")
    outputs = [Site.get_site(case.api, name, layer) for name in ("o", "attn")]
    known, *expected = case.patch([inputs, *outputs])
    for logits in expected:
        torch.testing.assert_close(known, logits, atol=ATOL, rtol=0)


# What is written to a file.


def some_metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 3]


@given(st.data(), cases(same_lengths=False))
@settings(max_examples=40)
def test_a_saved_outcome_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, case: Case
) -> None:
    sites: Any
    if data.draw(st.booleans()):
        sites = Sites(["resid", "z", "k"], layers=[2, 0], seq_pos_type="lastk", seq_pos=1)
    else:
        sites = Sites.from_sites([as_site(case, places) for places in data.draw(cells_of(case))])
    metrics = {"a": "logit_difference", "b": "kl_divergence", "naïve/metric": some_metric}
    out = case.sweep(sites, metric=metrics)
    path: Path = tmp_path_factory.mktemp("outcome") / "outcome.safetensors"
    out.save(path)
    back = Outcome.load(path)
    assert list(path.parent.iterdir()) == [path]
    assert (back.kind, back.scale, back.metric) == (out.kind, out.scale, out.metric)
    assert (back.metrics, dict(back.info)) == (tuple(metrics), dict(out.info))
    assert list(back) == list(out)
    assert (back.tokens, dict(back.prompts.strings)) == (out.tokens, dict(out.prompts.strings))
    for field in ("source_tokens", "source_mask", "target_tokens", "target_mask"):
        assert torch.equal(getattr(back.prompts, field), getattr(out.prompts, field))
    for metric in metrics:
        one, other = out.for_metric(metric), back.for_metric(metric)
        assert torch.equal(other.baseline.source, one.baseline.source)
        assert torch.equal(other.baseline.target, one.baseline.target)
        for name in out:
            assert other.axes(name) == one.axes(name)
            assert torch.equal(other.swept(name), one.swept(name))
            for values in (Outcome.__getitem__, Outcome.patched, Outcome.per_prompt):
                found, expected = values(other, name), values(one, name)
                assert found.dtype == expected.dtype
                # Bits, so that nan equals nan.
                assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
