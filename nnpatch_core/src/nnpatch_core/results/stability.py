"""The stability of the strongest cells: which stay so in prompts that are drawn again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._arguments import check_flags
from nnpatch_core._html import block, heading, table
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import printable
from nnpatch_core._warnings import warn
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.results import tables
from nnpatch_core.results.statistics import Draws, Figured, cell_values, top_shares
from nnpatch_core.results.sureness import check_prompts, chosen_names
from nnpatch_core.results.top import padded, strongest_groups, width_of
from nnpatch_core.results.words import cell_name, in_digits

#: A cell that comes in in so large a share of draws is told.
_OFTEN = 0.05


@attrs.frozen(eq=False, repr=False)
class Stability:
    """How far the strongest cells stay the strongest; `Outcome.stability` makes it.

    Args:
        rows: the strongest cells, each with the `share` of draws in which it is one of them too.
        others: further cells that are in at least 5 percent of draws, the most frequent first.
        draws: how often prompts were drawn again.
        broken: how many cells have no number, and so no place.

    Examples:
        >>> row = {"site": "resid", "layer": 3, "value": 0.9, "share": 0.75}
        >>> other = {"site": "resid", "layer": 4, "value": 0.8, "share": 0.25}
        >>> print(Stability((row,), (other,), 10_000))
        The strongest 1 keep 75% of their places when the prompts are drawn again (10000 draws).
                  value  stays
        resid L3  0.900    75%
        others    value comes in
        resid L4  0.800    25%
    """

    rows: tuple[dict[str, Any], ...]
    others: tuple[dict[str, Any], ...]
    draws: int
    broken: int = 0

    @property
    def kept(self) -> float:
        """The mean share of the strongest cells that a draw has too; nan without cells."""
        return float(np.mean([row["share"] for row in self.rows])) if self.rows else float("nan")

    def __repr__(self) -> str:
        return f"Stability({len(self.rows)} cells keep {self.kept:.0%} of their places)"

    def __str__(self) -> str:
        written = [*self._lines(self.rows), *self._lines(self.others)]
        width = max(width_of(name) for name, *_ in [("others",), *written])
        lines = [self._sentence(), f"{'':{width}}  value  stays"]
        lines += [
            f"{padded(name, width, left=True)} {value:>6} {share:>6}"
            for name, value, share in written[: len(self.rows)]
        ]
        if self.others:
            lines.append(f"{'others':{width}}  value comes in")
            lines += [
                f"{padded(name, width, left=True)} {value:>6} {share:>6}"
                for name, value, share in written[len(self.rows) :]
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [
            heading(self._sentence()),
            table(("cell", "value", "stays"), self._lines(self.rows)),
        ]
        if self.others:
            parts.append(table(("another", "value", "comes in"), self._lines(self.others)))
        return block(*parts)

    def _sentence(self) -> str:
        if not self.rows:
            return "No cell has a value that is a number."
        words = (
            f"The strongest {len(self.rows)} keep {self.kept:.0%} of their places when the prompts "
            f"are drawn again ({self.draws} draws)."
        )
        if not self.broken:
            return words
        cells = "1 cell has" if self.broken == 1 else f"{self.broken:,} cells have"
        return f"{words} {cells} no number: some prompts gave nan or inf there."

    @staticmethod
    def _lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
        return [
            (printable(cell_name(row)), in_digits(row["value"]), f"{row['share']:.0%}")
            for row in rows
        ]


def stability(
    figured: Figured, k: Any, name: Any, distinct: Any, seed: Any, resamples: Any
) -> Stability:
    """See `Outcome.stability`."""
    check_prompts(figured, "stability()")
    k, draws = strict_int(k, "k", OutcomeError), Draws.read(resamples, seed, "resamples")
    if k < 1:
        raise OutcomeError(f"k must be at least 1, got {k}")
    check_flags(distinct=distinct)
    names, _ = chosen_names(figured, name)
    if figured.count < 2:
        warn(
            "there is one prompt, which says nothing about others: each draw is the same",
            StatisticsWarning,
        )
    kept = {each: np.full(len(figured.cells[each].index), not distinct) for each in names}
    if distinct:
        every = sum(len(each) for each in kept.values())
        for each, (first, *_) in strongest_groups(figured, names, every, True):
            kept[each][first] = True
    shares = top_shares(figured, names, list(kept.values()), k, draws)
    return _ranked(figured, names, shares, k, draws)


def _ranked(
    figured: Figured,
    names: Sequence[str],
    shares: Sequence[NDArray[np.float64]],
    k: int,
    draws: Draws,
) -> Stability:
    values = np.concatenate([cell_values(figured, name).double().numpy() for name in names])
    together = np.concatenate(list(shares))
    sizes = np.where(np.isfinite(together), np.abs(values), -1.0)
    order = np.argsort(-sizes, kind="stable")
    order = order[np.isfinite(together[order])]
    first, rest = order[:k], order[k:]
    often = rest[together[rest] >= _OFTEN]
    often = often[np.argsort(-together[often], kind="stable")]
    where = [
        (name, row) for name, each in zip(names, shares, strict=True) for row in range(len(each))
    ]

    def rows(numbers: NDArray[np.int64]) -> tuple[dict[str, Any], ...]:
        made: list[dict[str, Any]] = []
        for number in numbers.tolist():
            name, row = where[number]
            places = [figured.cells[name].index[row].tolist()]
            columns = {"value": [float(values[number])], "share": [float(together[number])]}
            blocks = [tables.Block(name, figured.cells[name].axes, places, columns)]
            made += tables.rows(blocks, figured.tokens)
        return tuple(made)

    broken = int((~np.isfinite(values)).sum())
    return Stability(rows(first), rows(often), draws.count, broken)
