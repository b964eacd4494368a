"""Two runs: activations of the source run are put into the target run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import attrs
from torch import Tensor, nn

from nnpatch_core._arrays import Booleans
from nnpatch_core._models import Elsewhere, module_of, vocab_size
from nnpatch_core.batch import Batch, check_answers, check_paired
from nnpatch_core.errors import ConfidenceError, MetricError
from nnpatch_core.interventions.arguments import PairArguments, pair_arguments
from nnpatch_core.interventions.constants import Recorded, RecordedElsewhere
from nnpatch_core.interventions.firsts import answer_ids, several_of, warn_of_first_tokens
from nnpatch_core.interventions.inputs import one_mask, read_batch, read_spans
from nnpatch_core.interventions.measuring import RunsSeen, check_data, read_by, sweep_context
from nnpatch_core.metrics import Metric, MetricContext, Reading, logit_difference
from nnpatch_core.results import Baseline, Prompts, Scale
from nnpatch_core.seq_pos import Span
from nnpatch_core.sweep import (
    Sweep,
    Values,
    check_finite,
    check_padding,
    label_prompts,
    run_unpatched,
)
from nnpatch_core.tracing import Intervention, Patches, begin, record


def read_two(nnmodel: Any, given: PairArguments) -> tuple[Batch, Batch]:
    """The prompts of two runs, checked and packed.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    source_mask = one_mask("source", given.attention_mask, given.source_attention_mask)
    target_mask = one_mask("target", given.attention_mask, given.target_attention_mask)
    source = read_batch(nnmodel, "source_tokens", given.source_tokens, source_mask)
    target = read_batch(nnmodel, "target_tokens", given.target_tokens, target_mask)
    check_paired(source, target)
    return source, target


def patchable(source: Batch, target: Batch, patches: Patches) -> Tensor:
    """`[batch, seq]`: 1 where a prompt can be patched.

    That is where both prompts have a token; where values come from other positions, each site knows
    those that have one.
    """
    if patches.shifted:
        return target.own.to(source.mask.device)
    return source.own * target.own.to(source.mask.device)


def differs_of(source: Batch, target: Batch) -> Booleans:
    """`[batch, seq]`: where the two runs of a prompt can be told apart, by their tokens so far."""
    other = (source.tokens != target.tokens.to(source.tokens.device)) & source.mask.bool()
    # Of prompts that differ in length every position differs.
    shifted = (source.mask != target.mask.to(source.mask.device)).any(1, keepdim=True)
    differs: Booleans = (other.cumsum(1).bool() | shifted).cpu().numpy()
    return differs


@attrs.frozen(eq=False)
class PairRuns:
    """A source run and a target run, packed; see `Runs`.

    Args:
        source: where activations are taken.
        target: where they are put.
        source_answers: `[batch]`, token ids.
        target_answers: `[batch]`, token ids.
        prompts: the prompts, with their texts.
        spans: parts of the prompts, by name.
        confident: whether the model must prefer each run's own answer.
        part: whether they are a batch of several, whose means are compared together.
        kind: how an outcome calls the sweep.
        put: what is put at the sites; None is the source run's activations.
        shifted: whether it is made of activations of other positions, where it knows by itself
            which prompts have them.
        data: `[batch, ...]` by name, for metrics.
        reading: where the metrics read the logits; None is the last token alone.
        several: what the answers have besides their first tokens; see `several_of`.
    """

    source: Batch
    target: Batch
    source_answers: Tensor
    target_answers: Tensor
    prompts: Prompts
    spans: Mapping[str, Span]
    confident: bool
    data: Mapping[str, Tensor] = attrs.field(factory=dict)
    reading: Reading | None = None
    several: Mapping[str, int] = attrs.field(factory=dict)
    part: bool = False
    kind: str = "activation"
    put: Callable[[Sweep, PairRuns], Values] | None = None
    shifted: bool = False
    scale: Scale = attrs.field(default="restored", init=False)
    ablation: None = attrs.field(default=None, init=False)

    @property
    def batches(self) -> Mapping[str, Batch]:
        """See `Runs.batches`."""
        return {"source": self.source, "target": self.target}

    @property
    def trims(self) -> bool:
        """See `Runs.trims`: senders of edges and paths are recorded whole."""
        return self.put is None

    def aligned(self, patches: Patches) -> Patches:
        """See `Runs.aligned`: each site knows it already."""
        return patches

    def mask_of(self, patches: Patches) -> Tensor:
        """See `Runs.mask_of`."""
        if self.shifted:
            return self.target.own.to(self.source.mask.device)
        return patchable(self.source, self.target, patches)

    @property
    def changed(self) -> Booleans:
        """See `Runs.changed`."""
        return differs_of(self.source, self.target)

    def check(self, sweep: Sweep) -> None:
        """See `Runs.check`."""
        for batch in (self.source, self.target):
            check_padding(sweep.patches, batch)
        warn_of_first_tokens(sweep.metrics, self.several, confident=self.confident)

    def values(self, sweep: Sweep) -> Values:
        """See `Runs.values`."""
        if self.put is not None:
            return self.put(sweep, self)
        mask = self.mask_of(sweep.patches)

        def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
            places, store, own = some.patches.places, some.limits.store, mask[chunk]
            first = some.patches.first_taken if some.trimmed else 0
            source, edges = self.source.rows(chunk), some.limits.edges
            if isinstance(some.nnmodel, Elsewhere):
                return None, RecordedElsewhere(source, own)
            begun = None
            if edges:
                begun = begin(some.nnmodel, source, edges, some.patches.n_layers, store)
            logits, activations = record(some.nnmodel, source, places, store, first, begun)
            if first:
                own = own.clone()
                own[:, : some.patches.first] = 0
            return logits, Recorded(activations, own, first)

        return Values(mask, of, {"mask": mask})

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """See `Runs.context`."""
        assert source_logits is not None
        return sweep_context(self._seen, source_logits, target_logits)

    @property
    def _seen(self) -> RunsSeen:
        answers = self.source_answers, self.target_answers
        return RunsSeen(answers, self.source, self.target, self.data, self.reading)

    def read_by(self, metrics: Mapping[str, Metric], model: nn.Module) -> Self:
        """See `Runs.read_by`."""
        seen = read_by(metrics, self._seen, self.spans, model, last=self.confident)
        one, other = seen.answers
        assert other is not None
        return attrs.evolve(
            self,
            source=seen.source,
            target=seen.target,
            source_answers=one,
            target_answers=other,
            data=seen.data,
            reading=seen.reading,
        )

    def unpatched(self, sweep: Sweep, chunks: Sequence[slice]) -> MetricContext:
        """See `Runs.unpatched`."""
        source, target = (
            run_unpatched(sweep, batch, chunks) for batch in (self.source, self.target)
        )
        return self.context(source, target)

    def check_baseline(self, context: MetricContext, baseline: Mapping[str, Baseline]) -> None:
        """See `Runs.check_baseline`."""
        if self.confident:
            _check_confidence(context, self.prompts)
        check_runs(baseline)
        if not self.part:
            check_denominators(baseline)


