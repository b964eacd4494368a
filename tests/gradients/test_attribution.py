"""Attribution patching against autograd by hand, and against forwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import MultiSite, Site, Sites, ablation_patching
from nnpatch_core.errors import MetricError, PositionError
from tests.helpers.attribution import (
    LAYERS,
    METHODS,
    METRICS,
    Runs,
    along,
    bent,
    check,
    check_laid,
    plain,
    runs_of,
    wide,
)
from tests.helpers.oracle import COMPONENTS, Place, random_prompts
from tests.helpers.pairs import VARIANTS, Pairs
from tests.helpers.strategies import ablations, grids, lists_of_sites, pairs_of

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")


# Against the oracle.


@pytest.mark.parametrize("variant", NAMES := tuple(VARIANTS))
def test_every_component_head_and_position(variant: str) -> None:
    runs = runs_of(variant, (7, 6, 4), (7, 5, 6))
    sites = Sites(COMPONENTS, seq_pos_type="each")
    effects = check(runs.estimate(sites), runs, sites, plain)
    # Keys and values of the last layer are among the few that a window hides.
    assert (effects.abs() > 1e-4).double().mean() > 0.3
    assert effects.abs().max() > 0.3


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma2", "gemma3"])
def test_every_component_head_and_position_along_paths(variant: str) -> None:
    runs = runs_of(variant, (5, 3), (4, 5))
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = runs.estimate(sites, steps=2)
    assert out.kind == "attribution (integrated, 2 steps)"
    assert check(out, runs, sites, along(2)).abs().max() > 0.3


@given(st.data(), pairs_of(), st.sampled_from(METRICS))
@settings(max_examples=45)
def test_any_estimate_is_that_of_the_oracle(data: st.DataObject, pairs: Pairs, metric: str) -> None:
    sites = data.draw(grids(pairs) | lists_of_sites(pairs))
    runs = Runs(pairs)
    try:
        out = runs.estimate(sites, metric)
    except (MetricError, PositionError):
        # Runs that do not differ, or positions that are padding in every prompt.
        reject()
    check(out, runs, sites, plain, metric)
    check(out.magnitudes(), runs, sites, plain, metric)


@given(st.data(), pairs_of(), st.sampled_from(METRICS), st.integers(1, 4))
@settings(max_examples=25)
def test_any_path_is_that_of_the_oracle(
    data: st.DataObject, pairs: Pairs, metric: str, steps: int
) -> None:
    sites = data.draw(grids(pairs))
    runs = Runs(pairs)
    try:
        out = runs.estimate(sites, metric, steps=steps)
    except (MetricError, PositionError):
        reject()
    check(out, runs, sites, along(steps), metric)


@given(st.data(), ablations(), st.sampled_from(METRICS[:-1]))
@settings(max_examples=50)
def test_any_ablation_is_that_of_the_oracle(data: st.DataObject, runs: Runs, metric: str) -> None:
    sites = data.draw(grids(runs.pairs) | lists_of_sites(runs.pairs))
    try:
        out = runs.estimate(sites, metric)
    except PositionError:
        reject()
    assert out.scale == "change"
    check(out, runs, sites, plain, metric)


@pytest.mark.parametrize("metric", ["bent", "kl_divergence"])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_along_paths(ablation: str, per_position: bool, metric: str) -> None:
    """KL divergence from the unablated run is flat there, so that only a path tells of it."""
    runs = runs_of("llama", (5, 3), (5, 3), ablation=ablation, per_position=per_position)
    sites = Sites(["resid_pre", "q", "v", "mlp"], seq_pos_type="each")
    out = runs.estimate(sites, metric, steps=2)
    assert check(out, runs, sites, along(2), metric).abs().max() > 0.05


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_an_ablation_can_be_laid_on_the_exact_one(method: str, per_position: bool) -> None:
    runs = runs_of("llama", (6, 4), (6, 4), ablation=method, per_position=per_position)
    sites = Sites(["resid", "k", "mlp"], seq_pos_type="each")
    given = runs.given
    same = {"reference": given["reference"]} if "reference" in given else {}
    if method == "mean":
        same["per_position"] = per_position
    with wide():
        exact = ablation_patching(
            runs.model,
            runs.pairs.api,
            sites,
            given["target_tokens"],
            *runs.pairs.answers,
            attention_mask=given["target_attention_mask"],
            method=method,
            metric=bent,
            engine="full",
            progress=False,
            **same,
        )
    found = runs.estimate(sites)
    assert found.kind == f"attribution ({method})"
    check_laid(found, exact)


def test_an_estimate_can_be_laid_on_the_exact_sweep() -> None:
    runs = runs_of("gemma2", (6, 4), (5, 5))
    sites = Sites(["resid", "k", "mlp"], layers=[0, 2], seq_pos_type="lastk", seq_pos=3, heads=[1])
    check_laid(runs.estimate(sites), runs.patch(sites))
    each = Site.get_site(runs.pairs.api, "mlp", 1), Site.get_site(runs.pairs.api, "q", 1, 0)
    listed = Sites.from_sites([*each, MultiSite(each)])
    check_laid(runs.estimate(listed), runs.patch(listed))


def test_one_site_in_a_multi_site_is_that_site() -> None:
    """By every method, as nothing is patched together."""
    runs = runs_of("llama", (6, 4), (5, 5))
    site = Site.get_site(runs.pairs.api, "k", 1, 0, [-1, -2])
    for options in METHODS.values():
        out = runs.estimate(Sites.from_sites([site, MultiSite([site], name="alone")]), **options)
        assert torch.equal(out["k"], out["alone"])
        assert out["k"].abs().max() > 1e-4


# Against forwards.


@given(
    st.sampled_from(NAMES),
    st.sampled_from(COMPONENTS),
    st.integers(0, LAYERS - 1),
    st.lists(st.integers(-6, -1), min_size=1, max_size=4, unique=True),
    st.integers(0, 10_000),
    st.data(),
)
@settings(max_examples=45)
def test_a_short_step_is_what_is_estimated(
    variant: str, component: str, layer: int, positions: list[int], seed: int, data: st.DataObject
) -> None:
    """Patched a share of the way to the source, a metric moves by that share of the estimate."""
    prompts = random_prompts((6,), seed), random_prompts((6,), seed + 1)
    runs = Runs(Pairs(variant, *prompts))
    (source,), (target,), (metric,) = *prompts, runs.metrics("bent")
    oracle = runs.oracle
    head = data.draw(st.sampled_from([*oracle.heads(component), None]))
    site = Site.get_site(runs.pairs.api, component, layer, head, positions)
    place = Place(component, layer, head, tuple(-at for at in positions))
    out = runs.estimate(Sites.from_sites([site]))
    estimate = float(out.patched(component)[0, 0] - out.baseline.target[0])
    before = float(metric(oracle.logits(target)))

    def moved(share: float) -> float:
        def donor(place: Place, back: int) -> Tensor:
            own, other = (
                oracle.part(oracle.activation(each, component, layer)[len(each) - back], place)
                for each in (target, source)
            )
            return own + share * (other - own)

        return float(metric(oracle.replaced(target, [place], donor))) - before

    # What is not of first order falls with the step; so its size at one tells it at another.
    whole = abs(moved(0.01) / 0.01 - estimate)
    for share in (1e-4, 1e-6):
        gap = abs(moved(share) / share - estimate)
        # Rounding of two metrics over the step.
        assert gap <= 3e2 * share * (whole + abs(estimate)) + 1e-13 / share


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma2", "gemma3"])
def test_ratios_tend_to_one(variant: str) -> None:
    """The same in ratios, for the strongest cells, with nothing but nnpatch's own grid."""
    runs = runs_of(variant, (6,), (6,))
    (source,), (target,), (metric,) = runs.pairs.source, runs.pairs.target, runs.metrics("bent")
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = runs.estimate(sites)
    before, ratios = float(metric(runs.oracle.logits(target))), []
    for name, number, (place,) in runs.cells(out, sites):
        estimate = float(out.raw["bent"][name][number, 0] - out.baseline.target[0])
        if abs(estimate) < 0.02:
            continue
        row = []
        for share in (1e-2, 1e-4, 1e-6):
            moves = {
                back: runs.oracle.part(
                    (1 - share) * runs.oracle.activation(target, name, place.layer)[-back]
                    + share * runs.oracle.activation(source, name, place.layer)[-back],
                    place,
                )
                for back in place.from_end
            }
            logits = runs.oracle.replaced(target, [place], lambda _, back, moves=moves: moves[back])
            row.append((float(metric(logits)) - before) / share / estimate - 1)
        ratios.append(row)
    gaps = torch.tensor(ratios).abs().max(0).values.tolist()
    assert len(ratios) > 20
    assert gaps[0] > 50 * gaps[1] > 2500 * gaps[2]
    assert gaps[2] < 1e-3
