"""Statistics against plain loops on the same random numbers, and against scipy and statsmodels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests

from nnpatch_core import Outcome
from nnpatch_core.results import Scale, interval_of_figures
from nnpatch_core.results.statistics import drawing, samples
from tests.helpers import statistics_oracle as oracle
from tests.helpers.made import made

# Few flips have a floor, and say so; that is tested elsewhere.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no p-value can:nnpatch_core.errors.StatisticsWarning"
)

Numbers = NDArray[np.float64]
SEED = 3
DRAWN = 400
SCALES: tuple[Scale, ...] = ("restored", "change")


def numbers(count: int, cells: int = 6, seed: int = 0) -> tuple[Numbers, Numbers]:
    """Effects of unlike size, sign and skewness, `[cells, prompts]`, and the whole."""
    chance = np.random.default_rng((seed, count))
    whole = 4 + chance.gamma(2.0, 1.0, count)
    shares = np.linspace(-0.3, 1.0, cells)[:, None]
    noise = chance.standard_normal((cells, count)) + 2 * chance.standard_exponential((1, count))
    noise[1::2] = chance.standard_exponential((len(noise[1::2]), count)) ** 2
    return shares * whole + 0.7 * noise, whole


def places(tokens: Sequence[int]) -> NDArray[np.int64]:
    """The order in which prompts of such tokens are drawn."""
    count = len(tokens)
    found = samples.orders([made(np.zeros((1, count)), np.ones(count), tokens=tokens)])
    assert found is not None
    assert sorted(found[0]) == list(range(count))
    return found[0]


def picked(count: int, first: int = 1, stream: int = 0) -> list[list[int]]:
    """The prompts of each resample, from the random numbers that are used.

    Args:
        count: how many prompts.
        first: the token of the first of them.
        stream: of the numbers; each of two outcomes of other prompts has its own.
    """
    times = np.concatenate(list(drawing.counts(count, DRAWN, SEED, stream))).astype(int)
    assert times.shape == (DRAWN, count)
    assert (times.sum(1) == count).all()
    order = places(range(first, first + count))
    return [np.repeat(order, each).tolist() for each in times]


def flipped(count: int, first: int = 1, stream: int = 0) -> list[list[float]]:
    """The signs of each flip, likewise."""
    drawn = np.concatenate(list(drawing.signs(count, DRAWN, SEED, stream)))
    assert drawn.shape == (DRAWN, count)
    assert set(drawn.ravel()) == {-1.0, 1.0}
    signs = np.empty_like(drawn)
    signs[:, places(range(first, first + count))] = drawn
    return signs.tolist()


def whole_of(whole: Numbers, scale: Scale) -> list[float] | None:
    return None if scale == "change" else whole.tolist()


def close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-9, atol=1e-12)


# Plain loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("count", "level"), [(6, 0.9), (12, 0.95), (25, 0.95), (40, 0.5)])
def test_an_interval_is_that_of_a_loop(count: int, level: float, scale: Scale) -> None:
    changes, whole = numbers(count)
    found = made(changes, whole, scale=scale).interval("mlp", level, SEED, resamples=DRAWN)
    picks = picked(count)
    expected = [oracle.bca(row, whole_of(whole, scale), picks, level) for row in changes.tolist()]
    close(found.low, [low for low, _ in expected])
    close(found.high, [high for _, high in expected])


def test_an_interval_of_a_figure_of_all_cells_is_that_of_a_loop() -> None:
    """A mean of cells, and the largest gap to 1, which is no mean of prompts."""
    changes, whole = numbers(12)
    interval = interval_of_figures(
        made(changes, whole),
        "mlp",
        lambda values: np.stack([values.mean(0), np.abs(1 - values).max(0)]),
        seed=SEED,
        resamples=DRAWN,
    )
    rows, sizes = changes.tolist(), whole.tolist()

    def figures(pick: Sequence[int]) -> tuple[float, float]:
        own = [oracle.resampled(row, sizes, [pick])[0] for row in rows]
        return oracle.mean(own), max(abs(1 - each) for each in own)

    every = list(range(12))
    values, drawn = figures(every), [figures(pick) for pick in picked(12)]
    left = [figures([one for one in every if one != without]) for without in every]
    expected = [
        oracle.bca_of(
            value, [one[number] for one in drawn], [one[number] for one in left], 12, 0.95
        )
        for number, value in enumerate(values)
    ]
    close(interval.low, [low for low, _ in expected])
    close(interval.high, [high for _, high in expected])


@pytest.mark.parametrize("scale", SCALES)
def test_an_interval_of_sizes_is_that_of_a_loop(scale: Scale) -> None:
    changes, whole = numbers(12)
    sizes = np.abs(changes).tolist()
    out = made(changes, -whole, scale=scale).magnitudes()
    found, picks = out.interval("mlp", seed=SEED, resamples=DRAWN), picked(12)
    expected = [oracle.bca(row, whole_of(whole, scale), picks, 0.95) for row in sizes]
    close(found.low, [low for low, _ in expected])
    close(found.high, [high for _, high in expected])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("count", "level"), [(8, 0.8), (12, 0.95), (30, 0.9)])
def test_a_band_is_that_of_a_loop(count: int, level: float, scale: Scale) -> None:
    changes, whole = numbers(count)
    names = {"mlp": changes[:4], "attn": changes[4:]}
    bands = made(names, whole, scale=scale).band(None, level, SEED, flips=DRAWN)
    sizes, signs = whole_of(whole, scale), flipped(count)
    reach = oracle.band_reach(changes.tolist(), sizes, signs, level)
    assert math.isfinite(reach)
    for name, part in names.items():
        values = [oracle.value_of(row, sizes) for row in part.tolist()]
        errors = [oracle.standard_error(row, sizes) for row in part.tolist()]
        close(bands[name].low, np.subtract(values, np.multiply(reach, errors)))
        close(bands[name].high, np.add(values, np.multiply(reach, errors)))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [6, 12, 30])
def test_pvalues_are_those_of_a_loop(count: int, scale: Scale) -> None:
    changes, whole = numbers(count)
    changes[2] = np.random.default_rng(count).standard_normal(count)
    names = {"mlp": changes[:4], "attn": changes[4:]}
    out, signs = made(names, whole, scale=scale), flipped(count)
    rows = changes.tolist()
    alone = [oracle.raw_pvalue(row, signs) for row in rows]
    assert max(alone) > 0.05
    for adjust, expected in ((None, alone), ("max_t", oracle.max_t_pvalues(rows, signs))):
        found = out.pvalues(None, adjust, SEED, flips=DRAWN)
        close(np.concatenate([found["mlp"], found["attn"]]), expected)


@pytest.mark.parametrize("scale", SCALES)
def test_a_difference_of_the_same_prompts_is_that_of_a_loop(scale: Scale) -> None:
    changes, whole = numbers(12)
    others = changes[::-1] * 0.5 + numbers(12, seed=1)[0]
    found = made(changes, whole, scale=scale) - made(others, whole, scale=scale)
    interval = found.interval("mlp", seed=SEED, resamples=DRAWN)
    sizes, picks = whole_of(whole, scale), picked(12)
    # With one denominator a difference of ratios is the ratio of a difference.
    rows = (changes - others).tolist()
    expected = [oracle.bca(row, sizes, picks, 0.95) for row in rows]
    close(interval.low, [low for low, _ in expected])
    close(interval.high, [high for _, high in expected])
    raw = found.pvalues("mlp", None, SEED, flips=DRAWN)
    close(raw, [oracle.raw_pvalue(row, flipped(12)) for row in rows])
    band = found.band("mlp", 0.9, SEED, flips=DRAWN)
    reach = oracle.band_reach(rows, sizes, flipped(12), 0.9)
    errors = [oracle.standard_error(row, sizes) for row in rows]
    close((band.high - band.low) / 2, np.multiply(reach, errors))


def test_a_difference_of_other_baselines_is_that_of_a_loop() -> None:
    """As of two models, whose source and target runs differ by other amounts."""
    changes, whole = numbers(12)
    others, sizes = numbers(12, seed=1)
    found = made(changes, whole) - made(others, sizes)
    interval, picks = found.interval("mlp", seed=SEED, resamples=DRAWN), picked(12)
    for cell, (one, other) in enumerate(zip(changes.tolist(), others.tolist(), strict=True)):
        sides = (one, whole.tolist()), (other, sizes.tolist())
        value = np.subtract(*(oracle.value_of(*side) for side in sides))
        values = np.subtract(*(oracle.resampled(*side, picks) for side in sides))
        left = np.subtract(*(oracle.without_each(*side) for side in sides))
        low, high = oracle.bca_of(value, values.tolist(), left.tolist(), 12, 0.95)
        close(interval.low[cell], low)
        close(interval.high[cell], high)


def apart() -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers], Any]:
    """Two samples of other prompts, and their difference."""
    one, other = numbers(12), numbers(15, seed=1)
    return one, other, made(*one) - made(*other, tokens=range(100, 115))


def test_an_interval_of_a_difference_of_other_prompts_is_that_of_a_loop() -> None:
    (changes, whole), (others, sizes), found = apart()
    interval = found.interval("mlp", 0.9, SEED, resamples=DRAWN)
    for cell, (one, other) in enumerate(zip(changes.tolist(), others.tolist(), strict=True)):
        sides = (one, whole.tolist()), (other, sizes.tolist())
        value = np.subtract(*(oracle.value_of(*side) for side in sides))
        values = np.subtract(
            oracle.resampled(*sides[0], picked(12)),
            oracle.resampled(*sides[1], picked(15, 100, 1)),
        )
        # Each prompt's pull on the difference, as of Efron and Tibshirani (1993), chapter 14.
        pulls = []
        for sign, side in zip((1, -1), sides, strict=True):
            left, count = oracle.without_each(*side), len(side[0])
            pulls += [sign * (oracle.mean(left) - each) * (count - 1) / count for each in left]
        bend = math.fsum(pull**3 for pull in pulls) / (
            6 * math.fsum(pull**2 for pull in pulls) ** 1.5
        )
        low, high = oracle.ends(value, values.tolist(), bend, oracle.spread_level(0.9, 12))
        close(interval.low[cell], low)
        close(interval.high[cell], high)


def test_a_band_of_a_difference_of_other_prompts_is_that_of_a_loop() -> None:
    (changes, whole), (others, sizes), found = apart()
    band = found.band("mlp", 0.9, SEED, flips=DRAWN)
    signs = list(zip(flipped(12), flipped(15, 100, 1), strict=True))
    cells = list(zip(changes.tolist(), others.tolist(), strict=True))

    def moments(change: list[float], size: list[float], sign: list[float]) -> tuple[float, float]:
        rest = np.multiply(oracle.residuals(change, size), sign) / oracle.mean(size)
        return rest.mean(), rest.var(ddof=1) / len(rest)

    def statistic(cell: Any, sign: Any) -> float:
        one = moments(cell[0], whole.tolist(), sign[0])
        other = moments(cell[1], sizes.tolist(), sign[1])
        return abs(one[0] - other[0]) / math.sqrt(one[1] + other[1])

    largest = sorted(max(statistic(cell, sign) for cell in cells) for sign in signs)
    reach = largest[math.ceil(0.9 * (1 + DRAWN)) - 1]
    errors = [
        math.hypot(
            oracle.standard_error(one, whole.tolist()), oracle.standard_error(other, sizes.tolist())
        )
        for one, other in cells
    ]
    close((band.high - band.low) / 2, np.multiply(reach, errors))


@pytest.mark.parametrize("held", [1, 1_000])
def test_what_is_held_at_a_time_changes_nothing(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that does not fit is done in parts."""
    changes, whole = numbers(12, cells=11)
    outcomes = made({"mlp": changes[:7], "attn": changes[7:]}, whole), apart()[2]

    def figures() -> list[Any]:
        found = []
        for out in outcomes:
            for kind, draws in (("interval", "resamples"), ("band", "flips")):
                each = getattr(out, kind)(None, 0.9, SEED, **{draws: DRAWN})
                found += [end for interval in each.values() for end in interval]
        for adjust in (None, "max_t"):
            found += outcomes[0].pvalues(None, adjust, SEED, flips=DRAWN).values()
        return found

    expected = figures()
    monkeypatch.setattr(drawing, "HELD", held)
    for one, other in zip(figures(), expected, strict=True):
        close(one, other)


