"""Outcomes that no model made: effects of a known shape in as many prompts as wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core import Outcome
from nnpatch_core.results import Baseline, Cells, Prompts, Scale
from nnpatch_core.sites import Axis

#: Of a token that may be anything: markup, formulas, other scripts.
STRANGE = (
    "<s>", "The", " $x$", " capital", " of", " 中国", " is", "日本語", " مرحبا", " 😀",
    " <b>bold</b>", " a&b", "\n", "\t", " Donaudampfschifffahrtsgesellschaft",
)  # fmt: skip
PLAIN = (
    "When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John", " gave", " a",
    " drink", " to",
)  # fmt: skip


def outcome(
    sites: Mapping[str, Sequence[Axis]],
    tokens: Sequence[str] = PLAIN,
    *,
    batch: int = 32,
    scale: Scale = "restored",
    metrics: Sequence[str] = ("logit_difference",),
    differs: int = 3,
    noise: float = 0.25,
    size: float = 1.0,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    only: Sequence[int] | None = None,
    kind: str = "activation",
) -> Outcome:
    """An outcome whose effects go up the layers at `differs`, and then at the last place.

    Args:
        sites: site name to its axes.
        tokens: those of the prompts; at `differs` source and target have two.
        batch: how many prompts.
        scale: of the outcome.
        metrics: the first is the one that is shown; each further is ten times as large.
        differs: the position at which source and target differ.
        noise: of each prompt's effects.
        size: of the effects.
        seed: of the noise.
        layers: those that were swept; None is all.
        only: the positions that were swept; None is all.
        kind: of sweep.
    """
    draw = torch.Generator().manual_seed(seed)
    length = len(tokens)
    target = torch.arange(length).repeat(batch, 1)
    source = target.clone()
    source[:, differs] = length
    mask = torch.ones(batch, length, dtype=torch.int64)
    strings = {**dict(enumerate(tokens)), length: " Paul"}
    source_metric = 3 + torch.rand(batch, generator=draw)
    target_metric = -3 + torch.rand(batch, generator=draw)
    if scale == "change":
        source, source_metric = target, target_metric
    cells: dict[str, Cells] = {}
    raw: dict[str, dict[str, Tensor]] = {metric: {} for metric in metrics}
    for name, axes in sites.items():
        shape = [len(axis.labels) for axis in axes]
        index = torch.cartesian_prod(*[torch.arange(count) for count in shape]).reshape(
            -1, len(shape)
        )
        names = [axis.name for axis in axes]
        kept = torch.ones(len(index), dtype=torch.bool)
        if layers is not None and "layer" in names:
            kept &= torch.isin(index[:, 0], torch.tensor(list(layers)))
        if only is not None and "position" in names:
            kept &= torch.isin(index[:, 1], torch.tensor(list(only)))
        index = index[kept]
        effects = _effects(names, shape, index, differs, draw)
        elided = torch.zeros(len(index), dtype=torch.bool)
        if "position" in names:
            elided = index[:, 1] < differs
        effects = torch.where(elided, 0.0, size * effects)[:, None]
        spread = noise * torch.randn(len(index), batch, generator=draw) * (~elided)[:, None]
        every = torch.ones(len(index), batch, dtype=torch.bool)
        gap = source_metric - target_metric if scale == "restored" else torch.tensor(6.0)
        for number, metric in enumerate(metrics):
            moved = (effects + size * spread) * gap
            raw[metric][name] = (
                target_metric + (10**number) * moved
                if scale == "change"
                else (target_metric + moved / (1 + number / 2))
            )
        cells[name] = Cells(
            axes=tuple(axes),
            index=index,
            present=every,
            elided=elided[:, None].expand(-1, batch).clone(),
            unread=~every,
            exact=torch.ones(len(index), dtype=torch.bool),
        )
    return Outcome(
        kind=kind,
        scale=scale,
        cells=cells,
        raw=raw,
        baselines={metric: Baseline(source_metric, target_metric) for metric in metrics},
        prompts=Prompts(source, mask, target, mask, strings),
        metric=metrics[0],
        info={"model": "somewhere/made-up-135m-instruct", "adapter": "none"},
    )


def _effects(
    names: Sequence[str], shape: Sequence[int], index: Tensor, differs: int, draw: torch.Generator
) -> Tensor:
    """The effect of each cell: a few strong ones, many weak ones."""
    weak = 0.02 * torch.randn(len(index), generator=draw)
    strong = torch.rand(len(index), generator=draw)
    if names[0] == "site":
        return weak + torch.linspace(1.0, -0.4, len(index))
    layer, half = index[:, 0], shape[0] / 2
    if len(names) == 1:
        return weak + torch.sigmoid((layer - half) / 2)
    if "head" in names[-1]:
        strong_head = (strong > 0.97).float() * (strong - 0.97) * 30
        sign = torch.where(index.sum(1) % 3 == 0, -1.0, 1.0)
        return weak + sign * strong_head
    early, late = torch.sigmoid((half - layer) / 1.5), torch.sigmoid((layer - half) / 1.5)
    at = index[:, 1]
    first = min(differs, shape[1] - 1)
    return weak + early * (at == first) + late * (at == shape[1] - 1)


def layer_axis(count: int = 12) -> Axis:
    return Axis("layer", tuple(range(count)))


def position_axis(tokens: Sequence[Any] = PLAIN) -> Axis:
    return Axis("position", tuple(range(len(tokens))))


def head_axis(count: int = 8, name: str = "head") -> Axis:
    return Axis(name, tuple(range(count)))
