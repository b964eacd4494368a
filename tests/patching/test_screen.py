"""Screened sweeps: what an estimate chooses is measured, and what it missed has a bound."""

from __future__ import annotations

import functools
import warnings
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import (
    DecoderAPI,
    MultiSite,
    Outcome,
    Site,
    Sites,
    activation_patching,
    attribution_patching,
    decoder_components,
)
from nnpatch_core.errors import AdapterWarning, CheckpointError, MetricError, OutcomeError
from nnpatch_core.results import Screening
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.attribution import bent
from tests.helpers.oracle import COMPONENTS, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

ANSWERS = torch.tensor([7, 8, 9]), torch.tensor([50, 49, 48])
SITES = Sites(COMPONENTS, seq_pos_type="each")
METRICS: list[Any] = ["logit_difference", bent]
SCREENS = {"attribution": {}, "atp*": {"qk_fix": True}}
TOP, SPOTS = 20, 15


@functools.cache
def model_of(family: str = "llama") -> Any:
    return tiny_model(family)


@functools.cache
def tokens() -> tuple[torch.Tensor, ...]:
    """Source and target; all prompts begin alike, and two are padded."""
    source, target = random_prompts((7, 6, 4), seed=1), random_prompts((7, 6, 4), seed=2)
    target = [one[:2] + other[2:] for one, other in zip(source, target, strict=True)]
    (first, mask), (second, _) = (lay_out(each, "left", seed=3) for each in (source, target))
    return first, second, mask


def arguments(**options: Any) -> dict[str, Any]:
    source, target, mask = tokens()
    given = {
        "source_tokens": source,
        "target_tokens": target,
        "source_answer_index": ANSWERS[0],
        "target_answer_index": ANSWERS[1],
        "attention_mask": mask,
        "metric": METRICS,
        "progress": False,
    }
    return {**given, **options}


def sweep(sites: Any = SITES, model: Any = None, **options: Any) -> Outcome:
    return activation_patching(model or model_of(), None, sites, **arguments(**options))


def estimate(sites: Any = SITES, **options: Any) -> Outcome:
    return attribution_patching(model_of(), None, sites, **arguments(**options))


@pytest.fixture(scope="module")
def full() -> Outcome:
    return sweep()


@pytest.fixture(scope="module")
def estimates() -> dict[str, Outcome]:
    return {by: estimate(**options) for by, options in SCREENS.items()}


@pytest.fixture(scope="module")
def rankings(estimates: dict[str, Outcome]) -> dict[str, Outcome]:
    """What each screen orders the cells by."""
    return {
        "attribution": estimates["attribution"],
        "atp*": estimate(qk_fix=True, grad_drop=True),
    }


@pytest.fixture(scope="module", params=SCREENS)
def screened(request: pytest.FixtureRequest) -> Outcome:
    return sweep(screen=request.param, top_k=TOP, spot_checks=SPOTS, seed=3)


def cells(out: Outcome) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(at)) for name in out for at in out.cells[name].index.tolist()]


def sizes(out: Outcome) -> dict[tuple[str, tuple[int, ...]], float]:
    return {(name, at): abs(float(out[name][at])) for name, at in cells(out)}


def known(out: Outcome) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, at) for name, at in cells(out) if bool(out.exact(name)[at])}


# What is in it.


