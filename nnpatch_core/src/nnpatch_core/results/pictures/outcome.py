"""The picture of an outcome: a heatmap for each site name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nnpatch_core._arguments import check_flags
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.crop import Lines, cropped
from nnpatch_core.results.pictures.heatmap import Sheet, draw
from nnpatch_core.results.pictures.layout import lay_out
from nnpatch_core.results.pictures.panels import panel
from nnpatch_core.results.selection import find_names
from nnpatch_core.results.statistics import cell_values
from nnpatch_core.results.words import legend, model_name

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

_NOT_SWEPT = "nothing was swept there"


def draw_outcome(
    outcome: Outcome, *, sites: Any, interactive: Any, title: Any, limit: Any, crop: Any
) -> Any:
    """Draw heatmaps with one scale of colours; see `Outcome.plot`.

    Raises:
        OutcomeError: see `Outcome.plot`.
    """
    check_flags(interactive=interactive)
    if title is not None and not isinstance(title, str):
        raise OutcomeError(f"title must be a text, got {shown(title)}")
    if not isinstance(crop, bool | None):
        raise OutcomeError(f"crop must be True, False or None, got {shown(crop)}")
    _check_limit(limit)
    names = find_names(outcome.cells, sites)
    if not names:
        raise OutcomeError("sites is empty: there is nothing to draw")
    width = outcome.prompts.target_tokens.shape[1]
    tokens = tuple(outcome.prompts.label(position, strip=True) for position in range(width))
    panels = [
        panel(
            name,
            outcome.axes(name),
            outcome.cells[name].place(cell_values(outcome, name), float("nan")),
            tokens,
        )
        for name in names
    ]
    values = np.concatenate([each.values.ravel() for each in panels])
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    most = _most(outcome, limit, largest)
    of_colours = legend(outcome.scale, outcome.magnitude)
    if largest < most:
        of_colours += f"; the largest is {largest:.3g}"
    layers, positions = _layers(outcome, names), _positions(outcome, names, tokens)
    kept, note = cropped(panels, layers, positions, crop)
    about = f"{model_name(outcome.info['model'])}: {outcome.kind}, {outcome.metric}"
    own = title is not None
    sheet = Sheet(kept, lay_out(kept), title or about, own, note, of_colours, most)
    return draw(sheet, interactive=interactive)


def _check_limit(limit: Any) -> None:
    if limit is None or (isinstance(limit, str) and limit == "largest"):
        return
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not is_number or not 0 < limit <= sys.float_info.max:
        raise OutcomeError(f"limit must be a positive number or 'largest', got {shown(limit)}")


def _most(outcome: Outcome, limit: float | str | None, largest: float) -> float:
    """The value of the darkest colours."""
    if isinstance(limit, int | float):
        return float(limit)
    return (largest or 1.0) if limit else max(largest, _floor(outcome))


def _floor(outcome: Outcome) -> float:
    """The least value of the darkest colours, unless the user has set it."""
    if outcome.scale == "restored":
        return 1.0
    size = outcome.baseline.target.double().abs().mean().item()
    return size if 0 < size < float("inf") else 1.0


def _layers(outcome: Outcome, names: Sequence[str]) -> Lines:
    """The model's layers, idle where none of the sites was swept; none without such an axis."""
    labels: tuple[str, ...] = ()
    swept: set[int] = set()
    for name in names:
        first = outcome.axes(name)[0]
        if first.name == "layer":
            labels = tuple(map(str, first.labels))
            swept.update(outcome.cells[name].index[:, 0].tolist())
    idle = ("" if number in swept else _NOT_SWEPT for number in range(len(labels)))
    return Lines(labels, tuple(idle))


def _positions(outcome: Outcome, names: Sequence[str], tokens: tuple[str, ...]) -> Lines:
    """The positions of the prompts, idle where none of the sites was run."""
    count = len(tokens)
    swept, run, changed = torch.zeros(3, count, dtype=torch.bool, device="cpu")
    for name in names:
        axes = [axis.name for axis in outcome.axes(name)]
        if "position" in axes:
            others = [number for number, axis in enumerate(axes) if axis != "position"]
            swept |= outcome.swept(name).sum(others).bool()
            cells = outcome.cells[name]
            known = cells.place(cells.known.all(-1), False)
            run |= (outcome.swept(name) & ~known).sum(others).bool()
            changed |= (outcome.swept(name) & ~outcome.elided(name)).sum(others).bool()
    same = outcome.prompts.same()
    words = []
    for position in range(count):
        if run[position]:
            words.append("")
        elif not swept[position]:
            words.append(_NOT_SWEPT)
        elif outcome.scale == "restored" and same[position]:
            words.append("source and target are the same there")
        elif changed[position]:
            words.append("nothing reads what is there")
        else:
            words.append("nothing changes there")
    return Lines(tokens, tuple(words))
