"""Groups of prompts: the same sweep, seen in some of its prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import listed
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.prompts import grouped
from nnpatch_core.results.parts import Baseline, Cells, Prompts

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def split(outcome: Outcome, column: Any) -> dict[Any, Outcome]:
    """The outcome of each group of prompts; see `Outcome.by_group`."""
    batch = len(outcome.prompts.target_tokens)
    columns, name = outcome.prompts.columns, column
    if not isinstance(column, str):
        values = None if isinstance(column, bytes) else listed(column)
        if values is None or len(values) != batch:
            got = shown(column) if values is None else str(len(values))
            raise OutcomeError(
                f"by_group takes the name of a column, or one value for each of {batch} prompts, "
                f"got {got}"
            )
        name, columns = "the values", {"the values": values}
    elif not columns:
        raise OutcomeError(
            f"no column {shown(column)}: the outcome has none, as its prompts were passed as "
            "tensors. Pass the values, as out.by_group(pairs.columns[...]), or sweep a PromptPairs"
        )
    groups = grouped(columns, name)
    return {value: _only(outcome, numbers, value) for value, numbers in groups.items()}


def _only(outcome: Outcome, numbers: Sequence[int], value: Any) -> Outcome:
    rows = torch.tensor(numbers, device="cpu")
    baselines = {
        name: Baseline(each.source[rows], each.target[rows])
        for name, each in outcome.baselines.items()
    }
    own = baselines[outcome.metric]
    source, target = own.source.double().mean().item(), own.target.double().mean().item()
    if outcome.scale == "restored" and source == target:
        raise OutcomeError(
            f"metric {outcome.metric!r} is {source:g} in the source and the target run of group "
            f"{shown(value)}, so that it has no values: leave its prompts out"
        )
    return attrs.evolve(
        outcome,
        cells={name: _cells(each, rows) for name, each in outcome.cells.items()},
        raw={
            metric: {name: each[:, rows] for name, each in by_name.items()}
            for metric, by_name in outcome.raw.items()
        },
        baselines=baselines,
        prompts=_prompts(outcome.prompts, rows),
        # Its bound is on the mean over all prompts.
        screening=None,
    )


def _cells(cells: Cells, rows: Tensor) -> Cells:
    masks = {name: getattr(cells, name)[:, rows] for name in ("present", "elided", "unread")}
    known = (masks["elided"] | masks["unread"]).all(1)
    return attrs.evolve(cells, **masks, exact=cells.exact | known)


def _prompts(prompts: Prompts, rows: Tensor) -> Prompts:
    return attrs.evolve(
        prompts,
        source_tokens=prompts.source_tokens[rows],
        source_mask=prompts.source_mask[rows],
        target_tokens=prompts.target_tokens[rows],
        target_mask=prompts.target_mask[rows],
        columns=_some(prompts.columns, rows),
        answers=_some(prompts.answers, rows),
    )


def _some(columns: Mapping[str, tuple[Any, ...]], rows: Tensor) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(values[row] for row in rows.tolist()) for name, values in columns.items()}