def test_the_level_is_that_of_students_t() -> None:
    """Wider by what the plug-in variance and the normal's quantile lack; in the limit, nothing."""
    for count, level in itertools.product((3, 12, 50), (0.5, 0.9, 0.95)):
        wide = stats.norm.ppf(0.5 + oracle.spread_level(level, count) / 2)
        assert wide * math.sqrt((count - 1) / count) == pytest.approx(
            stats.t.ppf(0.5 + level / 2, count - 1)
        )
    assert oracle.spread_level(0.95, 10**6) == pytest.approx(0.95, abs=1e-5)


# scipy and statsmodels ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("count", [12, 25])
def test_an_interval_is_that_of_scipy(count: int, scale: Scale) -> None:
    """It draws prompts in the same way from the same generator."""
    changes, whole = numbers(count)
    sizes = whole if scale == "restored" else np.ones(count)
    found = made(changes, whole, scale=scale).interval("mlp", 0.9, SEED, resamples=2_000)
    order = places(range(1, 1 + count))
    for cell, row in enumerate(changes):
        expected = stats.bootstrap(
            (row[order], sizes[order]),
            lambda change, size, axis: change.mean(axis=axis) / size.mean(axis=axis),
            paired=True,
            vectorized=True,
            n_resamples=2_000,
            confidence_level=oracle.spread_level(0.9, count),
            method="BCa",
            rng=np.random.default_rng((SEED, 0, 0)),
        ).confidence_interval
        close([found.low[cell], found.high[cell]], [expected.low, expected.high])


