"""All that a metric may look at besides its logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import attrs
import torch
from torch import Tensor

from nnpatch_core.errors import AnswerError

_Context = TypeVar("_Context", bound="MetricContext")


@attrs.frozen(eq=False)
class MetricContext:
    """All that a metric may look at besides its logits.

    Args:
        source_answer_index: `[batch]`, the token that the source prompt calls for.
        target_answer_index: `[batch]`, the token that the target prompt calls for, or None.
        source_logits: `[batch, vocab]` of the source run; of the unablated run in an ablation. Of
            a metric that declares positions `[batch, positions, vocab]`, as its logits.
        target_logits: the same of the target run; of the unablated run in an ablation.
        data: the call's `metric_data`, `[batch, ...]` by name, and that of a `PromptPairs`.
        tokens: `[batch, seq]`, the left-padded tokens of the run whose logits are given: those of
            the source run where that is measured, else those of the target run.
        mask: `[batch, seq]`, 1 for a token of that run, and 0 for padding.
        positions: `[batch, positions]`, counted from 0, where the logits of a metric that declares
            positions stand in these tokens; None of any other.
        appended: `[batch, n]`, the tokens of the answer that is appended to the prompt, for a
            metric that appends one; -1 fills. None for any other.
        activations: for each site that the metric declares `[batch, positions, width]` of the run.
    """

    source_answer_index: Tensor
    target_answer_index: Tensor | None
    source_logits: Tensor
    target_logits: Tensor
    data: Mapping[str, Tensor] = attrs.field(factory=dict, kw_only=True)
    tokens: Tensor | None = attrs.field(default=None, kw_only=True)
    mask: Tensor | None = attrs.field(default=None, kw_only=True)
    positions: Tensor | None = attrs.field(default=None, kw_only=True)
    appended: Tensor | None = attrs.field(default=None, kw_only=True)
    activations: Mapping[Any, Tensor] = attrs.field(factory=dict, kw_only=True)

    def __len__(self) -> int:
        return len(self.source_answer_index)

    def rows(self: _Context, index: Tensor) -> _Context:
        """The context of some prompts, in any order, a prompt perhaps several times."""

        def chosen(several: Sequence[Tensor]) -> Tensor:
            values = several[0]
            # A view where there is one prompt: its logits need not be copied for each row.
            if len(values) == 1:
                return values.expand(len(index), *values.shape[1:])
            return values[index]

        rows: _Context = _with_each([self], chosen)
        return rows

    def other_answer(self, metric: str) -> Tensor:
        """`target_answer_index`, or `AnswerError` naming the metric that needs it."""
        if self.target_answer_index is None:
            raise AnswerError(f"metric {metric!r} compares two answers, but only one was given")
        return self.target_answer_index

    @property
    def of_source_run(self: _Context) -> _Context:
        """The context of the source run's own logits."""
        return self

    @property
    def once(self: _Context) -> _Context:
        """The context in which each prompt stands once; see `SweepContext.versions`."""
        return self

    def seen(self, metric: str | None, logits: Tensor) -> tuple[Tensor, MetricContext]:
        """The logits as a metric is given them, and its context.

        Args:
            metric: its name; None is one that reads the last token.
            logits: those of all metrics of the sweep.
        """
        return logits, self

    @property
    def padding(self) -> Tensor:
        """`[batch, positions]`, bool: where logits are read of what is no token of the run."""
        assert self.positions is not None
        assert self.mask is not None
        seq_len = self.mask.shape[1]
        # Behind the prompt stands an answer, which has no padding.
        padding = self.mask.gather(1, self.positions.clamp(max=seq_len - 1)) == 0
        return padding & (self.positions < seq_len)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a metric is given in it."""
        own = (
            self.source_answer_index,
            self.target_answer_index,
            self.source_logits,
            self.target_logits,
            self.tokens,
            self.mask,
            self.positions,
            self.appended,
        )
        named = (*self.data.values(), *self.activations.values())
        return [each for each in (*own, *named) if each is not None]


@attrs.frozen(eq=False)
class RunSeen:
    """The tokens of a run, and where its logits are read.

    Args:
        tokens: `[batch, seq]`.
        mask: `[batch, seq]`, 1 for a token.
        positions: `[batch, places]`, where the logits stand; None is the last token alone.
    """

    tokens: Tensor
    mask: Tensor
    positions: Tensor | None


@attrs.frozen(eq=False)
class SweepContext(MetricContext):
    """The context of all metrics of a sweep, whose logits are read at all of their positions.

    Without positions, all are given the logits `[batch, vocab]`; else these are
    `[batch, places, vocab]`, of which each metric is given its own.

    Args:
        source_run: the tokens of the source run, and where its logits stand.
        columns: by metric, which of the places it reads; one without reads the last token.
        last: the place of the last token.
        versions: how many times the prompts stand in it after one another, each time with another
            answer appended.
        sites: by metric, which of the places behind the logits have the activation of a site.
        widths: how many numbers a site's activation has at each place.
    """

    source_run: RunSeen = attrs.field(kw_only=True)
    columns: Mapping[str, tuple[int, ...]] = attrs.field(factory=dict, kw_only=True)
    last: int | None = attrs.field(default=None, kw_only=True)
    versions: int = attrs.field(default=1, kw_only=True)
    sites: Mapping[str, Mapping[Any, tuple[int, ...]]] = attrs.field(factory=dict, kw_only=True)
    widths: Mapping[Any, int] = attrs.field(factory=dict, kw_only=True)

    @property
    def of_source_run(self) -> SweepContext:
        """The context of the source run's own logits."""
        run = self.source_run
        return attrs.evolve(self, tokens=run.tokens, mask=run.mask, positions=run.positions)

    @property
    def once(self) -> SweepContext:
        """The context in which each prompt stands once."""
        if self.versions == 1:
            return self
        first = torch.arange(len(self) // self.versions, device="cpu")
        return attrs.evolve(self.rows(first), versions=1)

    def seen(self, metric: str | None, logits: Tensor) -> tuple[Tensor, MetricContext]:
        """See `MetricContext.seen`."""
        if self.positions is None:
            return logits, self
        columns = None if metric is None else self.columns.get(metric)
        if columns == tuple(range(logits.shape[1])):
            return logits, self
        index: Any = self.last if columns is None else list(columns)
        sites = {} if metric is None else self.sites.get(metric, {})
        context = attrs.evolve(
            self,
            activations={
                site: logits[:, list(places), : self.widths[site]] for site, places in sites.items()
            },
            source_logits=self.source_logits[:, index],
            target_logits=self.target_logits[:, index],
            positions=None if columns is None else self.positions[:, index],
        )
        return logits[:, index], context


def stacked(contexts: Sequence[_Context]) -> _Context:
    """The contexts of some prompts after one another."""
    together: _Context = _with_each(contexts, lambda tensors: torch.cat([*tensors]))
    return together


def _with_each(contexts: Sequence[Any], function: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    """A context of what a function gives for each tensor of one or several."""
    first = contexts[0]
    if isinstance(first, Tensor):
        return function(contexts)
    if first is None or isinstance(first, int | tuple):
        return first
    if isinstance(first, dict):
        return {key: _with_each([each[key] for each in contexts], function) for key in first}
    names = [field.name for field in attrs.fields(type(first))]
    return attrs.evolve(
        first,
        **{
            name: _with_each([getattr(each, name) for each in contexts], function) for name in names
        },
    )
