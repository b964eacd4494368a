"""Screening: an estimate chooses the cells worth a run, a spot check bounds what it has missed.

The loop of Kramár et al., "AtP*" (2024): estimate all, measure the most promising, and bound what
was left out.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core._printable import shown
from nnpatch_core.engine import Choice
from nnpatch_core.errors import PatchingError, UnknownNameError
from nnpatch_core.results import Cells, Outcome, Screening, known_in_words, runs_known
from nnpatch_core.sweep import (
    Checkpoint,
    Repairs,
    Runs,
    Sweep,
    estimate_sweep,
    measure_sweep,
)

SCREENS = ("attribution", "atp*")


@attrs.frozen
class ScreenOptions:
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


def check_screen(by: Any, top_k: Any, spot_checks: Any, seed: Any) -> ScreenOptions | None:
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
    return ScreenOptions(by, top_k, spot_checks, strict_seed(seed))


@attrs.frozen(eq=False)
class _Chosen:
    """The cells that a screen has chosen.

    Args:
        top: `[top_k]`, the most promising cells, by number.
        spots: `[spot_checks]`, the others that are measured, by number.
        rest: how many cells are behind the top, besides those that are known without a run.
    """

    top: Tensor
    spots: Tensor
    rest: int

    def mask(self, cells: int) -> Tensor:
        """`[cells]`, bool: which cells are measured."""
        chosen = torch.zeros(cells, dtype=torch.bool, device="cpu")
        chosen[self.top] = chosen[self.spots] = True
        return chosen


def screen_sweep(
    options: ScreenOptions,
    sweep: Sweep,
    runs: Runs,
    choice: Choice,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Estimate all cells, and measure the most promising ones, and some others at random.

    Args:
        options: how cells are chosen.
        sweep: all cells.
        runs: into which prompts, and what is put there.
        choice: the engines that may measure them.
        checkpoint: where what was measured is kept.

    Raises:
        PatchingError: one of its kinds; bad input before any cell runs.
    """
    repaired, told = options.by == "atp*", len(sweep.chunks) > 1
    estimated = sweep.to_estimate()
    signed = estimate_sweep(
        estimated, runs, Repairs(None, repaired, False), chunks_told=told, screening=True
    )
    ranking = signed
    if repaired:
        # AtP* ranks by sizes without a sign; what is not measured is shown by the signed estimate.
        ranking = estimate_sweep(
            estimated, runs, Repairs(None, True, True), chunks_told=True, screening=True
        )
    return measure_chosen(options, signed, ranking, sweep, runs, choice, checkpoint)


def measure_chosen(
    options: ScreenOptions,
    estimate: Outcome,
    ranking: Outcome,
    sweep: Sweep,
    runs: Runs,
    choice: Choice,
    checkpoint: Checkpoint | None = None,
) -> Outcome:
    """Measure the cells that an estimate has chosen, and some others at random.

    Args:
        options: how cells are chosen.
        estimate: of all cells: what the others keep.
        ranking: by whose size they are chosen.
        sweep: all cells.
        runs: into which prompts, and what is put there.
        choice: the engines that may measure them.
        checkpoint: where what was measured is kept.

    Raises:
        PatchingError: one of its kinds.
    """
    chosen = _choose(options, ranking)
    mask = chosen.mask(len(sweep.patches.cells))
    measured = measure_sweep(sweep.only(mask), runs, choice, checkpoint)
    outcome = _laid(estimate, measured, mask)
    spots = _sizes(outcome)[chosen.spots]
    screening = Screening(
        by=options.by,
        chosen=len(chosen.top),
        rest=chosen.rest,
        checked=len(spots),
        largest=float(spots.max()) if len(spots) else 0.0,
    )
    kind = f"{measured.kind}, screened by {options.by}"
    # Of all cells, and not of those alone that were measured last.
    info = {**outcome.info, "elided": known_in_words(*runs_known(outcome.cells.values()))}
    return attrs.evolve(outcome, kind=kind, screening=screening, info=info)


def _choose(options: ScreenOptions, ranking: Outcome) -> _Chosen:
    """Choose cells by the size of an estimate, and others at random."""
    order = _sizes(ranking).argsort(descending=True, stable=True)
    known = torch.cat([cells.exact for cells in ranking.cells.values()])
    # Where all is known, one cell is run all the same: a sweep has at least one.
    order = order[~known[order]] if not known.all() else order[:1]
    # In the order of the cells: among near ties, that of the estimates depends on rounding.
    top, rest = order[: options.top_k], order[options.top_k :].sort().values
    wanted = len(top) if options.spot_checks is None else options.spot_checks
    random = torch.Generator().manual_seed(options.seed)
    spots = rest[torch.randperm(len(rest), generator=random, device="cpu")[:wanted]]
    return _Chosen(top, spots, len(rest))


def _laid(estimate: Outcome, measured: Outcome, chosen: Tensor) -> Outcome:
    """The measured cells laid into the estimated changes of all cells.

    Args:
        estimate: of all cells, with its sign.
        measured: those that were chosen.
        chosen: `[cells]`, bool: which these are.
    """
    sizes = [len(cells.index) for cells in estimate.cells.values()]
    by_name = dict(zip(estimate.cells, torch.split(chosen, sizes), strict=True))

    def cells_of(name: str) -> Cells:
        old, new, here = estimate.cells[name], measured.cells[name], by_name[name]
        elided, unread = old.elided.clone(), old.unread.clone()
        elided[here], unread[here] = new.elided, new.unread
        cells = attrs.evolve(old, elided=elided, unread=unread)
        return attrs.evolve(cells, exact=here | cells.known.all(1))

    def values_of(metric: str, name: str) -> Tensor:
        # The estimate's unpatched runs differ from the measured ones by rounding.
        changes = estimate.raw[metric][name] - estimate.baselines[metric].target.double()
        values = measured.baselines[metric].target.double() + changes
        values[by_name[name]] = measured.raw[metric][name].double()
        return values

    raw = {
        metric: {name: values_of(metric, name) for name in estimate.cells}
        for metric in measured.raw
    }
    return attrs.evolve(measured, cells={name: cells_of(name) for name in estimate.cells}, raw=raw)


def _sizes(outcome: Outcome) -> Tensor:
    """`[cells]`: the absolute value of each, in the order in which they were swept."""
    values = [outcome[name][tuple(cells.index.T)] for name, cells in outcome.cells.items()]
    return torch.cat(values).abs()
