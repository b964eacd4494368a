"""What holds of statistics, whatever the numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core.errors import StatisticsWarning
from nnpatch_core.results import Interval, Scale
from tests.helpers.made import made

# Few flips have a floor, and say so; that is tested elsewhere.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no p-value can:nnpatch_core.errors.StatisticsWarning"
)

Numbers = NDArray[np.float64]
SCALES: tuple[Scale, ...] = ("restored", "change")
EITHER = st.sampled_from(SCALES)
ADJUSTMENTS: tuple[Any, ...] = ("holm", "bh", "max_t", None)
#: Few, for what is compared is of the same random numbers.
DRAWN = 200
#: Multiples of 1/16: sums of them are exact, so that ties are ties.
SIXTEENTHS = st.integers(-64, 64).map(lambda number: number / 16)
#: For laws that take more than five seconds with the usual hundred.
FEWER = settings(max_examples=30)
AWAY_FROM_0 = SIXTEENTHS.map(lambda number: 16 + number)


@st.composite
def effects(draw: st.DrawFn) -> tuple[Numbers, Numbers]:
    """Changes `[cells, prompts]`, and the whole `[prompts]`, which is well above 0."""
    shape = draw(st.integers(1, 4)), draw(st.integers(6, 14))
    changes = draw(arrays(np.float64, shape, elements=SIXTEENTHS))
    return changes, draw(arrays(np.float64, shape[1], elements=AWAY_FROM_0))


def figures(out: Any, name: Any = "mlp", level: float = 0.9) -> dict[str, Any]:
    """All statistics of a site name, or of several."""
    found = {
        "interval": out.interval(name, level, resamples=DRAWN),
        "band": out.band(name, level, flips=DRAWN),
    }
    return found | {how: out.pvalues(name, how, flips=DRAWN) for how in ADJUSTMENTS}


def leaves(found: Any, way: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of figures."""
    if isinstance(found, Interval):
        yield from ((f"{way} low", found.low), (f"{way} high", found.high))
    elif isinstance(found, Mapping):
        for name, part in found.items():
            yield from leaves(part, f"{way} {name}")
    else:
        yield way, found


def same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    first, second = dict(leaves(one)), dict(leaves(other))
    assert first.keys() == second.keys()
    for way, tensor in first.items():
        np.testing.assert_allclose(tensor, second[way], rtol=tolerance, atol=tolerance, err_msg=way)


def picked(found: Any, cells: Any) -> Any:
    """The figures of some cells."""
    if isinstance(found, Interval):
        return Interval(found.low[cells], found.high[cells])
    if isinstance(found, Mapping):
        return {name: picked(part, cells) for name, part in found.items()}
    return found[cells]


def ordered(found: Mapping[Any, Any]) -> None:
    """An interval's ends are in order, and p-values from 0 to 1, not smaller when adjusted."""
    for kind in ("interval", "band"):
        low, high = found[kind]
        assert bool((low <= high).all()), kind
    for how in ADJUSTMENTS:
        assert bool(((found[how] > 0) & (found[how] <= 1)).all()), how
        assert bool((found[how] >= found[None]).all()), how


# Invariances -------------------------------------------------------------------------------------


@given(scale=EITHER, numbers=effects(), chance=st.randoms(use_true_random=False))
def test_the_order_of_prompts_changes_nothing(scale: Scale, numbers: Any, chance: Any) -> None:
    changes, whole = numbers
    order = list(range(len(whole)))
    chance.shuffle(order)
    tokens = [1 + number for number in order]
    expected = figures(made(changes, whole, scale=scale))
    ordered(expected)
    same(figures(made(changes[:, order], whole[order], scale=scale, tokens=tokens)), expected)


@given(numbers=effects(), factor=st.sampled_from([-8.0, -1.0, 0.25, 1024.0]))
def test_a_share_has_no_unit(numbers: Any, factor: float) -> None:
    """The metric in another unit, or of the other sign, is the same share of the whole."""
    changes, whole = numbers
    expected = figures(made(changes, whole))
    same(figures(made(factor * changes, factor * whole)), expected, tolerance=1e-12)


@given(numbers=effects(), factor=st.sampled_from([0.25, 1024.0]))
def test_a_change_has_the_unit_of_the_metric(numbers: Any, factor: float) -> None:
    changes, whole = numbers
    found = figures(made(factor * changes, factor * whole, scale="change"))
    expected = figures(made(changes, whole, scale="change"))
    for kind in ("interval", "band"):
        low, high = expected[kind]
        same(found[kind], Interval(factor * low, factor * high), tolerance=1e-12)
    for how in ADJUSTMENTS:
        same(found[how], expected[how])


@given(numbers=effects())
def test_a_metric_of_the_other_sign_mirrors_changes(numbers: Any) -> None:
    """Of the same resamples the ends change places, to the grain of their number."""
    changes, whole = numbers
    found = figures(made(-changes, -whole, scale="change"))
    expected = figures(made(changes, whole, scale="change"))
    for kind in ("interval", "band"):
        low, high = expected[kind]
        same(found[kind], Interval(-high, -low), tolerance=1e-9)
    for how in ADJUSTMENTS:
        same(found[how], expected[how])


