"""The values of cells: metrics of patched runs on an outcome's scale.

Each function takes an outcome and one of its site names, and returns a tensor with a row for each
swept cell, in the order of `outcome.cells[name].index`. The outcome puts the rows where they
belong. A combination of outcomes has terms, whose values add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core.results.parts import Cells, Scale

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


@attrs.frozen(eq=False)
class Term:
    """An outcome in a sum of outcomes.

    Args:
        weight: of its values.
        outcome: the outcome.
        rows: site name to the outcome's cells in the order of the sum's; None where the outcome
            stands alone.
    """

    weight: float
    outcome: Outcome
    rows: Mapping[str, Tensor] | None = None


class Figured(Protocol):
    """An outcome, or a combination of outcomes: what has figures of cells."""

    @property
    def cells(self) -> Mapping[str, Cells]:
        """Site name to its cells."""
        ...

    @property
    def estimated(self) -> bool:
        """True if some cells are estimates."""
        ...

    @property
    def tokens(self) -> tuple[str, ...]:
        """A label for each position."""
        ...

    @property
    def kind(self) -> str:
        """The kind of sweep."""
        ...

    @property
    def metric(self) -> str:
        """The metric whose values it has."""
        ...

    @property
    def scale(self) -> Scale:
        """The scale of its values."""
        ...

    @property
    def magnitude(self) -> bool:
        """Whether values are sizes."""
        ...

    @property
    def count(self) -> int:
        """How many prompts there were."""
        ...

    @property
    def terms(self) -> tuple[Term, ...]:
        """The outcomes whose values add up to its own."""
        ...


def cell_values(figured: Figured, name: str) -> Tensor:
    """The value of each cell, `[cells]`, float32: one figure for all prompts together."""
    terms = figured.terms
    if len(terms) == 1 and terms[0].rows is None:
        return _values(terms[0].outcome, name).float()
    total = torch.zeros(len(figured.cells[name].index), dtype=torch.float64, device="cpu")
    for term in terms:
        values = _values(term.outcome, name)
        total += term.weight * (values if term.rows is None else values[term.rows[name]])
    return total.float()


def _values(outcome: Outcome, name: str) -> Tensor:
    # float64, so that a cell equal to a run gives its value to the last digit.
    patched = outcome.raw[outcome.metric][name].double()
    baseline = outcome.baseline
    source, target = baseline.source.double(), baseline.target.double()
    if outcome.magnitude:
        moved = (patched - target).abs().mean(-1)
        whole = (source.mean() - target.mean()).abs()
        return moved if outcome.scale == "change" else moved / whole
    return _scaled(patched.mean(-1), source.mean(), target.mean(), outcome.scale)


def changes_of(outcome: Outcome, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The changes of an outcome, `[cells, batch]`, and what they are shares of, `[batch]`."""
    baseline = outcome.baseline
    source, target = baseline.source.double(), baseline.target.double()
    changes = outcome.raw[outcome.metric][name].double() - target
    whole = torch.ones_like(target) if outcome.scale == "change" else source - target
    if outcome.magnitude:
        changes, whole = changes.abs(), whole * whole.mean().sign()
    return changes.numpy(), whole.numpy()


def size_of(outcome: Outcome) -> float:
    """The mean size of that of which changes are shares, or of the metric that they change."""
    baseline = outcome.baseline
    source, target = baseline.source.double(), baseline.target.double()
    return float((target if outcome.scale == "change" else source - target).abs().mean())


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
