"""Statistics of one cell after the other, in plain loops over prompts, resamples and flips.

It knows the definitions of docs/statistics.md and no line of nnpatch. A cell's `change` is patched
- target of each prompt, `whole` source - target; on the scale "change" the latter is None. Random
numbers are handed in: `picks` `[resamples][prompts]`, which prompts each resample has; `signs`
`[flips][prompts]`, 1 or -1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TypeAlias

from scipy.stats import t as student

Row: TypeAlias = Sequence[float]
Picks: TypeAlias = Sequence[Sequence[int]]
Signs: TypeAlias = Sequence[Sequence[float]]


def mean(values: Row) -> float:
    """The mean, summed exactly."""
    return math.fsum(values) / len(values)


def value_of(change: Row, whole: Row | None) -> float:
    """A cell's value: a ratio of means, or a mean."""
    return mean(change) / (1.0 if whole is None else mean(whole))


def spread_level(level: float, count: int) -> float:
    """The level at which an interval is asked for, so that one of few prompts is wide enough."""
    quantile = float(student.ppf(0.5 + level / 2, count - 1))
    return 1 - 2 * NormalDist().cdf(-math.sqrt(count / (count - 1)) * quantile)


def resampled(change: Row, whole: Row | None, picks: Picks) -> list[float]:
    """The value in each resample."""
    return [
        value_of([change[i] for i in pick], None if whole is None else [whole[i] for i in pick])
        for pick in picks
    ]


def without_each(change: Row, whole: Row | None) -> list[float]:
    """The value without one prompt, for each of them."""
    count = len(change)
    return resampled(change, whole, [[j for j in range(count) if j != i] for i in range(count)])


def quantile(values: Row, share: float) -> float:
    """The quantile, linear between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    below = min(math.floor(at), len(ordered) - 2)
    return ordered[below] + (at - below) * (ordered[below + 1] - ordered[below])


def ends(value: float, values: Row, bend: float, level: float) -> tuple[float, float]:
    """The ends of Efron's bias-corrected and accelerated interval.

    Args:
        value: of all prompts.
        values: of each resample.
        bend: the acceleration.
        level: of the interval, already that of so few prompts.
    """
    # Sums in another order are the same sum.
    slack = 1e-12 * max(map(abs, values))
    below = sum(0.5 if abs(each - value) <= slack else float(each < value) for each in values)
    normal = NormalDist()
    shift = normal.inv_cdf(below / len(values))
    found = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        reach = shift + normal.inv_cdf(tail)
        found.append(quantile(values, normal.cdf(shift + reach / (1 - bend * reach))))
    return found[0], found[1]


def bca_of(value: float, values: Row, left: Row, count: int, level: float) -> tuple[float, float]:
    """The same, given the value without each prompt."""
    centre = mean(left)
    cubes = math.fsum((centre - each) ** 3 for each in left)
    squares = math.fsum((centre - each) ** 2 for each in left)
    return ends(value, values, cubes / (6 * squares**1.5), spread_level(level, count))


def bca(change: Row, whole: Row | None, picks: Picks, level: float) -> tuple[float, float]:
    """The interval of a cell."""
    value, values = value_of(change, whole), resampled(change, whole, picks)
    return bca_of(value, values, without_each(change, whole), len(change), level)


def studentised(values: Row, signs: Row) -> float:
    """The mean of flipped values in standard errors, which are of the flipped ones too."""
    flipped = [sign * each for sign, each in zip(signs, values, strict=True)]
    centre = mean(flipped)
    squares = math.fsum((each - centre) ** 2 for each in flipped)
    error = math.sqrt(squares / (len(values) - 1) / len(values))
    if error <= 1e-9 * abs(centre):
        return math.copysign(math.inf, centre) if centre else 0.0
    return centre / error


def raw_pvalue(change: Row, signs: Signs) -> float:
    """The share of flips, the one that there was among them, that are at least as extreme."""
    seen = abs(studentised(change, [1.0] * len(change)))
    # Flips that give the same sum in another order of adding count.
    least = seen * (1 - 1e-9)
    extreme = sum(abs(studentised(change, each)) >= least for each in signs)
    return (1 + extreme) / (1 + len(signs))


def exact_pvalue(change: Row) -> float:
    """The share of all flips that are at least as extreme."""
    seen = abs(studentised(change, [1.0] * len(change))) * (1 - 1e-9)
    every = every_sign(len(change))
    return sum(abs(studentised(change, each)) >= seen for each in every) / len(every)


def max_t_pvalues(changes: Sequence[Row], signs: Signs) -> list[float]:
    """For each cell the share of flips in which any cell of the family is as extreme."""
    count = len(changes[0])
    largest = [max(abs(studentised(change, each)) for change in changes) for each in signs]
    found = []
    for change in changes:
        least = abs(studentised(change, [1.0] * count)) * (1 - 1e-9)
        found.append((1 + sum(each >= least for each in largest)) / (1 + len(signs)))
    return found


def residuals(change: Row, whole: Row | None) -> list[float]:
    """How far each prompt is from the cell's value; of mean 0."""
    value = value_of(change, whole)
    sizes = [1.0] * len(change) if whole is None else whole
    return [c - value * w for c, w in zip(change, sizes, strict=True)]


def band_reach(changes: Sequence[Row], whole: Row | None, signs: Signs, level: float) -> float:
    """How many standard errors a simultaneous band reaches to each side.

    It is that largest statistic which so many flips, the one that there was among them, stay below.
    """
    rests = [residuals(change, whole) for change in changes]
    largest = sorted(max(abs(studentised(rest, each)) for rest in rests) for each in signs)
    rank = math.ceil(level * (1 + len(signs)))
    return math.inf if rank > len(largest) else largest[rank - 1]


def standard_error(change: Row, whole: Row | None) -> float:
    """By the delta method."""
    count, size = len(change), 1.0 if whole is None else abs(mean(whole))
    squares = math.fsum(each**2 for each in residuals(change, whole))
    return math.sqrt(squares / (count - 1) / count) / size


def every_sign(count: int) -> list[tuple[float, ...]]:
    """All flips of so many prompts."""
    return list(itertools.product((1.0, -1.0), repeat=count))