def read_pairs(
    nnmodel: Any, given: PairArguments, *, metric_data: Any = None, confident: bool = False
) -> PairRuns:
    """Read the two runs that the user passes, and check them.

    Args:
        nnmodel: the model, wrapped by nnsight.
        given: the arguments; a `PromptPairs` may stand for them.
        metric_data: the argument of that name.
        confident: whether the model must prefer each run's own answer.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """
    given = pair_arguments(given)
    source, target = read_two(nnmodel, given)
    count, vocab = len(source), vocab_size(module_of(nnmodel))
    answers = (
        check_answers("source_answer_index", given.source_answer_index, count, vocab),
        check_answers("target_answer_index", given.target_answer_index, count, vocab),
    )
    data = check_data(
        metric_data,
        count,
        given.known_answers,
        source_answer_tokens=given.source_answer_tokens,
        target_answer_tokens=given.target_answer_tokens,
    )
    told = answer_ids(answers[0], data, "source") | answer_ids(answers[1], data, "target")
    return PairRuns(
        source,
        target,
        *answers,
        label_prompts(nnmodel, source, target, given.tokenizer, given.columns, told),
        read_spans(given.spans, len(source), source.seq_len),
        confident,
        data,
        several=several_of(given.known_answers),
        part=bool(given.part),
    )


def _check_confidence(context: MetricContext, prompts: Prompts) -> None:
    """Raise `ConfidenceError`, with the prompts, unless each run prefers its own answer."""
    logits, at_last = context.seen(None, context.source_logits)
    source = logit_difference(logits, at_last)
    target = logit_difference(at_last.target_logits, at_last)
    check_finite("logit_difference", source.mean().item(), "in the source run")
    check_finite("logit_difference", target.mean().item(), "in the target run")
    rows = (~((source > 0) & (target < 0))).nonzero().flatten().tolist()
    if rows:
        listed = "; ".join(
            f"prompt {row}: {source[row]:+.2f} (must be above 0) in the source run "
            f"{prompts.text(row)[0]}, {target[row]:+.2f} (must be below 0) in the target run "
            f"{prompts.text(row)[1]}"
            for row in rows
        )
        raise ConfidenceError(
            f"the model is not confident on {len(rows)} of {len(source)} prompts, by logit of the "
            f"source answer minus logit of the target answer: {listed}"
        )


def check_runs(baseline: Mapping[str, Baseline]) -> None:
    """Raise `MetricError` where a metric of one of two runs is not finite."""
    for name, runs in baseline.items():
        check_finite(name, runs.source.double().mean().item(), "in the source run")
        check_finite(name, runs.target.double().mean().item(), "in the target run")


def check_denominators(baseline: Mapping[str, Baseline]) -> None:
    """Raise `MetricError` where the two runs are equal in a metric."""
    for name, runs in baseline.items():
        source, target = runs.source.double().mean().item(), runs.target.double().mean().item()
        if source == target:
            raise MetricError(
                f"metric {name!r} is {source:g} in the source run and in the target run: "
                "a value relative to their difference would divide by 0"
            )