@pytest.mark.parametrize("metric", ["logit_difference", "bent"])
def test_exact_cells_are_measured_and_others_estimated(
    screened: Outcome, full: Outcome, estimates: dict[str, Outcome], metric: str
) -> None:
    expected = estimates[screened.screening.by].for_metric(metric)
    shown, measured = screened.for_metric(metric), full.for_metric(metric)
    assert list(shown) == list(COMPONENTS)
    for name in shown:
        exact = shown.exact(name)
        torch.testing.assert_close(shown[name][exact], measured[name][exact], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(
            shown[name][~exact], expected[name][~exact], rtol=1e-4, atol=2e-5
        )
        assert shown.axes(name) == measured.axes(name)
        assert torch.equal(shown.cells[name].index, measured.cells[name].index)
        assert torch.equal(shown.cells[name].present, measured.cells[name].present)
    assert screened.metrics == full.metrics
    assert screened.estimated


def test_exact_are_the_most_promising_the_spots_and_what_is_known(
    screened: Outcome, estimates: dict[str, Outcome], rankings: dict[str, Outcome]
) -> None:
    by = screened.screening.by
    exact, sure = known(screened), known(estimates[by])
    ranked = sizes(rankings[by])
    unsure = sorted((cell for cell in ranked if cell not in sure), key=lambda each: -ranked[each])
    top = set(unsure[:TOP])
    assert top <= exact
    assert sure <= exact
    spots = exact - top - sure
    assert len(spots) == SPOTS
    found = screened.screening
    assert (found.chosen, found.rest, found.checked) == (TOP, len(unsure) - TOP, SPOTS)
    # The largest is of the first metric, and of what was measured.
    assert found.largest == max(sizes(screened)[cell] for cell in spots)
    assert screened.kind == f"activation, screened by {by}"
    assert screened.scale == "restored"
    assert not screened.magnitude


def test_atp_star_orders_queries_and_keys_by_both_repairs() -> None:
    sites = Sites(["q", "k"], seq_pos_type="each")

    def first(**options: Any) -> set:
        ranked = estimate(sites, **options)
        found, sure = sizes(ranked), known(ranked)
        return set(sorted(found.keys() - sure, key=lambda each: -found[each])[:6])

    out = sweep(sites, screen="atp*", top_k=6, spot_checks=0)
    expected = first(qk_fix=True, grad_drop=True)
    assert known(out) == expected | known(estimate(sites))
    assert all(expected != first(**{name: True}) for name in ("qk_fix", "grad_drop"))
    assert expected != first()


def test_what_changes_nothing_is_exactly_nothing(screened: Outcome, full: Outcome) -> None:
    """What is put there is what was there: the run is the unpatched one, to the last bit."""
    for metric in screened.metrics:
        shown = screened.for_metric(metric)
        for name in shown:
            elided = full.elided(name)
            assert elided.any()
            assert (shown.elided(name) >= elided).all()
            assert not shown[name][elided].any()
            raw = shown.patched(name)[shown.elided(name)]
            assert torch.equal(raw, shown.baseline.target.expand_as(raw))


def test_the_bound_holds_here(screened: Outcome, full: Outcome) -> None:
    """Whatever the screen, some count of cells left out is larger than all spots."""
    larger = sum(
        size > screened.screening.largest + 1e-6
        for cell, size in sizes(full).items()
        if cell not in known(screened)
    )
    assert larger <= screened.screening.missed_at_most(0.999)
    assert screened.screening.missed_at_most(0.999) > screened.screening.missed_at_most(0.5)


def test_marks_are_in_every_form(screened: Outcome) -> None:
    frame = screened.to_dataframe(level=None)
    assert set(frame.columns) >= {"site", "layer", "position", "head", "token", "value", "exact"}
    swept = frame[frame["value"].notna()]
    assert swept["exact"].sum() == len(known(screened))
    assert len(swept) == len(cells(screened))
    each = screened.to_dataframe(per_prompt=True)
    assert each["exact"].sum() == 3 * len(known(screened))
    strongest = screened.strongest(500)
    assert len(strongest) == len(cells(screened))
    for row in strongest:
        place = [row[key] for key in ("layer", "position", "head") if key in row]
        assert row["exact"] == bool(screened.exact(row["site"])[tuple(place)])
    assert "exact" not in sweep(Sites("mlp")).to_dataframe(level=None)


def test_a_file_keeps_marks_and_figures(screened: Outcome, tmp_path: Path) -> None:
    screened.save(tmp_path / "out.safetensors")
    found = Outcome.load(tmp_path / "out.safetensors")
    assert found.screening == screened.screening
    assert (found.kind, found.magnitude, found.estimated) == (screened.kind, False, True)
    for name in screened:
        assert torch.equal(found[name], screened[name])
        assert torch.equal(found.exact(name), screened.exact(name))
        assert torch.equal(found.flat(name), screened.flat(name))
    sized = estimate(Sites("resid"), grad_drop=True)
    sized.save(tmp_path / "sized.safetensors")
    found = Outcome.load(tmp_path / "sized.safetensors")
    assert (found.magnitude, found.screening, found.estimated) == (True, None, True)
    assert torch.equal(found["resid"], sized["resid"])


def test_cells_that_are_flat_are_those_of_the_estimate(estimates: dict[str, Outcome]) -> None:
    """Estimates of 0 beside what is known; a measured cell is not one, whatever its value."""
    out = activation_patching(
        model_of("mistral"), None, SITES, **arguments(screen="attribution", top_k=5, spot_checks=0)
    )
    alone = attribution_patching(model_of("mistral"), None, SITES, **arguments())
    for name in out:
        assert torch.equal(out.flat(name), alone.flat(name) & ~out.exact(name))
        assert not out[name][out.flat(name)].any()
    assert out.flat("k").any()


# How it is made.


def test_a_seed_draws_the_spots() -> None:
    def drawn(seed: int) -> set:
        out = sweep(screen="attribution", top_k=3, spot_checks=6, seed=seed)
        return known(out)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set.intersection(*map(drawn, range(4)))) < len(drawn(0))


