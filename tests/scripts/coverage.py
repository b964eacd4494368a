"""Run by the `coverage` session: how often intervals, bands and p-values are right.

The truth is known: the values over a whole population of prompts of a real model, swept exactly
(`population.py`). From it prompts are drawn again and again, with replacement, so that they are
independent, and it is counted how often the statistics of a draw hold the truth. The figures go
into docs/statistics-measured.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import population
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from nnpatch_core import Outcome
from nnpatch_core.results.statistics.flips import half_widths, holm, raw_pvalues
from nnpatch_core.results.statistics.intervals import intervals
from nnpatch_core.results.statistics.samples import Floats, Sample, Samples
from nnpatch_core.sites import Axis

PAGE = population.ROOT / "docs" / "statistics-measured.md"
BEGIN, END = "<!-- report: begin -->", "<!-- report: end -->"
COUNTS = (12, 25, 50)
LEVEL = 0.95
#: How many of the cells are the strongest ones.
TOP = 20
#: In the tables of single cells.
NAMED = 8
#: Standard deviations, in the metric's unit, that are rounding: of cells that no prompt moves.
ROUNDING = 1e-4
#: Draws of prompts, resamples and flips in each: for coverage, and for p-values.
DRAWS, RESAMPLES = 2_000, 2_000
NULL_DRAWS, FLIPS = 10_000, 10_000
SEED = 0
#: Kinds of intervals that were not chosen.
STUDENT, WIDER = "standard error, Student's t", "`interval` and Student's t, the wider end"


def labels_of(axes: Sequence[Axis], place: Sequence[int]) -> Iterator[Any]:
    """What a place is called on each axis."""
    return (axis.labels[at] for axis, at in zip(axes, place, strict=True))


@attrs.frozen(eq=False)
class Cells:
    """The cells of a population that some prompt moves.

    Args:
        names: of each.
        changes: `[cells, prompts]`, patched - target.
        whole: `[prompts]`, source - target.
        unmoved: how many cells were left out.
    """

    names: Sequence[str]
    changes: Floats
    whole: Floats
    unmoved: int

    @classmethod
    def of(cls, out: Outcome) -> Cells:
        """The cells of an outcome."""
        names, changes = [], []
        target = out.baseline.target.double().numpy()
        whole = out.baseline.source.double().numpy() - target
        for name, cells in out.cells.items():
            names += [
                " ".join(map(str, (name, *labels_of(cells.axes, place))))
                for place in cells.index.tolist()
            ]
            changes.append(out.raw[out.metric][name].double().numpy() - target)
        every = np.concatenate(changes)
        # The source run itself is put together again by some; others nothing reads.
        moved = (every.std(1) > ROUNDING) & ((every - whole).std(1) > ROUNDING)
        kept = [name for name, here in zip(names, moved, strict=True) if here]
        return cls(kept, every[moved], whole, int((~moved).sum()))

    @property
    def values(self) -> Floats:
        """`[cells]`: over the whole population."""
        values: Floats = self.changes.mean(1) / self.whole.mean()
        return values

    @property
    def strongest(self) -> NDArray[np.intp]:
        """The cells of largest size, largest first."""
        return np.argsort(-np.abs(self.values))[:TOP]

    def draw(self, chosen: NDArray[np.int64]) -> Samples:
        """The prompts chosen."""
        return Samples((Sample(self.changes[:, chosen], self.whole[chosen]),))


def draws(size: int, count: int, number: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """`number` draws of `count` out of `size` prompts, with replacement."""
    chance = np.random.default_rng((seed, count))
    for _ in range(number):
        yield chance.integers(0, size, count)


# Coverage ----------------------------------------------------------------------------------------


@attrs.frozen
class Others:
    """Intervals and bands that were not chosen: by name the two ends, `[cells]`."""

    intervals: dict[str, tuple[Floats, Floats]]
    bands: dict[str, tuple[Floats, Floats]]

    @classmethod
    def of(cls, sample: Sample, seed: int, resamples: int) -> Others:
        """Those of some prompts."""
        count = len(sample.whole)
        picks = np.random.default_rng((SEED, 1, seed)).integers(0, count, (resamples, count))
        times = (picks[:, :, None] == np.arange(count)).sum(1).astype(float)
        drawn = (sample.changes @ times.T) / (times @ sample.whole)
        value, error = sample.values()[:, None], error_of(sample)[:, None]
        # In each resample the standard error is its own.
        squares = (sample.changes**2) @ times.T + drawn**2 * (times @ sample.whole**2)
        squares -= 2 * drawn * ((sample.changes * sample.whole) @ times.T)
        own = np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / np.abs(times @ sample.whole)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.nan_to_num(np.abs(drawn - value) / own, nan=0.0, posinf=np.inf)
        drawn.sort(axis=1)
        tail, quantile = (1 - LEVEL) / 2, stdtrit(count - 1, (1 + LEVEL) / 2)
        wide = float(ndtr(-np.sqrt(count / (count - 1)) * quantile))
        strict = stdtrit(count - 1, 1 - tail / len(value))
        alone = np.quantile(ratios, LEVEL, axis=1, keepdims=True, method="higher")
        largest = np.quantile(ratios.max(0), LEVEL, method="higher")

        def around(reach: Any) -> tuple[Floats, Floats]:
            return (value - reach * error)[:, 0], (value + reach * error)[:, 0]

        return cls(
            {
                "percentiles": ends(drawn, tail),
                "percentiles at Student's level": ends(drawn, wide),
                "symmetric bootstrap-t": around(alone),
                STUDENT: around(quantile),
            },
            {
                "largest bootstrap-t": around(largest),
                "Student's t by Bonferroni": around(strict),
            },
        )


def ends(ordered: Floats, tail: float) -> tuple[Floats, Floats]:
    """What a share of each row is below, and above."""
    at = tail * (ordered.shape[1] - 1)
    low, high = int(np.floor(at)), int(np.ceil(ordered.shape[1] - 1 - at))
    return ordered[:, low], ordered[:, high]


def error_of(sample: Sample) -> Floats:
    """`[cells]`: the standard error, by the delta method."""
    count = len(sample.whole)
    errors: Floats = np.sqrt((sample.residuals() ** 2).sum(1) / (count - 1) / count)
    return errors


@attrs.define
class Tally:
    """How often intervals of a kind held the truth.

    Args:
        below, above: `[cells]`, in how many draws the truth was below and above them.
        length: `[cells]`, of all of them together.
        number: of draws.
        whole: how many of them held all cells.
    """

    below: Floats
    above: Floats
    length: Floats
    number: int = 0
    whole: int = 0

    @classmethod
    def empty(cls, cells: int) -> Tally:
        """Of no draw."""
        return cls(*np.zeros((3, cells)))

    def add(self, truth: Floats, low: Floats, high: Floats) -> None:
        """Add those of a draw, `[cells]`."""
        below, above = truth < low, truth > high
        self.below += below
        self.above += above
        self.whole += not (below | above).any()
        self.length += high - low
        self.number += 1

    @property
    def held(self) -> Floats:
        """`[cells]`: the share of draws that held it."""
        shares: Floats = 1 - (self.below + self.above) / self.number
        return shares


@attrs.frozen
class Covered:
    """What was found with draws of `count` prompts.

    Args:
        count: how many prompts.
        intervals: name of a kind of interval to its tally.
        bands: the same of bands.
    """

    count: int
    intervals: dict[str, Tally]
    bands: dict[str, Tally]


def cover(cells: Cells, count: int, number: int, resamples: int) -> Covered:
    """Draw `count` prompts `number` times, and see what holds the truth."""
    truth = cells.values
    found = Covered(count, {}, {})
    for at, chosen in enumerate(told(draws(len(cells.whole), count, number, SEED), number)):
        samples = cells.draw(chosen)
        value, half = samples.values(), half_widths(samples, LEVEL, at, resamples)
        kinds = {"`interval`": intervals(samples, LEVEL, at, resamples)}
        bands = {"`band`": (value - half, value + half)}
        others = Others.of(samples.parts[0], at, resamples)
        both = zip(kinds["`interval`"], others.intervals[STUDENT], strict=True)
        (low, also_low), (high, also_high) = both
        others.intervals[WIDER] = np.minimum(low, also_low), np.maximum(high, also_high)
        kinds, bands = kinds | others.intervals, bands | others.bands
        for tallies, each in ((found.intervals, kinds), (found.bands, bands)):
            for kind, (low, high) in each.items():
                tallies.setdefault(kind, Tally.empty(len(truth))).add(truth, low, high)
    return found


# Family-wise error -------------------------------------------------------------------------------


def reject(cells: Cells, count: int, number: int, flips: int) -> dict[str, int]:
    """In how many draws anything is found by 0.05 where there is nothing to be found.

    Each prompt's effects are multiplied by one random sign, for all cells together.
    """
    chance = np.random.default_rng((SEED, 2, count))
    found = {"`max_t`": 0, "`holm`": 0, "`bh`": 0, "none": 0}
    for at, chosen in enumerate(told(draws(len(cells.whole), count, number, 1), number)):
        effects = cells.changes[:, chosen] * chance.choice((-1.0, 1.0), count)
        alone, largest = raw_pvalues(effects, at, flips)
        ordered = np.sort(alone)
        rates = ordered * len(ordered) / np.arange(1, len(ordered) + 1)
        smallest = {
            "`max_t`": largest.min(),
            "`holm`": holm(alone).min(),
            "`bh`": rates.min(),
            "none": ordered[0],
        }
        for how, pvalue in smallest.items():
            found[how] += bool(pvalue <= 1 - LEVEL)
    return found


# The report --------------------------------------------------------------------------------------


def coverage_table(found: Iterable[Covered], cells: Cells) -> str:
    """Of each number of prompts and kind of interval."""
    heads = (
        "prompts",
        "interval",
        "mean",
        "5 % of cells",
        "50 %",
        "95 %",
        f"{TOP} strongest",
        "below / above",
        "length",
    )
    rows = []
    for each in found:
        first = each.intervals["`interval`"]
        for kind, tally in each.intervals.items():
            held = tally.held
            length = (tally.length / tally.number) / (first.length / first.number)
            rows.append(
                (
                    str(each.count),
                    kind,
                    percent(held.mean()),
                    *(percent(np.quantile(held, share)) for share in (0.05, 0.5, 0.95)),
                    percent(held[cells.strongest].mean()),
                    f"{percent((tally.below / tally.number).mean())} / "
                    f"{percent((tally.above / tally.number).mean())}",
                    f"{np.median(length):.2f}",
                )
            )
    return table(heads, rows)


def cells_table(found: Sequence[Covered], cells: Cells) -> str:
    """Of single cells: the strongest, and those that were held least."""
    middle = found[len(found) // 2].intervals["`interval`"].held
    strongest, least = cells.strongest[:NAMED], np.argsort(middle)[:NAMED]
    rows = []
    for told_as, chosen in (("strongest", strongest), ("least often held", least)):
        for cell in chosen:
            shares = [percent(each.intervals["`interval`"].held[cell]) for each in found]
            rows.append((told_as, cells.names[cell], f"{cells.values[cell]:.3g}", *shares))
    return table(("", "cell", "value", *(f"{each.count} prompts" for each in found)), rows)


def band_table(found: Iterable[Covered]) -> str:
    """Of bands."""
    rows = []
    for each in found:
        pointwise = each.intervals["`interval`"]
        for kind, tally in each.bands.items():
            length = (tally.length / tally.number) / (pointwise.length / pointwise.number)
            held = percent(tally.whole / tally.number), percent(tally.held.mean())
            rows.append((str(each.count), kind, *held, f"{np.median(length):.2f}"))
    return table(("prompts", "band", "all cells at once", "one cell, on average", "length"), rows)


def null_table(found: dict[int, dict[str, int]], number: int) -> str:
    """Of p-values where nothing is to be found."""
    kinds = list(next(iter(found.values())))
    rows = [
        (str(count), *(percent(each[kind] / number) for kind in kinds))
        for count, each in found.items()
    ]
    return table(("prompts", *kinds), rows)


def percent(share: float) -> str:
    """A share, as it is printed."""
    return f"{100 * share:.1f} %"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of the page."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(things: Iterable[NDArray[np.int64]], number: int) -> Iterator[NDArray[np.int64]]:
    """The things, and now and then how far it is."""
    begun = time.process_time()
    for at, each in enumerate(things):
        yield each
        if (at + 1) % max(1, number // 4) == 0:
            say(f"{at + 1} of {number} draws of {len(each)}: {time.process_time() - begun:.0f} s")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def main() -> None:
    """Measure, print, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="put the report into the docs")
    parser.add_argument(
        "--population",
        type=Path,
        default=Path("population.safetensors"),
        help="the swept population; made where there is none, which takes half an hour",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="for intervals and bands")
    parser.add_argument("--null-draws", type=int, default=NULL_DRAWS, help="for p-values")
    arguments = parser.parse_args()
    cells = Cells.of(population.load(arguments.population))
    number, null_number = arguments.draws, arguments.null_draws
    covered = [cover(cells, count, number, RESAMPLES) for count in COUNTS]
    null = {count: reject(cells, count, null_number, FLIPS) for count in COUNTS}
    report = "\n\n".join(
        (
            f"Of {number:,} draws of each size, with {RESAMPLES:,} resamples each, the share whose "
            f"{LEVEL:.0%} interval holds a cell's value in the population: over the "
            f"{len(cells.names)} cells the mean, and the shares that 5, 50 and 95 percent of the "
            "cells lie below. The truth may lie below the interval, or above. Length is the median "
            "over the cells, in lengths of `interval`. The other kinds are there to compare:",
            coverage_table(covered, cells),
            "Single cells, by `interval`:",
            cells_table(covered, cells),
            f"Simultaneous bands (`band`, {RESAMPLES:,} flips):",
            band_table(covered),
            f"The share of {null_number:,} draws in which any of the {len(cells.names)} cells has "
            f"an adjusted p-value of at most {1 - LEVEL:.2f} ({FLIPS:,} flips), where each "
            "prompt's effects were multiplied by one random sign, so that there is nothing to be "
            "found:",
            null_table(null, null_number),
        )
    )
    sys.stdout.write(f"{report}\n")
    if arguments.publish:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
