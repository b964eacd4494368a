"""One run, whose activations are taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._arguments import check_flags
from nnpatch_core._arrays import Booleans
from nnpatch_core._integers import strict_seed
from nnpatch_core._models import module_of, vocab_size
from nnpatch_core._printable import shown
from nnpatch_core.adapters import Location
from nnpatch_core.batch import Batch, check_answers
from nnpatch_core.errors import AnswerError, PatchingError, PositionError, UnknownNameError
from nnpatch_core.interventions.arguments import RunArguments
from nnpatch_core.interventions.firsts import answer_ids, several_of, warn_of_first_tokens
from nnpatch_core.interventions.inputs import Remembered, read_batch, read_batches, read_spans
from nnpatch_core.interventions.measuring import RunsSeen, check_data, read_by, sweep_context
from nnpatch_core.interventions.values import (
    draw,
    means,
    numbered,
    of_partners,
    own_means,
    resampled,
    widened,
    zeros,
)
from nnpatch_core.metrics import Metric, MetricContext, Reading, is_comparing
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
from nnpatch_core.tracing import Patches


@attrs.frozen(eq=False)
class Ablation:
    """How a run is ablated, as the user's arguments say.

    Args:
        method: `"zero"`, `"mean"` or `"resample"`.
        reference: the data set; None is the prompts themselves.
        per_position: whether a mean is taken at each position apart.
        seed: of the prompts that are drawn; None is 0.
    """

    method: str
    reference: Any = None
    per_position: bool = False
    seed: Any = None

    @property
    def drawn(self) -> int | None:
        """The seed of what is drawn; None where nothing is."""
        return strict_seed(self.seed) if METHODS[self.method].drawn else None


def check_ablation(argument: str, ablation: Ablation, *, estimated: bool = False) -> Ablation:
    """The ablation itself, if its parts go together.

    Args:
        argument: the name of the argument that names the method.
        ablation: as the user asks for it.
        estimated: whether it is to be estimated.

    Raises:
        UnknownNameError: there is no such method.
        PatchingError: something is given that means nothing with it, or is malformed.
    """
    name = ablation.method
    check_flags(per_position=ablation.per_position)
    allowed = [each for each, method in METHODS.items() if method.estimated or not estimated]
    if not isinstance(name, str) or name not in allowed:
        raise UnknownNameError(f"unknown {argument} {shown(name)}; there are {', '.join(allowed)}")
    method = METHODS[name]
    if ablation.reference is not None and not method.reference:
        raise PatchingError(f"reference= means nothing with {argument}={name!r}")
    if ablation.per_position and not method.per_position:
        raise PatchingError(f"per_position=True means nothing with {argument}={name!r}")
    if ablation.seed is not None and not method.drawn:
        raise PatchingError(f"seed={shown(ablation.seed)} means nothing with {argument}={name!r}")
    strict_seed(ablation.seed)
    return ablation


@attrs.frozen(eq=False)
class AblationRuns:
    """One run, and the values that take its activations away; see `Runs`.

    Args:
        target: the prompts.
        answers: `[batch]`, token ids.
        others: `[batch]`, those to compare with, for metrics that need them.
        other_name: the argument that gives these.
        prompts: the prompts, with their texts.
        spans: parts of the prompts, by name.
        ablation: the method.
        reference: the data set of a mean; None is the prompts themselves.
        per_position: whether each position is averaged apart.
        remembered: of the reference, where several sweeps share it: its means, once they are known.
        donors: for each prompt the one whose activations it gets, if it is resampled.
        partners: `[batch]`, which of the prompts that is, where it is one of them.
        data: `[batch, ...]` by name, for metrics.
        reading: where the metrics read the logits; None is the last token alone.
        several: what the answers have besides their first tokens; see `several_of`.
    """

    target: Batch
    answers: Tensor
    others: Tensor | None
    other_name: str
    prompts: Prompts
    spans: Mapping[str, Span]
    ablation: str
    reference: Iterable[Batch] | None
    per_position: bool
    remembered: dict[Location, Tensor] | None
    donors: Batch | None
    partners: Tensor | None
    data: Mapping[str, Tensor] = attrs.field(factory=dict)
    reading: Reading | None = None
    several: Mapping[str, int] = attrs.field(factory=dict)
    scale: Scale = attrs.field(default="change", init=False)

    @property
    def source(self) -> Batch:
        """See `Runs.source`."""
        return self.target if self.donors is None else self.donors

    @property
    def kind(self) -> str:
        """See `Runs.kind`."""
        return f"ablation ({self.ablation})"

    @property
    def batches(self) -> Mapping[str, Batch]:
        """See `Runs.batches`."""
        return {"target": self.target}

    @property
    def trims(self) -> bool:
        """See `Runs.trims`: other prompts are recorded whole, as they end elsewhere."""
        return METHODS[self.ablation].alone

    def aligned(self, patches: Patches) -> Patches:
        """See `Runs.aligned`."""
        method = METHODS[self.ablation]
        if method.aligned is None or not patches.named_by_prompt:
            return patches
        return method.aligned(self, patches)

    def mask_of(self, patches: Patches) -> Tensor:
        """See `Runs.mask_of`."""
        return self.target.own

    @property
    def changed(self) -> Booleans:
        """See `Runs.changed`."""
        differs: Booleans = self.target.own.bool().cpu().numpy()
        return differs

    def check(self, sweep: Sweep) -> None:
        """See `Runs.check`."""
        for name, metric in sweep.metrics.items():
            if self.others is None and is_comparing(metric):
                own = getattr(metric, "__name__", name)
                told = f"{name!r} ({own!r})" if own.isidentifier() and own != name else repr(name)
                raise AnswerError(
                    f"metric {told} compares two answers: pass {self.other_name}=, "
                    "or another metric"
                )
        check_padding(sweep.patches, self.target)
        # Data in memory is checked now, streamed data as it comes.
        for batch in self.reference if isinstance(self.reference, list) else ():
            check_padding(sweep.patches, batch)
        warn_of_first_tokens(sweep.metrics, self.several)

    def values(self, sweep: Sweep) -> Values:
        """See `Runs.values`."""
        # Of the prompts alone: an answer that is appended is no part of a mean, and stays.
        prompts = attrs.evolve(self, target=self.target.prompt)
        return widened(METHODS[self.ablation].values(prompts, sweep), self.target.appended)

    def context(self, source_logits: Tensor | None, target_logits: Tensor) -> MetricContext:
        """See `Runs.context`."""
        return sweep_context(self._seen, target_logits, target_logits)

    @property
    def _seen(self) -> RunsSeen:
        answers = self.answers, self.others
        return RunsSeen(answers, self.target, self.target, self.data, self.reading)

    def read_by(self, metrics: Mapping[str, Metric], model: nn.Module) -> Self:
        """See `Runs.read_by`."""
        seen = read_by(metrics, self._seen, self.spans, model)
        times, donors = len(seen.target) // len(self.target), self.donors
        return attrs.evolve(
            self,
            target=seen.target,
            answers=seen.answers[0],
            others=seen.answers[1],
            donors=None if donors is None else donors.repeated(times),
            partners=None if self.partners is None else _again(self.partners, times),
            data=seen.data,
            reading=seen.reading,
        )

    def unpatched(self, sweep: Sweep, chunks: Sequence[slice]) -> MetricContext:
        """See `Runs.unpatched`."""
        return self.context(None, run_unpatched(sweep, self.target, chunks))

    def check_baseline(self, context: MetricContext, baseline: Mapping[str, Baseline]) -> None:
        """See `Runs.check_baseline`."""
        for name, run in baseline.items():
            check_finite(name, run.target.mean().item(), "in the unablated run")


_UNKNOWN = (
    "{} with reference= takes from prompts whose positions nobody has named, and the sites have "
    "positions of each prompt: leave reference= out, and values come from the prompts themselves"
)


def _again(partners: Tensor, times: int) -> Tensor:
    """The same of prompts that stand there several times: each in its own time."""
    return torch.cat([partners + time * len(partners) for time in range(times)])


def _zeros(runs: AblationRuns, _: Sweep) -> Values:
    return zeros(runs.target)


def _at_own_mean(runs: AblationRuns, patches: Patches) -> Patches:
    """Each position of a cell has a mean of its own, over the prompts."""
    if not runs.per_position:
        return patches
    if runs.reference is not None:
        raise PositionError(_UNKNOWN.format("per_position=True"))
    return numbered(patches, runs.target)


def _at_donors(runs: AblationRuns, patches: Patches) -> Patches:
    """Each prompt takes from its donor what that has at its own positions."""
    if runs.partners is None or runs.donors is None:
        raise PositionError(_UNKNOWN.format("method='resample'"))
    return of_partners(patches, runs.target, runs.partners)


def _means(runs: AblationRuns, sweep: Sweep) -> Values:
    # Each position takes the mean of its number.
    if sweep.patches.shifted:
        return own_means(sweep, runs.target)
    data, patches = runs.reference, sweep.patches
    checked = None if data is None else (check_padding(patches, batch) for batch in data)
    return means(sweep, runs.target, checked, runs.per_position, runs.remembered)


def _resampled(runs: AblationRuns, sweep: Sweep) -> Values:
    assert runs.donors is not None
    return resampled(runs.target, runs.donors, elsewhere=sweep.patches.shifted)


@attrs.frozen
class Method:
    """A method of ablation.

    Args:
        values: the values that it puts at the sites of a sweep.
        reference: whether it takes a data set.
        per_position: whether it can take each position apart.
        drawn: whether it draws prompts of the data set at random.
        estimated: whether `attribution_patching` has it.
        alone: whether its values need no run of any prompts.
        aligned: where values come from, of sites with positions of each prompt; None is the same
            positions.
    """

    values: Callable[[AblationRuns, Sweep], Values]
    reference: bool = False
    per_position: bool = False
    drawn: bool = False
    estimated: bool = True
    alone: bool = False
    aligned: Callable[[AblationRuns, Patches], Patches] | None = None


METHODS: Mapping[str, Method] = {
    "zero": Method(_zeros, alone=True),
    "mean": Method(_means, reference=True, per_position=True, aligned=_at_own_mean),
    "resample": Method(_resampled, reference=True, drawn=True, estimated=False, aligned=_at_donors),
}


def read_ablation(
    nnmodel: Any,
    given: RunArguments,
    ablation: Ablation,
    names: Mapping[str, str] | None = None,
    *,
    metric_data: Any = None,
) -> AblationRuns:
    """Read the run that the user ablates, and check it.

    Args:
        nnmodel: the model, wrapped by nnsight.
        given: the arguments about the prompts.
        ablation: how the run is ablated.
        names: how the call names the arguments, where it is otherwise.
        metric_data: the argument of that name.

    Raises:
        PatchingError: one of its kinds, naming the argument that is wrong.
    """

    def named(argument: str) -> str:
        return (names or {}).get(argument, argument)

    vocab = vocab_size(module_of(nnmodel))
    target = read_batch(nnmodel, named("tokens"), given.tokens, given.attention_mask)
    answers, others = given.answer_index, given.other_answer_index
    answers = check_answers(named("answer_index"), answers, len(target), vocab)
    if others is not None:
        others = check_answers(named("other_answer_index"), others, len(target), vocab)
    data: Iterable[Batch] | None = None
    reference, remembered = ablation.reference, None
    if isinstance(reference, Remembered):
        reference, remembered = reference.given, reference.means
    if reference is not None:
        # A stream that was averaged for an earlier batch of prompts is at its end.
        data = iter(()) if remembered else read_batches(nnmodel, "reference", reference)
    donors = partners = None
    if METHODS[ablation.method].drawn:
        # Listed, as a stream can be read but once.
        data = None if data is None else list(data)
        donors, partners = draw(target, data, strict_seed(ablation.seed))
    of_metrics = check_data(
        metric_data,
        len(target),
        given.known_answers,
        source_answer_tokens=given.answer_tokens,
        target_answer_tokens=given.other_answer_tokens,
    )
    told = answer_ids(answers, of_metrics, "source") | answer_ids(others, of_metrics, "target")
    return AblationRuns(
        target,
        answers,
        others,
        named("other_answer_index"),
        label_prompts(nnmodel, target, target, given.tokenizer, given.columns, told),
        read_spans(given.spans, len(target), target.seq_len),
        ablation.method,
        data,
        ablation.per_position,
        remembered,
        donors,
        partners,
        of_metrics,
        several=several_of(given.known_answers),
    )
