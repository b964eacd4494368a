"""Screening: an estimate chooses the cells worth a run, a spot check bounds what it has missed.

The loop of Kramár et al., "AtP*" (2024): estimate all, measure the most promising, and bound what
was left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import shown
from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core.errors import PatchingError, UnknownNameError
from nnpatch_core.results import Baseline, Outcome, Screening
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.sweep.tally import Tally

SCREENS = ("attribution", "atp*")


@attrs.frozen
class Screen:
    """How cells are chosen.

    Args:
        by: one of `SCREENS`.
        top_k: how many of the most promising cells are measured.
        spot_checks: how many of the others, at random; None is as many as `top_k`.
        seed: of the random ones.
    """

    by: str
    top_k: int
    spot_checks: int | None
    seed: int


def check_screen(by: Any, top_k: Any, spot_checks: Any, seed: Any) -> Screen | None:
    """The screen that arguments ask for; None without one.

    Raises:
        UnknownNameError: there is no such screen.
        PatchingError: a number is missing, malformed, or means nothing.
    """
    if by is None:
        for name, value in (("top_k", top_k), ("spot_checks", spot_checks), ("seed", seed)):
            if value is not None:
                raise PatchingError(f"{name}={shown(value)} means nothing without screen=")
        return None
    if not isinstance(by, str) or by not in SCREENS:
        raise UnknownNameError(f"unknown screen {shown(by)}; there are {', '.join(SCREENS)}")
    if top_k is None:
        raise PatchingError(f"screen={by!r} needs top_k=, the number of cells to measure")
    if strict_int(top_k, "top_k", PatchingError) < 1:
        raise PatchingError(f"top_k must be at least 1, got {top_k}")
    if spot_checks is not None and strict_int(spot_checks, "spot_checks", PatchingError) < 0:
        raise PatchingError(f"spot_checks must not be negative, got {spot_checks}")
    return Screen(by, top_k, spot_checks, strict_seed(0 if seed is None else seed, PatchingError))


@attrs.frozen(eq=False)
class Screened:
    """What a screen has chosen.

    Args:
        screen: how.
        estimate: of all cells, with its sign.
        top: `[top_k]`, the most promising cells, by number.
        spots: `[spot_checks]`, the others that are measured, by number.
        rest: how many cells are behind them, besides those that are known without a run.
    """

    screen: Screen
    estimate: Outcome
    top: Tensor
    spots: Tensor
    rest: int

    @property
    def chosen(self) -> Tensor:
        """`[cells]`, bool: which cells are measured."""
        count = sum(len(each.index) for each in self.estimate.cells.values())
        found = torch.zeros(count, dtype=torch.bool, device="cpu")
        found[self.top] = found[self.spots] = True
        return found

    def laid(self, whole: Sweep, measured: Tally, baseline: Mapping[str, Baseline]) -> Tally:
        """What was measured, laid into the estimated changes of all cells.

        Args:
            whole: the sweep of all cells.
            measured: what was measured, of those that were chosen.
            baseline: the unpatched runs of that sweep; the estimate's own differ by rounding.
        """
        values = {}
        for name, found in measured.values.items():
            raw = torch.cat(list(self.estimate.raw[name].values()))
            changes = raw - self.estimate.baselines[name].target.double()
            values[name] = baseline[name].target.double() + changes
            values[name][self.chosen] = found.double()
        done = torch.zeros(len(whole.cells), measured.done.shape[1], dtype=torch.bool, device="cpu")
        elided = torch.cat([cells.elided for cells in self.estimate.cells.values()])
        done[self.chosen], elided[self.chosen] = measured.done, measured.elided
        unread = torch.cat([cells.unread for cells in self.estimate.cells.values()])
        return attrs.evolve(measured, values=values, done=done, elided=elided, unread=unread)

    def exact(self, laid: Tally) -> Tensor:
        """`[cells]`, bool: what was measured, or is known without."""
        return self.chosen | laid.known.all(1)

    def screening(self, outcome: Outcome) -> Screening:
        """What the spot check found, in the outcome's first metric."""
        seen = _sizes(outcome)[self.spots]
        return Screening(
            by=self.screen.by,
            chosen=len(self.top),
            rest=self.rest,
            checked=len(self.spots),
            largest=float(seen.max()) if len(seen) else 0.0,
        )


def screen_by(screen: Screen, estimate: Callable[[bool, bool], Outcome]) -> Screened:
    """Choose cells by the size of an estimate, and others at random.

    Args:
        screen: how.
        estimate: makes an estimate of all cells, given whether it has the QK fix, and GradDrop.
    """
    repaired = screen.by == "atp*"
    signed = estimate(repaired, False)
    # AtP* ranks by sizes that have no sign; what is not measured is shown by the estimate that has.
    ranking = estimate(True, True) if repaired else signed
    order = _sizes(ranking).argsort(descending=True, stable=True)
    known = torch.cat([cells.exact for cells in ranking.cells.values()])
    # Where all is known, one cell is run all the same: a sweep has at least one.
    order = order[~known[order]] if not known.all() else order[:1]
    # In the order of the cells: that of the estimates hangs, among near ties, on how rounding goes.
    top, rest = order[: screen.top_k], order[screen.top_k :].sort().values
    wanted = len(top) if screen.spot_checks is None else screen.spot_checks
    random = torch.Generator().manual_seed(screen.seed)
    spots = rest[torch.randperm(len(rest), generator=random, device="cpu")[:wanted]]
    return Screened(screen, signed, top, spots, len(rest))


def _sizes(outcome: Outcome) -> Tensor:
    """`[cells]`: the absolute value of each, in the order in which they were swept."""
    found = [outcome[name][tuple(cells.index.T)] for name, cells in outcome.cells.items()]
    return torch.cat(found).abs()
