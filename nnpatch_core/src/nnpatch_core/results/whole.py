"""The checks of an outcome as a whole: its parts can be, and fit each other.

Each part is of its format already; see `formats`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.parts import Baseline, Cells, Prompts, Scale, check_size

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome


def check_whole(outcome: Outcome) -> None:
    """Raise `OutcomeError` for an outcome that no sweep gives."""
    if outcome.metric not in outcome.raw:
        raise OutcomeError(f"its metric {shown(outcome.metric)} was not measured")
    _check_prompts(outcome.prompts)
    for name, baseline in outcome.baselines.items():
        _check_baseline(name, baseline, outcome.scale)
    for name, cells in outcome.cells.items():
        _check_cells(name, cells, outcome.prompts.target_tokens.shape[1])
    screening = outcome.screening
    if screening is not None and screening.checked > screening.rest:
        raise OutcomeError(f"its screening is {shown(screening)}")


def _check_prompts(prompts: Prompts) -> None:
    if 0 in prompts.target_tokens.shape:
        raise OutcomeError(f"its prompts have the shape {list(prompts.target_tokens.shape)}")
    unknown = sorted(set(prompts.answers) - {"source", "target"})
    if unknown:
        raise OutcomeError(f"its answers are of {shown(unknown[0])}")
    for name, values in (*prompts.columns.items(), *prompts.answers.items()):
        if len(values) != len(prompts.target_tokens):
            raise OutcomeError(
                f"its column {shown(name)} has {len(values)} values, of "
                f"{len(prompts.target_tokens)} prompts"
            )
    spelled = set(prompts.strings)
    for run, tokens, mask in (
        ("source", prompts.source_tokens, prompts.source_mask),
        ("target", prompts.target_tokens, prompts.target_mask),
    ):
        if int(tokens.min()) < 0:
            raise OutcomeError(f"its {run} tokens hold the id {int(tokens.min())}")
        packed = bool((mask[:, 1:] >= mask[:, :-1]).all()) and bool((mask[:, -1] == 1).all())
        if not packed or bool(((mask != 0) & (mask != 1)).any()):
            raise OutcomeError(f"its {run} mask is no mask of left-padded prompts")
        if spelled and not spelled.issuperset(tokens[mask.bool()].tolist()):
            raise OutcomeError("some of its tokens have no text")


def _check_baseline(name: str, baseline: Baseline, scale: Scale) -> None:
    runs = {"source": baseline.source, "target": baseline.target}
    means = {run: value.double().mean().item() for run, value in runs.items()}
    for run, mean in means.items():
        if not math.isfinite(mean):
            raise OutcomeError(f"the metric {shown(name)} is {mean} on average in its {run} run")
    if scale == "restored" and means["source"] == means["target"]:
        raise OutcomeError(f"the metric {shown(name)} is {means['source']:g} in both of its runs")


def _check_cells(name: str, cells: Cells, seq_len: int) -> None:
    shape, index = list(cells.shape), cells.index
    if any(axis.name == "position" and len(axis.labels) != seq_len for axis in cells.axes):
        raise OutcomeError(f"its prompts have {seq_len} tokens, and its axes {shape} places")
    if index.shape[1] != len(shape):
        raise OutcomeError(f"the places of {shown(name)} are {list(index.shape)}, of {shape}")
    if len(index):
        outside = (index < 0) | (index >= torch.tensor(shape, device="cpu"))
        if bool(outside.any()):
            raise OutcomeError(f"{shown(name)} has places outside of {shape}")
        if len(torch.unique(index, dim=0)) < len(index):
            raise OutcomeError(f"{shown(name)} has a place twice")
    check_size(tuple(shape), len(index))