@given(numbers=effects(), shift=SIXTEENTHS)
def test_the_level_of_the_target_run_changes_nothing(numbers: Any, shift: float) -> None:
    changes, whole = numbers
    same(figures(made(changes, whole, target=shift)), figures(made(changes, whole)))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16))
def test_every_prompt_twice_narrows_by_the_root_of_two(seed: int) -> None:
    """Whoever counts prompts twice is told too narrow an interval: they must be independent."""
    chance = np.random.default_rng(seed)
    whole = 8 + chance.standard_normal(60)
    changes = np.array([[0.0], [0.5]]) * whole + chance.standard_normal((2, 60))
    once, twice = made(changes, whole), made(np.tile(changes, 2), np.tile(whole, 2))
    for kind in ("interval", "band"):
        first, second = (getattr(out, kind)("mlp") for out in (once, twice))
        ratio = (second.high - second.low) / (first.high - first.low)
        assert bool(((ratio > 0.62) & (ratio < 0.78)).all()), (kind, ratio)


@given(numbers=effects())
def test_a_seed_gives_its_numbers_again(numbers: Any) -> None:
    out = made(*numbers)
    same(figures(out), figures(out))


def test_another_seed_gives_others() -> None:
    chance = np.random.default_rng(0)
    out = made(chance.standard_normal((3, 12)), 8 + chance.standard_normal(12))
    for kind in ("interval", "band"):
        one, other = (getattr(out, kind)("mlp", seed=seed) for seed in (0, 1))
        assert bool((one.low != other.low).all()), kind
        torch.testing.assert_close(one.low, other.low, rtol=0, atol=0.02)
    one, other = (out.pvalues("mlp", None, seed) for seed in (0, 1))
    assert bool((one != other).any())


@given(scale=EITHER, numbers=effects())
def test_a_higher_level_is_no_narrower(scale: Scale, numbers: Any) -> None:
    out = made(*numbers, scale=scale)
    for kind, drawn in (("interval", "resamples"), ("band", "flips")):
        inner, outer = (getattr(out, kind)("mlp", level, **{drawn: DRAWN}) for level in (0.6, 0.9))
        assert bool((outer.low <= inner.low).all()), kind
        assert bool((outer.high >= inner.high).all()), kind


@given(numbers=effects())
def test_a_larger_family_is_asked_more_of(numbers: Any) -> None:
    changes, whole = numbers
    both = made({"mlp": changes, "attn": changes[::-1] ** 2}, whole)
    alone = both.band("mlp", 0.9, flips=DRAWN)
    together = both.band(None, 0.9, flips=DRAWN)["mlp"]
    slack = 1e-12
    assert bool((together.low <= alone.low + slack).all())
    assert bool((together.high >= alone.high - slack).all())
    for how in ("holm", "max_t"):
        small, large = (both.pvalues(name, how, flips=DRAWN) for name in ("mlp", None))
        assert bool((large["mlp"] >= small).all()), how
    same(both.pvalues(None, None, flips=DRAWN)["mlp"], both.pvalues("mlp", None, flips=DRAWN))
    same(
        both.interval(None, 0.9, resamples=DRAWN)["mlp"], both.interval("mlp", 0.9, resamples=DRAWN)
    )


# Edges -------------------------------------------------------------------------------------------


@FEWER
@given(numbers=effects(), constant=SIXTEENTHS)
def test_a_constant_cell_is_a_point(numbers: Any, constant: float) -> None:
    changes, whole = numbers
    for scale, cell in (("restored", constant * whole), ("change", np.full_like(whole, constant))):
        out = made(np.concatenate([changes, cell[None]]), whole, scale=scale)
        found = figures(out)
        for kind in ("interval", "band"):
            for end in found[kind]:
                assert end[-1].item() == pytest.approx(constant, abs=1e-12), (scale, kind)
        # Effects all of one sign are as extreme as there are.
        least = min(1.0, 3 / DRAWN + 4 * 2.0 ** (1 - len(whole)))
        assert (found[None][-1].item() == 1) if constant == 0 else (found[None][-1] <= 2 * least)
        # It takes no part in what the others are.
        rest = figures(made(changes, whole, scale=scale))
        same(picked(found["interval"], slice(-1)), rest["interval"])
        same(picked(found["band"], slice(-1)), rest["band"], tolerance=1e-12)


@given(numbers=effects())
def test_elided_cells_are_in_no_family(numbers: Any) -> None:
    changes, whole = numbers
    expected = figures(made(changes, whole))
    more = np.concatenate([changes, np.zeros((3, len(whole)))])
    found = figures(made(more, whole, elided={"mlp": range(len(changes), len(more))}))
    same(picked(found, slice(len(changes))), expected)
    for kind in ("interval", "band"):
        for end in found[kind]:
            assert not end[len(changes) :].any(), kind
    for how in ADJUSTMENTS:
        assert bool(found[how][len(changes) :].isnan().all()), how