def test_every_cell_left_is_as_likely_to_be_drawn() -> None:
    sites = Sites(["mlp", "resid_pre"], seq_pos_type="lastk", seq_pos=2)
    base = known(sweep(sites, screen="attribution", top_k=2, spot_checks=0))
    counts: dict[Any, int] = {}
    for seed in range(60):
        for cell in known(sweep(sites, screen="attribution", top_k=2, spot_checks=2, seed=seed)):
            counts[cell] = counts.get(cell, 0) + (cell not in base)
    drawn = {cell: count for cell, count in counts.items() if count}
    left = len(cells(sweep(sites))) - len(base)
    assert len(drawn) == left
    # Each with the probability 2 / left: far off that is rarer than one in a million.
    assert all(abs(count - 120 / left) < 5 * (120 / left) ** 0.5 for count in drawn.values())


@pytest.mark.parametrize("by", SCREENS)
def test_engines_measure_the_same(by: str) -> None:
    options = {"screen": by, "top_k": TOP, "seed": 1}
    cone, whole = (sweep(engine=engine, **options) for engine in ("cone", "full"))
    assert (cone.info["engine"], whole.info["engine"]) == ("cone", "full")
    assert known(cone) == known(whole)
    assert cone.screening.checked == TOP
    for name in cone:
        torch.testing.assert_close(cone[name], whole[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 2}], ids=str)
def test_prompts_may_be_cut(options: Any) -> None:
    given = {"screen": "atp*", "top_k": TOP, "seed": 1}
    whole, cut = sweep(**given), sweep(**given, **options)
    assert known(whole) == known(cut)
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-4, atol=2e-5)


def test_more_than_there_are_is_the_whole_sweep(full: Outcome) -> None:
    out = sweep(screen="attribution", top_k=10_000, spot_checks=10_000)
    assert not out.estimated
    found = out.screening
    assert (found.rest, found.checked, found.largest) == (0, 0, 0)
    assert found.missed_at_most() == 0
    for name in out:
        torch.testing.assert_close(out[name], full[name], rtol=1e-4, atol=2e-5)
        assert out.exact(name)[out.swept(name)].all()
        assert not out.flat(name).any()


def test_spots_are_as_many_as_the_top_or_as_are_left() -> None:
    sites = Sites("mlp", seq_pos_type="lastk", seq_pos=2)
    # Six cells: one is known, as no other token reads it.
    for top, wanted, expected in ((1, None, 1), (1, 0, 0), (1, 9, 4), (4, None, 1), (5, None, 0)):
        out = sweep(sites, screen="attribution", top_k=top, spot_checks=wanted)
        found = out.screening
        assert (found.chosen, found.rest, found.checked) == (top, 5 - top, expected)
        assert out.exact("mlp").sum() == 1 + top + expected
        if not expected:
            assert found.largest == 0
            assert found.missed_at_most() == 5 - top


@pytest.mark.parametrize("by", SCREENS)
@pytest.mark.parametrize("engine", ["cone", "full"])
def test_where_all_is_known_nothing_is_left(by: str, engine: str) -> None:
    """The prompts begin alike: their first two positions hold nothing else."""
    sites = Sites(["resid", "k"], seq_pos_type="custom", seq_pos=[0, 1])
    out = sweep(sites, screen=by, top_k=4, engine=engine)
    assert not out.estimated
    assert (out.screening.rest, out.screening.checked) == (0, 0)
    for name in out:
        assert not out[name].any()
        if engine == "cone":
            assert out.elided(name)[out.swept(name)].all()


