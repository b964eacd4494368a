"""The protocol of interventions carries what nothing ships yet, in both engines and in gradients.

Two are made up here: one whose value depends on the cell, and one that adds a vector to what stands
there. Plain hooks on a copy of the model say what they must give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import MultiSite, Outcome, PatchingError, Site, Sites
from nnpatch_core._models import as_nnsight
from nnpatch_core.adapters import Place as BoundPlace
from nnpatch_core.engine import choose_engines
from nnpatch_core.interventions import PairArguments, read_pairs
from nnpatch_core.interventions.pairs import PairRuns
from nnpatch_core.sweep import (
    Options,
    Repairs,
    Sweep,
    Values,
    estimate_sweep,
    measure_sweep,
    prepare,
)
from nnpatch_core.testing import tiny_api, tiny_model
from nnpatch_core.tracing import Cell, Intervention, PatchedTokens
from tests.helpers.attribution import wide
from tests.helpers.attribution_oracle import AttributionOracle
from tests.helpers.oracle import Donor, Oracle, Place, Prompt, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

SOURCES = random_prompts((6, 5, 7), seed=1)
TARGETS = random_prompts((6, 5, 7), seed=2)
ANSWERS, OTHERS = (20, 21, 22), (30, 31, 32)
WIDTH = 7
API = tiny_api()

#: Makes an intervention of what the source run has, for the cells of a sweep.
Make = Callable[[Intervention, Sequence[Cell]], Intervention]


@attrs.frozen(eq=False)
class ByCell:
    """What the source run has, times a number of the cell's own."""

    recorded: Intervention
    cells: Sequence[Cell]
    by_cell: bool = True

    @property
    def mask(self) -> Tensor:
        return self.recorded.mask

    def patched(self, place: BoundPlace, there: Tensor, tokens: PatchedTokens) -> Tensor:
        shares = torch.tensor([share(cell.label) for cell in self.cells], dtype=there.dtype)
        return self.recorded.patched(place, there, tokens) * shares[tokens.cells][:, None]


@attrs.frozen(eq=False)
class Add:
    """A vector for each component, added to what stands there."""

    mask: Tensor
    by_cell: bool = False

    def patched(self, place: BoundPlace, there: Tensor, tokens: PatchedTokens) -> Tensor:
        return there + vector(place.name, there.shape[-1]).to(there.dtype)


def share(label: str) -> float:
    """A number of a cell's own, from 0.5 to 1.5."""
    return 0.5 + sum(map(ord, label)) % 11 / 10


def vector(component: str, width: int) -> Tensor:
    """The vector that is added at a component."""
    random = torch.Generator().manual_seed(sum(map(ord, component)))
    return torch.randn(width, generator=random, dtype=torch.float64)


@attrs.frozen(eq=False, kw_only=True)
class Runs(PairRuns):
    """Two runs, of which something else is put than what the source run has."""

    make: Make

    def values(self, sweep: Sweep) -> Values:
        plain = super().values(sweep)

        def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
            logits, recorded = plain.of(some, chunk)
            return logits, self.make(recorded, some.patches.cells)

        return Values(plain.mask, of, plain.depends)


MAKES: dict[str, Make] = {
    "by cell": ByCell,
    "add": lambda recorded, cells: Add(recorded.mask),
}


def prepared(
    model: Any, sites: Sequence[Site | MultiSite], make: str, **options: Any
) -> tuple[Sweep, Runs]:
    source, mask = lay_out(SOURCES, "mixed")
    target, _ = lay_out(TARGETS, "mixed", seed=1)
    nnmodel = as_nnsight(model)
    given = PairArguments(
        source, target, torch.tensor(ANSWERS), torch.tensor(OTHERS), attention_mask=mask
    )
    pairs = read_pairs(nnmodel, given)
    fields = {each.name: getattr(pairs, each.name) for each in attrs.fields(PairRuns) if each.init}
    runs = Runs(**fields, make=MAKES[make])
    layout = Sites.from_sites(sites)
    sweep, _ = prepare(nnmodel, None, layout, runs, "logit_difference", Options(**options))
    return sweep, runs


def site(name: str, layer: int, positions: Sequence[int], head: int | None = None) -> Site:
    return Site.get_site(API, name, layer, head, positions)


#: Each stage of a layer, single heads, several positions, all of them; in an order of their own.
SINGLE = [
    site("resid", 2, [-1]),
    site("resid_pre", 0, [-3]),
    site("o", 1, [-1], 2),
    site("q", 2, [-1, -2], 1),
    site("k", 1, [-2], 0),
    site("v", 0, [-4, -1]),
    site("mlp", 1, range(WIDTH)),
    site("attn", 2, [-1]),
    site("resid", 0, [-2, -5]),
    # At places where another cell is too.
    site("resid_pre", 0, [-2]),
    site("q", 2, [-1], 3),
    site("mlp", 1, [-1]),
]
#: Sites that act on one another, and two heads of one activation.
SEVERAL = [
    MultiSite([site("resid", 0, [-2]), site("mlp", 1, [-1])]),
    MultiSite([site("q", 1, [-1], 0), site("q", 1, [-1], 3)]),
]


