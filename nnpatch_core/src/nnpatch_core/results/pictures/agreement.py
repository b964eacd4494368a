"""The picture of an agreement: a point for each cell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from nnpatch_core._arguments import check_flags
from nnpatch_core._integers import strict_int
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import tables
from nnpatch_core.results.pictures.scatter import Points, scatter
from nnpatch_core.results.words import cell_name, model_name

if TYPE_CHECKING:
    from nnpatch_core.results.agreement import Agreement


def draw_agreement(agreement: Agreement, *, interactive: Any, label: Any, title: Any) -> Any:
    """Draw estimates up and exact values across; see `Agreement.plot`.

    Raises:
        OutcomeError: see `Agreement.plot`.
    """
    check_flags(interactive=interactive)
    if title is not None and not isinstance(title, str):
        raise OutcomeError(f"title must be a text, got {shown(title)}")
    label = strict_int(label, "label", OutcomeError)
    if label < 0:
        raise OutcomeError(f"label must be at least 0, got {label}")
    groups = [
        _points(block.name, tables.rows([block], agreement.tokens))
        for block in tables.compared_blocks(agreement)
    ]
    estimate, exact = agreement.kinds
    unit = f"{agreement.scale}, as sizes" if agreement.magnitude else agreement.scale
    about = f"{model_name(agreement.model)}: {estimate} and {exact}, {agreement.metric}"
    return scatter(
        groups,
        _points("worst", agreement.worst(label)),
        title=title or about,
        x_title=f"exact: {exact} ({unit})",
        y_title=f"estimate: {estimate} ({unit})",
        interactive=interactive,
    )


def _points(name: str, rows: Iterable[dict[str, Any]]) -> Points:
    """The points of table rows."""
    rows = list(rows)
    exact, estimate = (np.array([row[side] for row in rows]) for side in ("exact", "estimate"))
    return Points(name, exact, estimate, tuple(map(cell_name, rows)))