def test_a_checkpoint_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screened sweep that broke off measures what was left; one of other cells is refused."""
    from nnpatch_core.sweep import checkpoint as module

    path = tmp_path / "sweep.safetensors"
    options = {"screen": "attribution", "top_k": TOP, "spot_checks": 5}
    expected = sweep(**options)

    real, calls = module.Checkpoint.save, []

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        real(self, *args, **kwargs)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.Checkpoint, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        sweep(**options, checkpoint=path, batch_size=1)
    monkeypatch.undo()
    assert path.exists()
    with pytest.raises(CheckpointError):
        sweep(**{**options, "top_k": TOP + 1}, checkpoint=path, batch_size=1)
    found = sweep(**options, checkpoint=path, batch_size=1)
    assert found.screening.chosen == TOP
    assert known(found) == known(expected)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("by", SCREENS)
def test_padding_without_a_mask_is_told_once(by: str) -> None:
    model = tiny_model()
    model.config.pad_token_id = int(tokens()[0][0, -1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sweep(model=model, attention_mask=None, screen=by, top_k=1, spot_checks=0)
    told = [str(each.message).split()[0] for each in caught]
    assert told == ["source_tokens"]


@pytest.mark.parametrize("by", SCREENS)
def test_an_adapter_of_another_type_is_told_once(by: str) -> None:
    other = DecoderAPI("Other", ("other",), decoder_components())
    with pytest.warns(AdapterWarning) as caught:
        activation_patching(model_of(), other, SITES, **arguments(), screen=by, top_k=1)
    assert [each.category for each in caught].count(AdapterWarning) == 1


def test_lists_of_sites_and_sites_together() -> None:
    get = functools.partial(Site.get_site, tiny_api())
    several = [
        MultiSite([get("mlp", 0), get("attn", 1)], name="both"),
        get("q", 1, 2),
        get("k", 0, None, [-1]),
        get("k", 2, 1, [-2, -3]),
    ]
    sites = Sites.from_sites(several)
    out = sweep(sites, screen="attribution", top_k=1, spot_checks=1)
    exact = sweep(sites)
    alone = estimate(sites)
    assert sum(int(out.exact(name).sum()) for name in out) == 2
    for name in out:
        marks = out.exact(name)
        torch.testing.assert_close(out[name][marks], exact[name][marks], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(out[name][~marks], alone[name][~marks], rtol=1e-4, atol=2e-5)
    assert set(out.to_dataframe(level=None)["exact"]) == {True, False}


def test_the_first_metric_orders_the_cells() -> None:
    options = {"screen": "attribution", "top_k": TOP, "spot_checks": 0}
    first, second = (
        known(sweep(metric=metrics, **options)) for metrics in (METRICS, METRICS[::-1])
    )
    assert first != second
    assert known(sweep(metric="logit_difference", **options)) == first
    with pytest.raises(MetricError, match="'off' is not differentiable"):
        sweep(metric={"fine": bent, "off": lambda logits: logits[:, 5].detach()}, **options)


def test_agreement_is_of_what_was_measured(
    screened: Outcome, estimates: dict[str, Outcome]
) -> None:
    """A screened sweep is exact where it was measured, and there alone."""
    found = estimates["attribution"].agreement(screened)
    compared = sum(len(each.index) for each in found.sites.values())
    assert compared == TOP + SPOTS


# The bound.


def most_missed(rest: int, checked: int, confidence: Fraction) -> int:
    """The most cells that such a draw may have missed all of, by counting draws."""
    unseen = rest - checked
    return max(
        count
        for count in range(unseen + 1)
        if Fraction(comb(rest - count, checked), comb(rest, checked)) > 1 - confidence
    )


@given(
    st.integers(1, 60),
    st.data(),
    st.fractions(Fraction(1, 97), Fraction(96, 97), max_denominator=97),
)
@settings(max_examples=200)
def test_the_bound_is_that_of_counting_draws(
    rest: int, data: st.DataObject, confidence: Fraction
) -> None:
    checked = data.draw(st.integers(0, rest))
    found = Screening("attribution", 3, rest, checked, 0.5).missed_at_most(float(confidence))
    # Where a count meets the confidence to the last digit, either side of it is right.
    slack = Fraction(1, 10**12)
    low, high = (most_missed(rest, checked, confidence + off) for off in (-slack, slack))
    assert low <= found <= high


def test_bounds_by_hand() -> None:
    def bound(rest: int, checked: int, confidence: float = 0.95) -> int:
        return Screening("atp*", 1, rest, checked, 0.1).missed_at_most(confidence)

    assert bound(0, 0) == bound(10, 10) == 0
    assert bound(10, 0) == 10
    # One of two was seen: the other may be larger with one half.
    assert (bound(2, 1, 0.4), bound(2, 1, 0.6)) == (0, 1)
    assert (bound(100, 99, 0.98), bound(100, 99, 0.995)) == (0, 1)
    # Of many cells, 59 draws without one are fewer than 5 in 100 where one in 20 is one.
    assert bound(10**6, 59) == pytest.approx(10**6 * 0.0495, rel=0.01)
    for confidence in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(OutcomeError, match="confidence"):
            bound(10, 5, confidence)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 10_000))
@settings(max_examples=30)
def test_the_bound_is_seldom_wrong(rest: int, checked: int, seed: int) -> None:
    """Whatever the cells, in nine draws of ten."""
    checked = min(checked, rest)
    random = torch.Generator().manual_seed(seed)
    values = torch.rand(rest, generator=random)
    right = 0
    for _ in range(200):
        order = torch.randperm(rest, generator=random)
        largest = float(values[order[:checked]].max()) if checked else 0.0
        missed = int((values[order[checked:]] > largest).sum())
        right += missed <= Screening("a", 1, rest, checked, largest).missed_at_most(0.9)
    # Six standard deviations below what it must be.
    assert right > 200 * 0.9 - 6 * (200 * 0.09) ** 0.5


@pytest.mark.parametrize("confidence", [0, 1, 1.5, float("nan"), None, "0.95", True, [0.5], 1j])
def test_a_confidence_is_between_0_and_1(confidence: Any) -> None:
    screening = Screening("attribution", chosen=2, rest=10, checked=2, largest=0.1)
    with pytest.raises(OutcomeError, match="confidence must be between 0 and 1, got"):
        screening.missed_at_most(confidence)
