"""The runs as metrics see them: answers, data, tokens, and where their logits are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch, has_numbers, where_of
from nnpatch_core.errors import MetricError
from nnpatch_core.metrics import (
    Metric,
    MetricContext,
    Reading,
    RunSeen,
    SpanFinder,
    SweepContext,
    check_metrics,
    reading_of,
)
from nnpatch_core.seq_pos import PromptBatch, Span, Spans

#: `[batch]`, what the source run and the target run call for.
Answers: TypeAlias = tuple[Tensor, "Tensor | None"]


def check_data(metric_data: Any, batch: int) -> dict[str, Tensor]:
    """The argument `metric_data`, on the CPU.

    Raises:
        MetricError: it is no mapping of names to tensors with a row for each prompt.
    """
    if metric_data is None:
        return {}
    if not isinstance(metric_data, Mapping):
        raise MetricError(
            f"metric_data must be a mapping of names to tensors [batch, ...], got "
            f"{shown(metric_data)}"
        )
    found = {}
    for name, value in metric_data.items():
        if not isinstance(name, str):
            raise MetricError(f"the names in metric_data must be strings, got {shown(name)}")
        if not isinstance(value, Tensor):
            raise MetricError(
                f"metric_data[{name!r}] must be a torch tensor [batch, ...], got "
                f"{type(value).__name__}"
            )
        if not has_numbers(value):
            raise MetricError(
                f"metric_data[{name!r}] has no numbers that can be read: it is on {where_of(value)}"
            )
        if not value.ndim or len(value) != batch:
            raise MetricError(
                f"metric_data[{name!r}] must have a row for each of {batch} prompts, and its shape "
                f"is {list(value.shape)}"
            )
        # A copy: what a metric does to it must not reach the caller.
        found[name] = value.detach().to("cpu", copy=True)
    return found


def reading_for(
    metrics: Mapping[str, Metric],
    answers: Answers,
    batches: tuple[Batch, Batch],
    data: Mapping[str, Tensor],
    vocab: int | None,
    spans: Mapping[str, Span],
    *,
    last: bool = False,
) -> Reading | None:
    """Where metrics read the logits of two runs, which need not have run yet.

    Args:
        metrics: by name.
        answers: of both runs.
        batches: the source run and the target run.
        data: for metrics, by name.
        vocab: how many ids the vocabulary has, if the model says.
        spans: parts of the prompts, by name.
        last: whether those of the last token are looked at in any case.

    Raises:
        MetricError: a metric cannot measure these prompts, or declares what is no position of them.
    """
    # As wide as they will be, and without memory of their own.
    nothing = torch.tensor([[torch.nan]], device="cpu").expand(len(answers[0]), vocab or 0)
    source, target = (
        MetricContext(
            *answers,
            nothing,
            nothing,
            data=dict(data),
            tokens=batch.tokens.cpu(),
            mask=batch.mask.cpu(),
        )
        for batch in batches
    )
    check_metrics(metrics, source, target)
    own = None if batches[0] is batches[1] else batches[0]
    found = _finder(PromptBatch(batches[1], own, spans))
    return reading_of(metrics, source, target, found, last=last)


def _finder(prompts: PromptBatch) -> SpanFinder:
    """Finds the last token of a span in both runs."""

    def find(name: str) -> tuple[Tensor, Tensor]:
        (cell,) = Spans([name]).place(prompts)
        target = torch.tensor(cell.positions, dtype=torch.int64, device="cpu")
        sources = cell.positions if cell.source is None else cell.source
        return torch.tensor(sources, dtype=torch.int64, device="cpu"), target

    return find


def sweep_context(
    answers: Answers,
    logits: tuple[Tensor, Tensor],
    batches: tuple[Batch, Batch],
    data: Mapping[str, Tensor],
    reading: Reading | None,
) -> SweepContext:
    """The context of all metrics of a sweep.

    Args:
        answers: of the source run and the target run.
        logits: of both.
        batches: both.
        data: for metrics, by name.
        reading: where the metrics read the logits.
    """
    source, target = (
        RunSeen(batch.tokens.cpu(), batch.mask.cpu(), batch.read) for batch in batches
    )
    return SweepContext(
        *answers,
        *logits,
        data=dict(data),
        tokens=target.tokens,
        mask=target.mask,
        positions=target.positions,
        source_run=source,
        columns={} if reading is None else dict(reading.columns),
        last=None if reading is None else reading.last,
    )
