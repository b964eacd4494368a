"""How sure values are: the user's arguments read, statistics asked, doubts said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.results import selection
from nnpatch_core.results.interval import Interval
from nnpatch_core.results.moments import denominator_may_be_zero, standard_errors
from nnpatch_core.results.statistics import (
    Draws,
    Figured,
    any_value,
    bands_of,
    doubts,
    interval_of,
    least_pvalue,
    prompts_needed,
    pvalues_of,
    read_level,
)

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

#: How p-values are adjusted for the number of cells.
Adjust: TypeAlias = Literal["holm", "bh", "max_t"] | None
#: P-values that cannot be below this are of no use to most.
_USUAL = 0.05


def interval(
    figured: Figured, name: Any, level: Any, seed: Any, resamples: Any, wider: Any
) -> Interval | dict[str, Interval]:
    """See `Outcome.interval`."""
    check_flags(wider=wider)
    check_prompts(figured, "interval()")
    level, draws = read_level(level), Draws.read(resamples, seed, "resamples")
    names, alone = chosen_names(figured, name)
    _warn(figured, level, draws)
    found = {each: interval_of(figured, each, level, draws, wider=bool(wider)) for each in names}
    return found[names[0]] if alone else found


def band(
    figured: Figured, name: Any, level: Any, seed: Any, flips: Any, wider: Any
) -> Interval | dict[str, Interval]:
    """See `Outcome.band`."""
    check_flags(wider=wider)
    check_prompts(figured, "band()")
    level, draws = read_level(level), Draws.read(flips, seed, "flips")
    names, alone = chosen_names(figured, name)
    _warn(figured, level, draws)
    found = bands_of(figured, names, level, draws, wider=bool(wider))
    return found[names[0]] if alone else found


def pvalues(
    figured: Figured, name: Any, adjust: Any, seed: Any, flips: Any
) -> Tensor | dict[str, Tensor]:
    """See `Outcome.pvalues`."""
    check_prompts(figured, "pvalues()")
    draws = Draws.read(flips, seed, "flips")
    names, alone = chosen_names(figured, name)
    found = pvalues_of(figured, names, adjust, draws)
    cells = sum(int(each.isfinite().sum()) for each in found.values())
    least = least_pvalue(cells, figured.count, adjust, draws)
    if cells and least > _USUAL:
        few = least_pvalue(1, figured.count, None, draws) > _USUAL
        advice = (
            "take 6 prompts or more" if few else "take adjust='max_t', or more prompts and flips"
        )
        prompts = "1 prompt" if figured.count == 1 else f"{figured.count} prompts"
        warn(
            f"with {prompts}, {cells} cells and {draws.count} flips no p-value can "
            f"be below {least:.2g}, whatever the effect: {advice}",
            StatisticsWarning,
        )
    return found[names[0]] if alone else found


def needed(outcome: Outcome, name: Any, width: Any, level: Any) -> Tensor:
    """See `Outcome.prompts_needed`."""
    level = read_level(level)
    number = isinstance(width, int | float | np.number) and not isinstance(width, bool)
    if not number or not 0 < width < float("inf"):
        raise OutcomeError(f"width must be a positive number, got {shown(width)}")
    key = selection.find_name(outcome.cells, name)
    deviations = standard_errors(outcome, key).numpy() * outcome.count**0.5
    if denominator_may_be_zero(outcome, level):
        deviations = np.where(np.isnan(deviations), np.nan, np.inf)
        warn(
            f"{any_value(level).rpartition(':')[0]}: no number of prompts is told",
            StatisticsWarning,
        )
    found = torch.from_numpy(prompts_needed(deviations, float(width), level))
    return outcome.cells[key].place(found, float("nan"))


def check_prompts(figured: Figured, what: str) -> None:
    """Raise `OutcomeError` where only means of the prompts were kept."""
    for term in figured.terms:
        if term.outcome.moments is not None:
            raise OutcomeError(
                f"{what} needs the numbers of each prompt, and this outcome has means over "
                f"{term.outcome.moments.count} prompts alone: sweep with keep='prompts'"
            )


def chosen_names(figured: Figured, name: Any) -> tuple[tuple[str, ...], bool]:
    """The site names that are asked for, and whether it is one by itself."""
    if isinstance(name, str):
        return (selection.find_name(figured.cells, name),), True
    names = selection.find_names(figured.cells, name)
    if not names:
        raise OutcomeError("no site name was given")
    return tuple(dict.fromkeys(names)), False


def _warn(figured: Figured, level: float, draws: Draws) -> None:
    doubt = doubts(figured, level, draws)
    if doubt:
        warn(doubt, StatisticsWarning)
