"""Columns of a table that say how sure each value is: `low`, `high`, `p_value`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.moments import denominator_may_be_zero, standard_errors
from nnpatch_core.results.statistics import (
    Draws,
    Figured,
    any_value,
    cell_values,
    doubts,
    ends_of,
    pvalues_of,
)

Numbers: TypeAlias = NDArray[np.float64]
#: The draws of tables, which are those of `Outcome.interval` and `Outcome.pvalues`.
DRAWS = Draws(10_000, 0)


def only_means(figured: Figured) -> bool:
    """Whether the prompts' own numbers were not kept."""
    return any(term.outcome.moments is not None for term in figured.terms)


def ends_by_means(figured: Figured, name: str, level: float) -> tuple[Numbers, Numbers] | None:
    """The ends of each cell's interval, `[cells]`, by Student's t; None where there is none.

    Of an outcome of means alone: of sizes, and of sums of such outcomes, too little is kept.
    """
    if len(figured.terms) > 1 or figured.magnitude:
        return None
    (term,) = figured.terms
    values = cell_values(figured, name).double().numpy()
    errors = abs(term.weight) * standard_errors(term.outcome, name).numpy()
    if denominator_may_be_zero(term.outcome, level):
        return np.full(values.shape, -np.inf), np.full(values.shape, np.inf)
    half = float(stdtrit(figured.count - 1, (1 + level) / 2)) * errors
    return values - half, values + half


def doubt_of(figured: Figured, level: float) -> str:
    """The reason why the intervals of several prompts are not what they should be, if any."""
    if not only_means(figured):
        return doubts(figured, level, DRAWS)
    if len(figured.terms) > 1 or figured.magnitude:
        return ""
    infinite = denominator_may_be_zero(figured.terms[0].outcome, level)
    return any_value(level) if infinite else ""


def sure_columns(
    figured: Figured, names: Sequence[str], level: float
) -> dict[str, dict[str, Numbers]]:
    """Site name to the columns of its cells, `[cells]` each; nan where there is no such number.

    Args:
        figured: an outcome, or a combination.
        names: its site names, which are one family for p-values, adjusted by max-T.
        level: of intervals; these are (-inf, inf) where they would not be what they should, as a
            table has no place for words about them.
    """
    cells = {name: len(figured.cells[name].index) for name in names}
    doubtful = bool(names) and bool(doubt_of(figured, level))
    ends = {name: _ends(figured, name, level, doubtful) for name in names}
    found = pvalues(figured, names)
    return {
        name: {
            "low": ends[name][0],
            "high": ends[name][1],
            "p_value": found.get(name, np.full(cells[name], math.nan)),
        }
        for name in names
    }


def pvalues(figured: Figured, names: Sequence[str]) -> dict[str, Numbers]:
    """Site name to the p-value of each cell, `[cells]`; empty where there are none."""
    if figured.count < 2 or only_means(figured) or not names:
        return {}
    try:
        found = pvalues_of(figured, names, "max_t", DRAWS)
    except OutcomeError:
        return {}
    return {name: found[name][tuple(figured.cells[name].index.T)].numpy() for name in names}


def _ends(figured: Figured, name: str, level: float, doubtful: bool) -> tuple[Numbers, Numbers]:
    count = len(figured.cells[name].index)
    if figured.count < 2 or doubtful:
        return np.full(count, -math.inf), np.full(count, math.inf)
    if only_means(figured):
        nothing = np.full(count, math.nan)
        return ends_by_means(figured, name, level) or (nothing, nothing)
    return ends_of(figured, name, range(count), level, DRAWS)
