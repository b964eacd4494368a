"""Estimates of sites in a subspace: against hooks and autograd, and against the exact sweeps."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from nnpatch_core import MultiSite, Site, Sites
from nnpatch_core.errors import MetricError, PositionError
from nnpatch_core.spaces import Features, Subspace
from tests.helpers.attribution import (
    ATOL,
    EXPECTED,
    METHODS,
    METRICS,
    Runs,
    check,
    plain,
    runs_of,
)
from tests.helpers.pairs import Pairs
from tests.helpers.strategies import ablations, lists_in_spaces, pairs_of, subspace

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: Of the tiny models: the residual stream, a head, and how many heads there are.
WIDTH, HEAD, QUERIES, KEYS = 32, 8, 4, 2
VARIANTS = ("llama", "gemma2", "gemma3, one key", "mistral, one key")
BOTH = {"seq_pos_type": "custom", "seq_pos": [-1, -3]}


def grids() -> list[Sites]:
    """Each component in a subspace of its own width: of a whole, or of each head."""
    return [
        Sites(["resid_pre", "attn", "mlp", "resid"], subspace=subspace(WIDTH, 3), **BOTH),
        Sites(["q", "k", "v", "o"], subspace=subspace(HEAD, 2), **BOTH),
    ]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_estimates_are_of_the_part_that_is_put(variant: str, method: str) -> None:
    runs = runs_of(variant, (6, 4, 5), (6, 4, 5))
    for sites in grids():
        out = runs.estimate(sites, **METHODS[method])
        assert check(out, runs, sites, EXPECTED[method]).abs().median() > 1e4 * ATOL


@pytest.mark.parametrize("component", ["q", "k", "v"])
@pytest.mark.parametrize("method", METHODS)
def test_a_subspace_of_a_component_as_a_whole_mixes_its_heads(component: str, method: str) -> None:
    runs = runs_of("llama", (6, 4), (6, 4))
    space = subspace(HEAD * (QUERIES if component == "q" else KEYS), 3)
    cells = [
        Site.get_site(runs.pairs.api, component, layer, seq_pos=[-2, -1], subspace=space)
        for layer in range(2)
    ]
    sites = Sites.from_sites(cells)
    check(runs.estimate(sites, **METHODS[method]), runs, sites, EXPECTED[method])


@pytest.mark.parametrize("name", ["resid", "q"])
@pytest.mark.parametrize("method", METHODS)
def test_cells_at_one_place_have_each_their_own(name: str, method: str) -> None:
    """With and without a subspace, in any order."""
    runs = runs_of("llama", (6, 4), (6, 4))
    spaces = [None, subspace(WIDTH, 2), subspace(WIDTH, 2, 1), None, subspace(WIDTH, 3)]
    for order in (spaces, spaces[::-1]):
        cells = [
            Site.get_site(runs.pairs.api, name, 1, seq_pos=[-2, -1], subspace=space)
            for space in order
        ]
        sites = Sites.from_sites(cells)
        check(runs.estimate(sites, **METHODS[method]), runs, sites, EXPECTED[method])


@pytest.mark.parametrize("ablation", ["zero", "mean"])
@pytest.mark.parametrize("method", ["plain", "steps", "QK fix"])
@pytest.mark.parametrize("batch_size", [None, 1])
def test_estimates_of_ablations(ablation: str, method: str, batch_size: int | None) -> None:
    runs = runs_of("llama", (6, 4), (6, 4), ablation=ablation)
    for sites in grids():
        out = runs.estimate(sites, batch_size=batch_size, **METHODS[method])
        check(out, runs, sites, EXPECTED[method])


@given(st.data(), pairs_of(), st.sampled_from(METRICS))
@settings(max_examples=60)
def test_any_estimate_is_that_of_the_oracle(data: st.DataObject, pairs: Pairs, metric: str) -> None:
    """Sites patched together may overlap, and what one lets through reaches the next."""
    sites = data.draw(lists_in_spaces(pairs))
    runs = Runs(pairs)
    try:
        out = runs.estimate(sites, metric)
    except (MetricError, PositionError):
        # Runs that do not differ, or positions that are padding in every prompt.
        reject()
    check(out, runs, sites, plain, metric)


@given(st.data(), ablations(), st.sampled_from(METRICS[:-1]), st.sampled_from([None, 1]))
@settings(max_examples=30)
def test_any_ablation_is_that_of_the_oracle(
    data: st.DataObject, runs: Runs, metric: str, batch_size: int | None
) -> None:
    sites = data.draw(lists_in_spaces(runs.pairs))
    try:
        out = runs.estimate(sites, metric, batch_size=batch_size)
    except PositionError:
        reject()
    check(out, runs, sites, plain, metric)


def effects(runs: Runs, name: str, space: object, **options: object) -> torch.Tensor:
    out = runs.estimate(Sites(name, subspace=space, **BOTH), **options)
    (found,) = out.raw.values()
    return found[name] - out.baseline.target


@pytest.mark.parametrize("method", ["plain", "steps", "QK fix"])
@pytest.mark.parametrize(("name", "width"), [("resid", WIDTH), ("mlp", WIDTH), ("v", HEAD)])
def test_subspaces_that_complete_each_other_add_up(name: str, width: int, method: str) -> None:
    """To first order; along a path they do not, as each has a path of its own."""
    runs = runs_of("llama", (6, 4), (6, 4))
    basis = subspace(width, width).basis
    parts = [
        effects(runs, name, part, **METHODS[method])
        for part in (None, Subspace(basis), Subspace(basis[:, :3]), Subspace(basis[:, 3:]))
    ]
    whole, full, one, rest = parts
    torch.testing.assert_close(full, whole, atol=ATOL, rtol=1e-9)
    assert one.abs().max() > 1e-3
    close = torch.allclose(one + rest, whole, atol=ATOL, rtol=1e-9)
    assert close == (method != "steps")


@pytest.mark.parametrize("second", [None, 0, 1])
@pytest.mark.parametrize("names", [("resid", "resid"), ("resid", "mlp"), ("attn", "resid")])
def test_patched_together_each_lets_the_rest_through(
    names: tuple[str, str], second: int | None
) -> None:
    """Against finite differences of the patched run, without autograd."""
    runs = runs_of("llama", (6, 4), (6, 4))
    layers = (1, 1) if names == ("resid", "resid") else (0, 1)
    spaces = subspace(WIDTH, 2), None if second is None else subspace(WIDTH, 2, second)
    cells = [
        Site.get_site(runs.pairs.api, name, layer, seq_pos=[-1, -2], subspace=space)
        for name, layer, space in zip(names, layers, spaces, strict=True)
    ]
    sites = Sites.from_sites([MultiSite(cells)])
    out = runs.estimate(sites)
    moved = (out.patched("+".join(dict.fromkeys(names))) - out.baseline.target)[0]
    ((_, _, places),) = runs.cells(out, sites)
    given = zip(runs.pairs.target, runs.sources, runs.metrics("bent"), strict=True)
    expected = [
        runs.oracle.finite_difference(one, other, places, each) for one, other, each in given
    ]
    torch.testing.assert_close(moved, torch.tensor(expected).to(moved), atol=1e-8, rtol=1e-6)
    assert moved.abs().min() > 1e-4


class Codes(nn.Module):
    """A sparse autoencoder with weights that want gradients, as they do when it was just made."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.down = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH, generator=generator).double() / 6)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.down - 0.1).relu()

    def decode(self, c: torch.Tensor) -> torch.Tensor:
        return c @ self.down.T


@pytest.mark.parametrize("method", METHODS)
def test_features_are_estimated_as_what_they_put(method: str) -> None:
    """A first-order estimate is of what the autoencoder would put there, which is not linear."""
    runs = runs_of("llama", (6, 4), (6, 4))
    space = Features(Codes(), [3, 5, 8, 13, 21, 34, 55, 89])
    site = Site.get_site(runs.pairs.api, "resid", 1, seq_pos=[-1], subspace=space)
    out = runs.estimate(Sites.from_sites([site]), **METHODS[method])
    exact = runs.patch(Sites.from_sites([attrs.evolve(site)]))
    (found,), (patched,) = out.raw.values(), exact.raw.values()
    moved = patched["resid"] - exact.baseline.target
    assert moved.abs().min() > 1e-4
    estimated = (found["resid"] - out.baseline.target).abs()
    assert ((estimated - moved.abs()).abs() < 0.5 * moved.abs()).all()
    assert not found["resid"].requires_grad
