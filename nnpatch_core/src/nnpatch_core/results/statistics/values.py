"""The values of cells: metrics of patched runs on an outcome's scale.

Each function takes an outcome and one of its site names, and returns a tensor with a row for each
swept cell, in the order of `outcome.cells[name].index`. The outcome puts the rows where they
belong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nnpatch_core.results.parts import Scale

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def cell_values(outcome: Outcome, name: str) -> Tensor:
    """The value of each cell, `[cells]`, float32: one figure for all prompts together."""
    # float64, so that a cell equal to a run gives its value to the last digit.
    patched = outcome.raw[outcome.metric][name].double()
    baseline = outcome.baseline
    source, target = baseline.source.double(), baseline.target.double()
    if outcome.magnitude:
        moved = (patched - target).abs().mean(-1)
        whole = (source.mean() - target.mean()).abs()
        return (moved if outcome.scale == "change" else moved / whole).float()
    return _scaled(patched.mean(-1), source.mean(), target.mean(), outcome.scale).float()


def prompt_values(outcome: Outcome, name: str) -> Tensor:
    """The value of each cell in each prompt, `[cells, batch]`; nan where it has no token."""
    patched, baseline = outcome.raw[outcome.metric][name], outcome.baseline
    values = _scaled(patched, baseline.source, baseline.target, outcome.scale)
    if outcome.magnitude:
        values = values.abs()
    return torch.where(outcome.cells[name].present, values, float("nan"))


def flat_cells(outcome: Outcome, name: str) -> Tensor:
    """The cells that are estimated to change nothing in any prompt, `[cells]`, bool."""
    unmoved = (outcome.raw[outcome.metric][name] == outcome.baseline.target).all(-1)
    return unmoved & ~outcome.cells[name].exact


def _scaled(patched: Tensor, source: Tensor, target: Tensor, scale: Scale) -> Tensor:
    # 0.0 is added so that nothing moved is 0 and not -0.
    change = patched - target
    return 0.0 + (change if scale == "change" else change / (source - target))
