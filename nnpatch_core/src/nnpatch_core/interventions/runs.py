"""The runs that an estimate starts from: a source and a target, or one and what ablates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeAlias

import attrs
from torch import Tensor

from nnpatch_core._arguments import shown
from nnpatch_core._models import module_of, vocab_size
from nnpatch_core.batch import Batch, check_answers
from nnpatch_core.errors import AnswerError, MetricError, PatchingError, UnknownNameError
from nnpatch_core.interventions.inputs import one_mask, read_batch, read_batches
from nnpatch_core.interventions.pairs import PairArguments, Pairs, check_denominators
from nnpatch_core.interventions.values import means, zeros
from nnpatch_core.metrics import MetricContext, kl_divergence, logit_difference
from nnpatch_core.results import Baseline, Scale
from nnpatch_core.sweep.sweep import Sweep, check_finite, check_padding, run_baseline
from nnpatch_core.tracing import Recorded, Replacement, record

ABLATIONS = ("zero", "mean")

#: For some prompts: `[batch, vocab]` of the run where values come from, if any, and the values.
Given: TypeAlias = Callable[[slice], tuple["Tensor | None", Replacement]]


class Runs(Protocol):
    """The runs of an estimate."""

    @property
    def source(self) -> Batch:
        """Where values come from."""
        ...

    @property
    def target(self) -> Batch:
        """Where they are put."""
        ...

    @property
    def scale(self) -> Scale:
        """Of the values."""
        ...

    def check(self, sweep: Sweep, at_target: bool) -> None:
        """Raise for metrics and padding that do not go with the runs.

        Args:
            sweep: what is patched.
            at_target: whether the gradient is taken at the target run alone.
        """
        ...

    def given(self, sweep: Sweep) -> tuple[Tensor, Given]:
        """Where values are put, `[batch, seq]`, and what they are."""
        ...

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """What metrics compare with."""
        ...

    def baseline(self, sweep: Sweep) -> MetricContext:
        """The same, from runs of its own."""
        ...

    def check_baseline(self, baseline: Mapping[str, Baseline]) -> None:
        """Raise where no value can be compared with the unpatched runs."""
        ...


@attrs.frozen(eq=False)
class PairRuns:
    """A source run and a target run."""

    pairs: Pairs
    scale: Scale = attrs.field(default="restored", init=False)

    @property
    def source(self) -> Batch:
        """Where values come from."""
        return self.pairs.source

    @property
    def target(self) -> Batch:
        """Where they are put."""
        return self.pairs.target

    def check(self, sweep: Sweep, at_target: bool) -> None:
        """See `Runs.check`."""
        for batch in (self.source, self.target):
            check_padding(sweep, batch)

    def given(self, sweep: Sweep) -> tuple[Tensor, Given]:
        """See `Runs.given`."""
        mask = self.pairs.mask

        def of_rows(rows: slice) -> tuple[Tensor, Replacement]:
            logits, found = record(
                sweep.nnmodel, self.source.rows(rows), sweep.places, sweep.limits.store
            )
            return logits, Recorded(found, mask[rows])

        return mask, of_rows

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """See `Runs.context`."""
        assert source_logits is not None
        return self.pairs.context(source_logits, target_logits)

    def baseline(self, sweep: Sweep) -> MetricContext:
        """See `Runs.baseline`."""
        return self.context(run_baseline(sweep, self.source), run_baseline(sweep, self.target))

    def check_baseline(self, baseline: Mapping[str, Baseline]) -> None:
        """See `Runs.check_baseline`."""
        check_denominators(baseline)


@attrs.frozen(eq=False)
class AblationRuns:
    """One run, and what takes its activations away.

    Args:
        target: the prompts.
        answers: `[batch]`, token ids.
        others: `[batch]`, those to compare with, for metrics that need them.
        data: the data set of a mean; None is the prompts themselves.
        per_position: whether each position is averaged apart.
        method: `"zero"` or `"mean"`.
    """

    target: Batch
    answers: Tensor
    others: Tensor | None
    data: Iterable[Batch] | None
    per_position: bool
    method: str
    scale: Scale = attrs.field(default="change", init=False)

    @property
    def source(self) -> Batch:
        """Where values come from."""
        return self.target

    def check(self, sweep: Sweep, at_target: bool) -> None:
        """See `Runs.check`."""
        check_padding(sweep, self.target)
        if self.others is None and logit_difference in sweep.metrics.values():
            raise AnswerError(
                "metric 'logit_difference' compares two answers: pass target_answer_index=, "
                "or another metric"
            )
        if at_target and kl_divergence in sweep.metrics.values():
            raise MetricError(
                "metric 'kl_divergence' from the unablated run is 0 there, which is its lowest: "
                "its gradient is 0, so that nothing can be attributed; steps= looks further"
            )

    def given(self, sweep: Sweep) -> tuple[Tensor, Given]:
        """See `Runs.given`."""
        if self.method == "zero":
            values = zeros(self.target)
        else:
            # What is streamed is checked as it comes.
            data = self.data
            checked = None if data is None else (check_padding(sweep, each) for each in data)
            values = means(sweep, self.target, checked, self.per_position)
        return values.mask, lambda rows: (None, values.of_rows(rows))

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """See `Runs.context`."""
        return MetricContext(self.answers, self.others, target_logits, target_logits)

    def baseline(self, sweep: Sweep) -> MetricContext:
        """See `Runs.baseline`."""
        return self.context(None, run_baseline(sweep, self.target))

    def check_baseline(self, baseline: Mapping[str, Baseline]) -> None:
        """See `Runs.check_baseline`."""
        for name, run in baseline.items():
            check_finite(name, run.target.mean().item(), "in the unablated run")


def read_ablation(
    nnmodel: Any,
    method: Any,
    given: PairArguments,
    reference: Any,
    per_position: bool,
) -> AblationRuns:
    """What the user passes as a run that is ablated, checked.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    if not isinstance(method, str) or method not in ABLATIONS:
        raise UnknownNameError(
            f"unknown ablation {shown(method)}; there are {', '.join(ABLATIONS)}"
        )
    if given.source_tokens is not None or given.source_attention_mask is not None:
        raise PatchingError(
            f"ablation={method!r} needs no source run: pass source_tokens=None, and no "
            "source_attention_mask="
        )
    if method == "zero" and (reference is not None or per_position):
        raise PatchingError("reference= and per_position= mean nothing with ablation='zero'")
    mask = one_mask("target", given.attention_mask, given.target_attention_mask)
    target = read_batch(nnmodel, "target_tokens", given.target_tokens, mask)
    vocab, count = vocab_size(module_of(nnmodel)), len(target)
    others = given.target_answer_index
    if others is not None:
        others = check_answers("target_answer_index", others, count, vocab)
    return AblationRuns(
        target,
        check_answers("source_answer_index", given.source_answer_index, count, vocab),
        others,
        None if reference is None else read_batches(nnmodel, "reference", reference),
        per_position,
        method,
    )
