"""Sums of outcomes: their values, their statistics beside plain loops, and what cannot be added."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import t as student

from nnpatch_core import Sites, activation_patching, attribution_patching
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.results import Combination, Moments, means_of
from nnpatch_core.sites import Axis
from nnpatch_core.testing import tiny_model
from tests.helpers.made import made
from tests.helpers.statistics_oracle import mean, studentised

RANDOM = np.random.default_rng(5)
PROMPTS = 20
WHOLE = RANDOM.normal(4, 0.5, PROMPTS)
ONE = RANDOM.normal(1, 1, (3, PROMPTS))
#: Of the same prompts: what one has, and a little more.
OTHER = ONE + RANDOM.normal(0.5, 0.2, (3, PROMPTS))
#: Of other prompts, and fewer.
APART = RANDOM.normal(1, 1, (3, 14))
APART_WHOLE = RANDOM.normal(6, 0.5, 14)
OTHER_TOKENS = list(range(500, 514))


def paired() -> Combination:
    return made(OTHER, WHOLE * 1.5) - made(ONE, WHOLE)


def apart() -> Combination:
    return made(APART, APART_WHOLE, tokens=OTHER_TOKENS) - made(ONE, WHOLE)


def test_values_add_up() -> None:
    one, other = made(ONE, WHOLE), made(OTHER, WHOLE * 1.5)
    first, second = one["mlp"].double(), other["mlp"].double()
    for found, expected in (
        (one - other, first - second),
        (one + other, first + second),
        ((one + other) / 2, (first + second) / 2),
        (one * 3, 3 * first),
        (0.5 * one - other * 2, 0.5 * first - 2 * second),
        (-(one - other), second - first),
        ((one - other) - (one - other), 0 * first),
    ):
        torch.testing.assert_close(found["mlp"].double(), expected, rtol=1e-6, atol=1e-6)
    assert list(one - other) == ["mlp"]
    assert len(one - other) == 1


def test_other_things_are_not_added() -> None:
    one = made(ONE, WHOLE)
    for wrong in (None, "mlp", {"mlp": 1}, torch.ones(3)):
        with pytest.raises(TypeError):
            one - wrong
    operations: list[Callable[[Any], Any]] = [lambda x: x * "2", lambda x: x * True]
    operations += [lambda x: x / 0, lambda x: x * math.nan, lambda x: x / "2"]
    for operation in operations:
        for each in (one, one - one):
            with pytest.raises(TypeError):
                operation(each)


def test_it_says_how_it_was_made() -> None:
    one, other = made(ONE, WHOLE), attrs.evolve(made(OTHER, WHOLE), kind="attribution")
    assert (other - one).kind == "attribution - activation"
    assert (-one).kind == "- activation"
    assert ((one + other) / 2).kind == "0.5 x activation + 0.5 x attribution"
    assert repr(other - one) == "Combination(attribution - activation, given: mlp [3])"
    assert repr(apart()).endswith("mlp [3]; prompts of their own)")
    named = [attrs.evolve(made(ONE, WHOLE), info={"model": name, "a": "b"}) for name in "xy"]
    assert (named[0] - named[1]).info == {"model": "x | y", "a": "b"}


def test_a_notebook_shows_it() -> None:
    page = (made(OTHER, WHOLE) - made(ONE, WHOLE))._repr_html_()
    for words in ("Combination: activation - activation", "20 of 1 tokens", "The strongest", "low"):
        assert words in page, words
    assert "14, 20 of 1 tokens" in apart()._repr_html_()
    assert (made(OTHER, WHOLE) - made(ONE, WHOLE))._ipython_key_completions_() == ["mlp"]


# Which prompts are drawn together ----------------------------------------------------------------


def test_the_same_prompts_are_paired_in_whatever_order() -> None:
    order = RANDOM.permutation(PROMPTS)
    tokens = [int(each) + 1 for each in order]
    mixed = made(OTHER[:, order], WHOLE[order] * 1.5, tokens=tokens) - made(ONE, WHOLE)
    assert paired().paired
    assert mixed.paired
    assert not apart().paired
    for figure in ("interval", "band"):
        first, second = getattr(paired(), figure)("mlp"), getattr(mixed, figure)("mlp")
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(paired().pvalues("mlp"), mixed.pvalues("mlp"), rtol=0, atol=0)


def test_an_outcome_does_not_differ_from_itself() -> None:
    nothing = made(ONE, WHOLE) - made(ONE, WHOLE)
    for ends in (nothing.interval("mlp"), nothing.band("mlp")):
        for end in ends:
            assert (end == 0).all()
    assert (nothing.pvalues("mlp") == 1).all()


def test_pairs_tell_more_than_prompts_of_their_own() -> None:
    other = made(OTHER, WHOLE * 1.5, tokens=list(range(500, 520))) - made(ONE, WHOLE)
    assert not other.paired
    assert (paired().interval("mlp").width < 0.8 * other.interval("mlp").width).all()


# Beside plain loops ------------------------------------------------------------------------------


def percentiles(draw: Callable[[], list[float]], shares: tuple[float, float]) -> NDArray[Any]:
    """Quantiles of each cell's value in draws of a test's own."""
    return np.quantile([draw() for _ in range(4000)], shares, axis=0)


@pytest.mark.parametrize("together", [True, False])
def test_intervals_are_those_of_ratios_drawn_anew(together: bool) -> None:
    found = (paired() if together else apart()).interval("mlp", 0.9)
    random = np.random.default_rng(9)
    more, whole = (OTHER, WHOLE * 1.5) if together else (APART, APART_WHOLE)

    def draw() -> list[float]:
        first = random.integers(0, PROMPTS, PROMPTS)
        second = first if together else random.integers(0, len(whole), len(whole))
        return [
            more[cell, second].mean() / whole[second].mean()
            - ONE[cell, first].mean() / WHOLE[first].mean()
            for cell in range(3)
        ]

    # These numbers are nearly symmetric, so that percentiles are near the corrected ends.
    low, high = percentiles(draw, (0.05, 0.95))
    widths = high - low
    assert (np.abs(found.low.numpy() - low) < 0.12 * widths).all()
    assert (np.abs(found.high.numpy() - high) < 0.12 * widths).all()
    assert (found.width.numpy() > 1.0 * widths).all()  # made wider, for few prompts


def test_bands_of_pairs_are_those_of_their_differences() -> None:
    found = paired().band("mlp", 0.9)
    pulls = [
        [
            (c - mean(change) / mean(whole) * w) / mean(whole)
            for c, w in zip(change, whole, strict=True)
        ]
        for change, whole in [
            *((row, WHOLE * 1.5) for row in OTHER),
            *((row, WHOLE) for row in ONE),
        ]
    ]
    rest = [[a - b for a, b in zip(pulls[cell], pulls[cell + 3], strict=True)] for cell in range(3)]
    random = np.random.default_rng(2)
    largest = sorted(
        max(abs(studentised(each, random.choice([-1.0, 1.0], PROMPTS))) for each in rest)
        for _ in range(3000)
    )
    reach = largest[math.ceil(0.9 * 3001) - 1]
    for cell, each in enumerate(rest):
        error = statistics.stdev(each) / math.sqrt(PROMPTS)
        half = (found.high - found.low)[cell].item() / 2
        assert half == pytest.approx(reach * error, rel=0.05)
        middle = (found.high + found.low)[cell].item() / 2
        assert middle == pytest.approx(paired()["mlp"][cell].item(), abs=1e-6)


def test_bands_of_other_prompts_add_the_variances_of_both() -> None:
    # Of one cell a band is an interval by a studentised mean: about Student's t.
    one, other = made(ONE[:1], WHOLE), made(APART[:1], APART_WHOLE, tokens=OTHER_TOKENS)
    half = (other - one).band("mlp").width[0].item() / 2
    errors = [each.standard_error("mlp")[0].item() for each in (one, other)]
    assert 1.9 < half / math.hypot(*errors) < 2.25


@pytest.mark.parametrize("figured", [made(ONE, WHOLE), paired(), apart()])
def test_the_wider_end_is_that_of_students_t_or_the_plain_one(figured: Any) -> None:
    few = figured.count
    errors = {
        made_by: [each.standard_error("mlp") for each in outcomes]
        for made_by, outcomes in {
            "one": [made(ONE, WHOLE)],
            "apart": [made(APART, APART_WHOLE), made(ONE, WHOLE)],
        }.items()
    }
    for figure, cells in (("interval", 1), ("band", 3)):
        plain, wider = getattr(figured, figure)("mlp"), getattr(figured, figure)("mlp", wider=True)
        assert (wider.low <= plain.low).all()
        assert (wider.high >= plain.high).all()
        reach = float(student.ppf(1 - 0.025 / cells, few - 1))
        if hasattr(figured, "patched"):
            error = errors["one"][0]
        elif not figured.paired:
            error = torch.stack(errors["apart"]).square().sum(0).sqrt()
        else:
            # Of numbers that only this test makes: the spread of what pairs differ by.
            pulls = [
                (change - change.mean() / whole.mean() * whole) / whole.mean()
                for changes, whole in ((OTHER, WHOLE * 1.5), (ONE, WHOLE))
                for change in changes
            ]
            spread = np.array([pulls[cell] - pulls[cell + 3] for cell in range(3)]).std(1, ddof=1)
            error = torch.from_numpy(spread / math.sqrt(PROMPTS))
        value = figured["mlp"].double()
        torch.testing.assert_close(
            wider.low, torch.minimum(plain.low, value - reach * error), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            wider.high, torch.maximum(plain.high, value + reach * error), rtol=1e-5, atol=1e-6
        )


def test_p_values_of_pairs_flip_their_differences() -> None:
    found = paired().pvalues("mlp", None)
    pulls = OTHER / (1.5 * WHOLE.mean()) - ONE / WHOLE.mean()
    random = np.random.default_rng(3)
    signs = random.choice([-1.0, 1.0], (4000, PROMPTS))
    for cell, each in enumerate(pulls):
        seen = abs(studentised(list(each), [1.0] * PROMPTS)) * (1 - 1e-9)
        share = np.mean([abs(studentised(list(each), list(flips))) >= seen for flips in signs])
        assert found[cell].item() == pytest.approx(share, abs=0.03)


# What does not add up ----------------------------------------------------------------------------


def renamed(outcome: Any, axis: str) -> Any:
    cells = {
        name: attrs.evolve(each, axes=(Axis(axis, each.axes[0].labels),))
        for name, each in outcome.cells.items()
    }
    return attrs.evolve(outcome, cells=cells)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (made(ONE, WHOLE, scale="change"), ["scale", "'restored'", "'change'"]),
        (made(ONE, WHOLE).magnitudes(), ["magnitude", "False", "True"]),
        (made({"attn": ONE}, WHOLE), ["['mlp']", "['attn']", "sel(site="]),
        (made({"mlp": ONE, "attn": ONE}, WHOLE), ["['mlp']", "['mlp', 'attn']"]),
        (made(ONE[:2], WHOLE), ["axis layer", "3 places", "2 in the other"]),
        (made(ONE, WHOLE, missing=[1]), ["'mlp' at layer 1", "sel("]),
        (renamed(made(ONE, WHOLE), "span"), ["axes layer", "span in the other"]),
    ],
)
def test_grids_must_match(other: Any, words: list[str]) -> None:
    whole = made(ONE, WHOLE)
    for one, two in ((whole, other), (whole + whole, other)):
        with pytest.raises(OutcomeError) as caught:
            one - two
        assert all(word in str(caught.value) for word in words), caught.value


def test_changes_of_other_metrics_do_not_add_up() -> None:
    one = made(ONE, WHOLE, scale="change")
    raw, baselines = {"mine": one.raw["given"]}, {"mine": one.baselines["given"]}
    other = attrs.evolve(one, raw=raw, baselines=baselines, metric="mine")
    with pytest.raises(
        OutcomeError, match=r"changes of 'given' and the other of 'mine'.*for_metric"
    ):
        one - other
    shares = attrs.evolve(other, scale="restored")
    assert (made(ONE, WHOLE) - shares).metric == "given and mine"


def test_cells_may_stand_in_another_order_and_under_a_synonym() -> None:
    one, other = made(ONE, WHOLE), made({"mlp_out": OTHER}, WHOLE)
    cells = other.cells["mlp_out"]
    turned = attrs.evolve(
        other,
        cells={"mlp_out": attrs.evolve(cells, index=cells.index.flip(0))},
        raw={"given": {"mlp_out": other.raw["given"]["mlp_out"].flip(0)}},
    )
    plain = one - made(OTHER, WHOLE)
    for found in (one - other, one - turned):
        assert torch.equal(found["mlp"], plain["mlp"])
        assert torch.equal(found.interval("mlp").low, plain.interval("mlp").low)
    assert list(turned - one) == ["mlp_out"]


def test_other_prompts_have_no_p_values_and_means_no_draws() -> None:
    with pytest.raises(OutcomeError, match="different prompts"):
        apart().pvalues("mlp")
    kept = means_of(made(ONE, WHOLE))
    assert isinstance(kept.moments, Moments)
    difference = kept - made(OTHER, WHOLE)
    expected = made(ONE, WHOLE)["mlp"] - made(OTHER, WHOLE)["mlp"]
    torch.testing.assert_close(difference["mlp"], expected)
    for figure in ("interval", "band", "pvalues"):
        with pytest.raises(OutcomeError, match="keep='prompts'"):
            getattr(difference, figure)("mlp")


def test_a_denominator_near_0_on_one_side_is_enough() -> None:
    unsure = made(ONE, np.linspace(-1, 1.2, PROMPTS))
    for difference in (made(OTHER, WHOLE) - unsure, unsure - made(OTHER, WHOLE)):
        for figure in ("interval", "band"):
            with pytest.warns(StatisticsWarning, match="holds 0"):
                low, high = getattr(difference, figure)("mlp")
            assert (low == -math.inf).all()
            assert (high == math.inf).all()


def test_what_no_outcome_changes_is_known() -> None:
    changes = np.vstack([np.zeros(PROMPTS), ONE[:2]])
    one = made(changes, WHOLE, elided={"mlp": [0]})
    both, single = one - one, one - made(ONE, WHOLE)
    assert both.elided("mlp").tolist() == [True, False, False]
    assert single.elided("mlp").tolist() == [False, False, False]
    assert both.pvalues("mlp").isnan().tolist() == [True, False, False]


def test_an_estimate_against_what_is_exact() -> None:
    source = torch.tensor([[5, 6, last] for last in range(10, 22)])
    target = torch.tensor([[5, 9, last] for last in range(10, 22)])
    arguments = (
        tiny_model("llama"),
        None,
        Sites(["mlp", "k"], seq_pos_type="each"),
        source,
        target,
        torch.full((12,), 1),
        torch.full((12,), 2),
    )
    exact = activation_patching(*arguments, progress=False)
    estimate = attribution_patching(*arguments, progress=False)
    error = estimate - exact
    assert error.paired
    assert error.estimated
    frame = error.to_dataframe()
    assert {"site", "layer", "position", "value", "exact"} <= set(frame)
    torch.testing.assert_close(error["k"], estimate["k"] - exact["k"])
    assert error.pvalues("mlp").isfinite().any()
    agreement = estimate.agreement(exact)
    for figure in ("rank_correlation", "rank_correlation_of_sizes", "recall", "sign_agreement"):
        low, high = agreement.interval(figure)
        assert -1 <= low <= high <= 1
        # By site, and of the same numbers again.
        assert agreement.by_site()["k"].interval(figure) == agreement.by_site()["k"].interval(
            figure
        )
    low, high = agreement.interval("rank_correlation")
    assert low < agreement.rank_correlation < high
    perfect = exact.agreement(exact)
    assert perfect.interval("rank_correlation") == pytest.approx((1, 1))
    with pytest.raises(OutcomeError, match="figure must be one of"):
        agreement.interval("precision")


def test_an_agreement_pairs_prompts_and_says_where_it_cannot() -> None:
    changes = RANDOM.normal(1, 1, (30, PROMPTS))
    about = {"model": "made by hand"}
    exact = attrs.evolve(made(changes, WHOLE), info=about)
    cells = exact.cells["mlp"]
    estimates = {"mlp": attrs.evolve(cells, exact=torch.zeros(30, dtype=torch.bool))}
    estimate = attrs.evolve(
        made(changes + RANDOM.normal(0, 0.3, (30, PROMPTS)), WHOLE), cells=estimates
    )
    plain = estimate.agreement(exact).interval()
    order = RANDOM.permutation(PROMPTS)
    tokens = [int(each) + 1 for each in order]
    mixed = attrs.evolve(made(changes[:, order], WHOLE[order], tokens=tokens), info=about)
    assert estimate.agreement(mixed).interval() == pytest.approx(plain)
    # A prompt that occurs twice, with another answer: the two have changed places in one outcome.
    twice = [1, 1, *range(3, PROMPTS + 1)]
    swapped = [1, 0, *range(2, PROMPTS)]
    own = made(changes, WHOLE, tokens=twice)
    turned = attrs.evolve(made(changes[:, swapped], WHOLE[swapped], tokens=twice), info=about)
    of_same = attrs.evolve(own, cells=estimates).agreement(turned).interval()
    assert of_same == pytest.approx((1, 1))
    others = attrs.evolve(made(changes, WHOLE, tokens=list(range(11, PROMPTS + 11))), info=about)
    with pytest.warns(StatisticsWarning, match="10 of the prompts are in both"):
        estimate.agreement(others).interval()


def test_a_scaled_outcome_of_means_has_scaled_intervals() -> None:
    kept = means_of(made(ONE, WHOLE))
    plain, scaled = kept.to_dataframe(), (kept * -3).to_dataframe()
    np.testing.assert_allclose(scaled["low"], -3 * plain["high"], rtol=1e-6)
    np.testing.assert_allclose(scaled["high"], -3 * plain["low"], rtol=1e-6)
    rows = {row["layer"]: row for row in (kept * -3).top(3, distinct=False)}
    for layer, low in enumerate(scaled["low"]):
        assert rows[layer]["low"] == pytest.approx(low)


def test_rounding_is_no_difference() -> None:
    noise = RANDOM.choice([0.0, 2e-7], ONE.shape)
    clear = OTHER[:1] - ONE[:1]
    with_noise = made(np.vstack([OTHER[:1], ONE[1:] + noise[1:]]), WHOLE) - made(ONE, WHOLE)
    alone = made(clear, WHOLE)
    # Two cells are the same but for rounding, of one sign: no finding, and no word in the first.
    assert with_noise.pvalues("mlp", None)[1:].tolist() == [1, 1]
    assert with_noise.pvalues("mlp")[0] == alone.pvalues("mlp")[0]
    ends = (with_noise.band("mlp"), alone.band("mlp"))
    for one, other in zip(*ends, strict=True):
        assert one[0].item() == pytest.approx(other[0].item(), rel=1e-6)
