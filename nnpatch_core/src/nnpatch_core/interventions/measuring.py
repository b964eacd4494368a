"""The runs as metrics see them: answers, data, tokens, and where their logits are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nnpatch_core._models import most_tokens, vocab_size
from nnpatch_core._printable import shown
from nnpatch_core.batch import Batch, has_numbers, where_of
from nnpatch_core.errors import MetricError, PatchingError, TokensError
from nnpatch_core.metrics import (
    Metric,
    MetricContext,
    Reading,
    RunSeen,
    SpanFinder,
    SweepContext,
    activations_read,
    answers_followed,
    check_metrics,
    reading_of,
)
from nnpatch_core.seq_pos import PromptBatch, Span, Spans
from nnpatch_core.site import Site, check_site
from nnpatch_core.sites import bind_cells
from nnpatch_core.tracing import ReadSite, widths_of

#: `[batch]`, what the source run and the target run call for.
Answers: TypeAlias = tuple[Tensor, "Tensor | None"]


def check_data(
    metric_data: Any, batch: int, known: Mapping[str, Tensor] | None = None, **tokens: Any
) -> dict[str, Tensor]:
    """The argument `metric_data`, on the CPU, with the answers' tokens where they were given.

    Args:
        metric_data: as it was passed.
        batch: the number of prompts.
        known: what a `PromptPairs` brings; what is passed comes before it.
        **tokens: arguments of their own that metrics find in it.

    Raises:
        MetricError: it is no mapping of names to tensors with a row for each prompt.
    """
    metric_data = {} if metric_data is None else metric_data
    if not isinstance(metric_data, Mapping):
        raise MetricError(
            f"metric_data must be a mapping of names to tensors [batch, ...], got "
            f"{shown(metric_data)}"
        )
    given = {name: value for name, value in tokens.items() if value is not None}
    twice = [name for name in given if name in metric_data]
    if twice:
        raise MetricError(f"{twice[0]} is given twice: as an argument, and in metric_data")
    metric_data = {**(known or {}), **metric_data, **given}
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


@attrs.frozen(eq=False)
class RunsSeen:
    """Two runs as metrics read them.

    Args:
        answers: the answers of both.
        source: the source run.
        target: the target run.
        data: for metrics, by name.
        reading: where the metrics read the logits; None is the last token alone.
    """

    answers: Answers
    source: Batch
    target: Batch
    data: Mapping[str, Tensor]
    reading: Reading | None = None


def read_by(
    metrics: Mapping[str, Metric],
    runs: RunsSeen,
    spans: Mapping[str, Span],
    model: nn.Module,
    *,
    last: bool = False,
) -> RunsSeen:
    """Two runs, with the answers that metrics append, and with the positions where they read.

    Args:
        metrics: by name.
        runs: the prompts of both runs, which need not have run yet.
        spans: parts of the prompts, by name.
        model: the Hugging Face model.
        last: whether the logits of the last token are looked at in any case.

    Raises:
        MetricError: a metric cannot measure these prompts, or declares what is no position of them.
        TokensError: with an answer a prompt is longer than the model's table of positions.
    """
    vocab = vocab_size(model)
    check_metrics(metrics, *_contexts(runs, vocab))
    own = None if runs.source is runs.target else runs.source
    names = {name: None for metric in metrics.values() for name in answers_followed(metric)}
    appended = None
    if names:
        appended = _stacked([runs.data[name] for name in names])
        if len(names) > 1:
            runs, own, spans = _repeated(runs, own, spans, len(names))
    found = _finder(PromptBatch(runs.target, own, spans))
    source, target = _contexts(runs, vocab)
    reading = reading_of(
        metrics, source, target, found, last=last, appended=appended, versions=tuple(names)
    )
    if reading is None:
        return runs
    sites, places = _sites(metrics, PromptBatch(runs.target, own, spans), reading, model)
    reading = attrs.evolve(reading, sites=places)
    one, other = runs.source, runs.target
    if appended is not None:
        # The last token predicts nothing that is asked for.
        one, other = (each.followed_by(appended[:, :-1]) for each in (one, other))
        _check_lengths((one, other), model)
    return attrs.evolve(
        runs,
        source=attrs.evolve(one, read=reading.source, sites=sites[0]),
        target=attrs.evolve(other, read=reading.target, sites=sites[1]),
        reading=reading,
    )


def _sites(
    metrics: Mapping[str, Metric], prompts: PromptBatch, reading: Reading, model: nn.Module
) -> tuple[
    tuple[tuple[ReadSite, ...], tuple[ReadSite, ...]],
    dict[str, dict[Any, tuple[int, ...]]],
]:
    """The sites that metrics read, in the source run and in the target run, and their places."""
    known: dict[Site, tuple[int, ...]] = {}
    sources, targets = [], []
    places: dict[str, dict[Any, tuple[int, ...]]] = {}
    first = reading.target.shape[1]
    for name, metric in metrics.items():
        wanted = activations_read(metric)
        for site in wanted if isinstance(wanted, Sequence) else [wanted]:
            if not isinstance(site, Site):
                raise MetricError(
                    f"metric {name!r} declares with reads_activations {shown(site)}: it must be a "
                    "list of Site"
                )
            if site not in known:
                try:
                    check_site(site, model)
                    bound = bind_cells([site], model, prompts.seq_len, prompts).cells[0].sites[0]
                except PatchingError as error:
                    raise MetricError(f"metric {name!r} reads {site.label}: {error}") from error
                at = bound.positions.at.expand(len(prompts), -1)
                came = bound.positions.source
                targets.append(ReadSite(bound.place, bound.head, at, bound.space))
                there = at if came is None else came.expand(len(prompts), -1)
                sources.append(ReadSite(bound.place, bound.head, there, bound.space))
                known[site] = tuple(range(first, first + at.shape[1]))
                first += at.shape[1]
            places.setdefault(name, {})[site] = known[site]
    return (tuple(sources), tuple(targets)), places


def _contexts(runs: RunsSeen, vocab: int | None) -> tuple[MetricContext, MetricContext]:
    """The contexts of both runs, whose logits are nan still: as wide as they will be."""
    nothing = torch.tensor([[torch.nan]], device="cpu").expand(len(runs.target), vocab or 0)
    source, target = (
        MetricContext(
            *runs.answers,
            nothing,
            nothing,
            data=dict(runs.data),
            tokens=batch.tokens.cpu(),
            mask=batch.mask.cpu(),
        )
        for batch in (runs.source, runs.target)
    )
    return source, target


def _stacked(answers: Sequence[Tensor]) -> Tensor:
    """Answers `[batch, any]` after one another, filled on the right."""
    width = max(int((each >= 0).sum(1).max()) for each in answers)
    filled = [pad(each.long(), (0, max(width - each.shape[1], 0)), value=-1) for each in answers]
    return torch.cat([each[:, :width] for each in filled])


def _repeated(
    runs: RunsSeen, own: Batch | None, spans: Mapping[str, Span], times: int
) -> tuple[RunsSeen, Batch | None, Mapping[str, Span]]:
    """The prompts several times after one another, and all that is known of them."""
    index = torch.arange(len(runs.target), device="cpu").repeat(times)
    target = runs.target.repeated(times)
    source = target if own is None else runs.source.repeated(times)
    one, other = runs.answers
    repeated = attrs.evolve(
        runs,
        answers=(one[index], None if other is None else other[index]),
        source=source,
        target=target,
        data={name: value[index] for name, value in runs.data.items()},
    )
    return (
        repeated,
        None if own is None else source,
        {name: span.rows(index) for name, span in spans.items()},
    )


def _check_lengths(batches: Sequence[Batch], model: nn.Module) -> None:
    """Raise `TokensError` where prompt and answer are longer than the model can take."""
    most = most_tokens(model)
    longest = max(int(batch.mask.sum(1).max()) for batch in batches)
    if most is not None and longest > most:
        raise TokensError(
            f"a prompt with its answer has {longest} tokens, and {type(model).__name__} has "
            f"positions for {most}: give shorter prompts or answers"
        )


def _finder(prompts: PromptBatch) -> SpanFinder:
    """Finds the last token of a span in both runs."""

    def find(name: str) -> tuple[Tensor, Tensor]:
        (cell,) = Spans([name]).place(prompts)
        target = torch.tensor(cell.positions, dtype=torch.int64, device="cpu")
        sources = cell.positions if cell.source is None else cell.source
        return torch.tensor(sources, dtype=torch.int64, device="cpu"), target

    return find


def sweep_context(runs: RunsSeen, source_logits: Tensor, target_logits: Tensor) -> SweepContext:
    """The context of all metrics of a sweep, given the logits of its unpatched runs."""
    source, target = (
        RunSeen(batch.prompt.tokens.cpu(), batch.prompt.mask.cpu(), batch.read)
        for batch in (runs.source, runs.target)
    )
    reading = runs.reading
    sites = {} if reading is None else {name: dict(each) for name, each in reading.sites.items()}
    every = {site: places for each in sites.values() for site, places in each.items()}
    return SweepContext(
        *runs.answers,
        source_logits,
        target_logits,
        data=dict(runs.data),
        tokens=target.tokens,
        mask=target.mask,
        positions=target.positions,
        appended=None if reading is None else reading.appended,
        source_run=source,
        columns={} if reading is None else dict(reading.columns),
        last=None if reading is None else reading.last,
        sites=sites,
        widths=widths_of(target_logits, every),
        versions=1 if reading is None else max(len(reading.versions), 1),
    )