@pytest.mark.parametrize("count", [6, 10])
def test_pvalues_are_those_of_all_flips(count: int) -> None:
    """To within what so many random flips leave open: five of their standard deviations."""
    chance = np.random.default_rng(count)
    changes = chance.standard_normal((8, count)) + np.linspace(0, 1.5, 8)[:, None]
    found = made(changes, np.ones(count)).pvalues("mlp", None).tolist()
    for row, pvalue in zip(changes, found, strict=True):
        exact = oracle.exact_pvalue(row.tolist())
        permuted = stats.permutation_test(
            (row,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        ).pvalue
        assert exact == pytest.approx(permuted)
        assert pvalue == pytest.approx(
            exact, abs=5 * math.sqrt(exact * (1 - exact) / 10_000) + 1e-4
        )


@pytest.mark.parametrize(("adjust", "method"), [("holm", "holm"), ("bh", "fdr_bh")])
@pytest.mark.parametrize("cells", [1, 2, 9, 40])
def test_pvalues_are_adjusted_as_by_statsmodels(adjust: Any, method: str, cells: int) -> None:
    chance = np.random.default_rng(cells)
    changes = chance.standard_normal((cells, 15)) + np.linspace(0, 1.5, cells)[:, None]
    # Two cells of the same effects have one p-value.
    changes[-1] = changes[0]
    out = made(changes, np.ones(15))
    raw = out.pvalues("mlp", None, SEED).numpy()
    close(out.pvalues("mlp", adjust, SEED), multipletests(raw, method=method)[1])


def test_the_family_is_all_that_is_asked_for() -> None:
    changes, whole = numbers(15, cells=10)
    changes[::2] = np.random.default_rng(0).standard_normal((5, 15)) + 0.4
    out: Outcome = made({"mlp": changes[:6], "attn": changes[6:]}, whole)
    raw = out.pvalues(None, None, SEED)
    every = np.concatenate([raw["mlp"], raw["attn"]])
    adjusted = out.pvalues(None, "holm", SEED)
    close(
        np.concatenate([adjusted["mlp"], adjusted["attn"]]), multipletests(every, method="holm")[1]
    )
    close(out.pvalues("mlp", "holm", SEED), multipletests(raw["mlp"].numpy(), method="holm")[1])
    close(out.pvalues(["attn"], "holm", SEED)["attn"], multipletests(every[6:], method="holm")[1])