def places(cell: Site | MultiSite) -> list[Place]:
    """A cell as the oracle has it."""
    return [
        Place(each.component, each.layer, each.head, tuple(WIDTH - p for p in each.group(WIDTH)))
        for each in cell.sites
    ]


def donor(oracle: Oracle, make: str, cell: Site | MultiSite, source: Prompt, own: Prompt) -> Donor:
    """What is put, by the oracle."""
    plain, number = oracle.of_prompt(source), share(cell.label)

    def times(place: Place, back: int) -> Tensor | None:
        value = plain(place, back)
        return None if value is None else value * number

    def plus(place: Place, back: int) -> Tensor | None:
        if back > len(own):
            return None
        before = oracle.activation(own, place.component, place.layer)[len(own) - back]
        return oracle.part(before + vector(place.component, len(before)).to(before.dtype), place)

    return times if make == "by cell" else plus


def values(outcome: Outcome, cells: Sequence[Site | MultiSite]) -> list[Tensor]:
    """`[batch]` of each cell, in the order of the list."""
    at = {name: iter(outcome.patched(name)) for name in outcome}
    return [next(at[cell.name]) for cell in cells]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("engine", ["full", "cone"])
@pytest.mark.parametrize("make", MAKES)
def test_engines(make: str, engine: str, batch_size: int | None) -> None:
    model = tiny_model("llama")
    oracle = Oracle(model, "llama")
    # What is added to depends on what an earlier site of the cell has done.
    cells = [*SINGLE, *(SEVERAL if make == "by cell" else SEVERAL[1:])]
    sweep, runs = prepared(model, cells, make, batch_size=batch_size)
    out = measure_sweep(sweep, runs, choose_engines(engine, sweep.patches))
    assert out.info["engine"] == engine
    for cell, patched in zip(cells, values(out, cells), strict=True):
        pairs = zip(SOURCES, TARGETS, ANSWERS, OTHERS, patched, strict=True)
        for source, target, answer, other, value in pairs:
            put = donor(oracle, make, cell, source, target)
            logits = oracle.replaced(target, places(cell), put)
            assert float(value) == pytest.approx(float(logits[answer] - logits[other]), abs=1e-4)


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("make", MAKES)
def test_gradients(make: str, batch_size: int | None) -> None:
    model = tiny_model("llama")
    oracle = AttributionOracle(model, "llama")
    model.double().set_attn_implementation("eager")
    cells = [*SINGLE, *(SEVERAL if make == "by cell" else SEVERAL[1:])]
    with wide():
        sweep, runs = prepared(model, cells, make, batch_size=batch_size)
        out = estimate_sweep(sweep.to_estimate(), runs, Repairs(None, False, False))
        targets = out.baseline.target
        for cell, patched in zip(cells, values(out, cells), strict=True):
            pairs = zip(SOURCES, TARGETS, ANSWERS, OTHERS, patched - targets, strict=True)
            for source, target, answer, other, value in pairs:
                put = donor(oracle, make, cell, source, target)

                def metric(logits: Tensor, ids: tuple[int, int] = (answer, other)) -> Tensor:
                    return logits[ids[0]] - logits[ids[1]]

                expected = oracle.joint(target, put, places(cell), metric)
                assert float(value) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("method", [Repairs(3, False, False), Repairs(None, True, True)])
def test_repairs_refuse_what_depends_on_the_cell(method: Repairs) -> None:
    sweep, runs = prepared(tiny_model("llama"), SINGLE, "by cell")
    with pytest.raises(PatchingError, match="defined for values that are the same in every cell"):
        estimate_sweep(sweep.to_estimate(), runs, method)


@attrs.frozen(eq=False)
class EverySecond:
    """In every second cell what stands there already, in the others its opposite."""

    mask: Tensor
    by_cell: bool = True

    def patched(self, place: BoundPlace, there: Tensor, tokens: PatchedTokens) -> Tensor:
        return torch.where((tokens.cells % 2 == 0).to(there.device)[:, None], there, -there)


def test_a_cell_that_changes_nothing_is_elided() -> None:
    sweep, runs = prepared(tiny_model("llama"), SINGLE, "add")
    runs = attrs.evolve(runs, make=lambda recorded, cells: EverySecond(recorded.mask))
    out = measure_sweep(sweep, runs, choose_engines("cone", sweep.patches))
    estimate = estimate_sweep(sweep.to_estimate(), runs, Repairs(None, False, False))
    every = [bool(each) for name in out for each in out.elided(name)]
    assert every == [bool(each) for name in estimate for each in estimate.elided(name)]
    # By name, in the order of the list.
    numbers = [SINGLE.index(each) for name in out for each in SINGLE if each.name == name]
    cells = sweep.patches.cells
    assert [cell.label for cell in cells] == [SINGLE[number].label for number in numbers]
    assert every == [number % 2 == 0 for number in range(len(cells))]