@given(numbers=effects())
def test_what_was_not_swept_is_nan(numbers: Any) -> None:
    changes, whole = numbers
    expected = figures(made(changes, whole))
    spread = np.repeat(changes, 2, 0)
    out = made(spread, whole, missing=range(1, len(spread), 2))
    found = figures(out)
    same(picked(found, slice(0, None, 2)), expected)
    for way, tensor in leaves(found):
        assert bool(tensor[1::2].isnan().all()), way


@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    numbers=effects(),
    prompt=st.integers(0, 5),
)
def test_a_cell_without_a_number_spoils_no_other(bad: float, numbers: Any, prompt: int) -> None:
    changes, whole = numbers
    expected = figures(made(changes, whole))
    spoilt = changes[:1].copy()
    spoilt[0, prompt] = bad
    found = figures(made(np.concatenate([spoilt, changes]), whole))
    same(picked(found, slice(1, None)), expected)
    for way, tensor in leaves(found):
        assert math.isnan(tensor[0]), way


def assert_unknown(out: Any) -> None:
    """It is said that intervals are infinite, and they are; of a value that is there."""
    for kind in ("interval", "band"):
        with pytest.warns(StatisticsWarning, match="inf"):
            low, high = getattr(out, kind)("mlp")
        assert bool((low == -math.inf).all()), kind
        assert bool((high == math.inf).all()), kind


@pytest.mark.parametrize("scale", SCALES)
def test_one_prompt_says_nothing_of_others(scale: Scale) -> None:
    assert_unknown(made([[1.0], [2.0], [0.0]], [4.0], scale=scale))


@given(seed=st.integers(0, 2**16))
def test_a_denominator_that_may_be_0_leaves_nothing_known(seed: int) -> None:
    chance = np.random.default_rng(seed)
    whole = chance.standard_normal(20)
    whole += 0.1 - whole.mean()
    changes = 0.5 * whole + 0.1 * chance.standard_normal((3, 20))
    assert_unknown(made(changes, whole))
    # A mean has none.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = made(changes, whole, scale="change").interval("mlp")
    assert bool((low.isfinite() & high.isfinite()).all())


def test_a_denominator_that_is_away_from_0_is_none() -> None:
    chance = np.random.default_rng(0)
    whole = 1 + chance.standard_normal(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = made([0.5 * whole + chance.standard_normal(20)], whole).interval("mlp")
    assert bool((low.isfinite() & high.isfinite()).all())


# Groups and differences --------------------------------------------------------------------------


@FEWER
@given(numbers=effects(), other=effects())
def test_a_group_is_an_outcome_of_its_prompts(numbers: Any, other: Any) -> None:
    (changes, whole), (more, rest) = numbers, other
    cells = min(len(changes), len(more))
    count = len(whole)
    out = made(
        np.concatenate([changes[:cells], more[:cells]], 1),
        np.concatenate([whole, rest]),
        columns={"kind": ("a",) * count + ("b",) * len(rest)},
    )
    groups = out.by_group("kind")
    same(figures(groups["a"]), figures(made(changes[:cells], whole)))
    tokens = range(1 + count, 1 + count + len(rest))
    same(figures(groups["b"]), figures(made(more[:cells], rest, tokens=tokens)))


@given(scale=EITHER, numbers=effects())
def test_an_outcome_does_not_differ_from_itself(scale: Scale, numbers: Any) -> None:
    out = made(*numbers, scale=scale)
    nothing = out - made(*numbers, scale=scale)
    assert not nothing["mlp"].any()
    found = figures(nothing)
    for kind in ("interval", "band"):
        for end in found[kind]:
            assert not end.any(), kind
    for how in ADJUSTMENTS:
        assert bool((found[how] == 1).all()), how


@FEWER
@given(numbers=effects())
def test_a_difference_from_nothing_is_the_outcome(numbers: Any) -> None:
    changes, whole = numbers
    out, nothing = made(changes, whole), made(np.zeros_like(changes), whole)
    expected = figures(out)
    same(figures(out - nothing), expected, tolerance=1e-12)
    mirrored = figures(nothing - out)
    for kind in ("interval", "band"):
        low, high = expected[kind]
        same(mirrored[kind], Interval(-high, -low), tolerance=1e-9)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**16))
def test_prompts_of_their_own_vary_apart(seed: int) -> None:
    """The difference of two samples is about as wide as the root of the sum of squares."""
    chance = np.random.default_rng(seed)
    whole, changes = 8 + chance.standard_normal((2, 50)), 3 + chance.standard_normal((2, 1, 50))
    one = made(changes[0], whole[0])
    apart = made(changes[1], whole[1], tokens=range(100, 150))
    together = made(changes[1], whole[1])
    widths = [
        (found.high - found.low).item()
        for found in (each.interval("mlp") for each in (one, apart, one - apart, one - together))
    ]
    assert widths[2] == pytest.approx(math.hypot(*widths[:2]), rel=0.08)
    # Drawn together, prompts that have nothing to do with each other vary as much.
    assert widths[3] == pytest.approx(widths[2], rel=0.4)
