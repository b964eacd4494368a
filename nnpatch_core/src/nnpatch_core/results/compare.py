"""The comparison of two outcomes: which of their cells are set against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.agreement import Agreement, ComparedCells
from nnpatch_core.results.parts import Cells
from nnpatch_core.results.selection import find_name
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def compare(estimate: Outcome, exact: Outcome, top_k: int) -> Agreement:
    """Compare two outcomes cell by cell; see `Outcome.agreement`.

    Raises:
        OutcomeError: outcomes that cannot be compared, or a `top_k` that is not positive.
    """
    top_k = strict_int(top_k, "top_k", OutcomeError)
    if top_k < 1:
        raise OutcomeError(f"top_k must be at least 1, got {top_k}")
    if not hasattr(exact, "magnitudes"):
        raise OutcomeError(f"an estimate is compared with an Outcome, got {shown(exact)}")
    for field in ("metric", "scale"):
        one, other = getattr(estimate, field), getattr(exact, field)
        if one != other:
            raise OutcomeError(
                f"the estimate has the {field} {shown(one)} and the exact outcome {shown(other)}"
            )
    # Either as sizes makes both so.
    if estimate.magnitude or exact.magnitude:
        estimate, exact = estimate.magnitudes(), exact.magnitudes()
    # A component may have another of its names in the other outcome.
    names = [name for name in estimate if name in exact]
    if not names:
        raise OutcomeError(
            f"the estimate has the sites {shown(list(estimate))} and the exact outcome "
            f"{shown(list(exact))}: none is in both"
        )
    # An estimate knows some zeros exactly, which would be all that is compared.
    if not estimate.estimated and not any(
        _measured(exact.cells[find_name(exact.cells, name)]) for name in names
    ):
        raise OutcomeError(
            f"no cell of {shown(names)} was both estimated and measured exactly: it is the wrong "
            f"way round, as {shown(exact.kind)} is the estimate, and {shown(estimate.kind)} was "
            "measured; call estimate.agreement(exact)"
        )
    sites = {name: _compared(name, estimate, exact) for name in names}
    if not any(len(one.index) + one.left_out for one in sites.values()):
        raise OutcomeError(f"no cell of {shown(names)} was both estimated and measured exactly")
    return Agreement(
        sites=sites,
        top_k=top_k,
        kinds=(estimate.kind, exact.kind),
        metric=exact.metric,
        scale=exact.scale,
        magnitude=exact.magnitude,
        tokens=exact.tokens,
        model=exact.info["model"],
        outcomes=(estimate, exact),
    )


def _measured(cells: Cells) -> bool:
    """True if they are not estimates alone, beside cells that are known to change no answer."""
    return bool(cells.exact.all()) or bool((cells.exact & ~cells.known.all(1)).any())


def _compared(name: str, estimate: Outcome, exact: Outcome) -> ComparedCells:
    axes = estimate.axes(name)
    check_axes(name, axes, exact.axes(name), ("the estimate", "the exact outcome"))
    both = estimate.swept(name) & exact.exact(name)
    if estimate.estimated:
        both &= ~estimate.exact(name)
    values = [outcome[name][both].double().numpy() for outcome in (estimate, exact)]
    finite = np.isfinite(values).all(0)
    return ComparedCells(
        axes,
        both.nonzero().numpy()[finite],
        values[0][finite],
        values[1][finite],
        left_out=int((~finite).sum()),
    )


def check_axes(
    name: str, first: Sequence[Axis], second: Sequence[Axis], sides: tuple[str, str]
) -> None:
    """Raise `OutcomeError` for axes that are not alike; `sides` are words for the two outcomes."""
    one, other = sides
    names = [", ".join(axis.name for axis in axes) for axes in (first, second)]
    if names[0] != names[1]:
        raise OutcomeError(
            f"{shown(name)} has the axes {names[0]} in {one} and {names[1]} in {other}"
        )
    for own, its in zip(first, second, strict=True):
        if len(own.labels) != len(its.labels):
            raise OutcomeError(
                f"the axis {own.name} of {shown(name)} has {len(own.labels)} places in {one} and "
                f"{len(its.labels)} in {other}"
            )
        for label, another in zip(own.labels, its.labels, strict=True):
            if label != another:
                raise OutcomeError(
                    f"the axis {own.name} of {shown(name)} has {shown(label)} in {one} where "
                    f"{other} has {shown(another)}"
                )
