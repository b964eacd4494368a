"""A sweep, estimated: gradients in place of patched runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import evaluating, frozen
from nnpatch_core._warnings import warn
from nnpatch_core.errors import EngineWarning, EstimateWarning, MetricError
from nnpatch_core.gradients import FIXED, Terms, check_gradients
from nnpatch_core.metrics import (
    MetricContext,
    activations_read,
    answers_followed,
    is_lowest_at_source,
)
from nnpatch_core.results import Outcome
from nnpatch_core.sweep.estimation import Estimation, OpenedGraph, Repairs
from nnpatch_core.sweep.labels import outcome
from nnpatch_core.sweep.progress import make_bar
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.sweep import Sweep, baselines, warn_of_chunks
from nnpatch_core.sweep.tally import Tally
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.sweep.versions import Versions
from nnpatch_core.tracing import backward_hooks, in_words


def estimate_sweep(
    sweep: Sweep,
    runs: Runs,
    repairs: Repairs,
    *,
    chunks_told: bool = False,
    screening: bool = False,
) -> Outcome:
    """Estimate what each cell would measure.

    Args:
        sweep: what is patched.
        runs: into which prompts, and what is put there.
        repairs: how it is estimated.
        chunks_told: whether the user was told that the prompts run in several chunks.
        screening: whether a screen estimates, which asks for its repairs whatever the sites are.

    Raises:
        PatchingError: one of its kinds; bad input before any backward runs.
    """
    model = sweep.patches.model
    check_gradients(model)
    _warn_of_hooks(model)
    _check_slopes(sweep, runs, repairs)
    _check_signs(sweep, repairs)
    _check_activations(sweep, repairs)
    with evaluating(model), frozen(model):
        values = runs.values(sweep)
        sweep = sweep.where_present(values.mask)
        estimation = Estimation.of(sweep, repairs)
        if not chunks_told:
            warn_of_chunks(sweep, estimation.chunks)
        if not screening:
            _warn_of_unused(estimation)
        with make_bar(estimation.passes, sweep.options.progress, desc="backwards") as bar:
            estimation = attrs.evolve(estimation, tick=lambda: _advance(bar))
            estimate = _Estimate(estimation, runs, values)
            context = estimate.context()
            baseline = baselines(estimation.sweep, context)
            versions = Versions.of(sweep, runs.reading)
            once = versions.baselines(baseline)
            runs.check_baseline(context.once, once)
            try_out(sweep.metrics, context, baseline)
            tally = estimate.tally(context, Tally.empty(len(sweep.patches.cells), baseline))
            bar.update(bar.total - bar.n)
    words = ", ".join([*([runs.ablation] if runs.ablation else []), *repairs.words])
    tally = versions.tally(tally)
    return outcome(
        versions.sweep(sweep),
        f"attribution ({words})" if words else "attribution",
        runs.scale,
        tally,
        once,
        runs.prompts,
        versions.mask(values.mask),
        exact=tally.known.all(1),
        magnitude=repairs.grad_drop,
    )


def _check_activations(sweep: Sweep, repairs: Repairs) -> None:
    """Raise `MetricError` where a repair looks at nothing but the logits."""
    named = {"steps=": repairs.steps is not None, "grad_drop=True": repairs.grad_drop}
    for repair in (name for name, wanted in named.items() if wanted):
        for name, metric in sweep.metrics.items():
            if activations_read(metric):
                raise MetricError(
                    f"metric {name!r} reads activations, and {repair} follows what a cell does to "
                    f"the logits alone: leave out {repair}"
                )


def _check_signs(sweep: Sweep, repairs: Repairs) -> None:
    """Raise `MetricError` for a difference of two runs, of which GradDrop would have the sizes."""
    for name, metric in sweep.metrics.items():
        if repairs.grad_drop and len(answers_followed(metric)) > 1:
            raise MetricError(
                f"metric {name!r} is a difference of two runs of each prompt, and GradDrop gives "
                "sizes without a sign, whose difference is no size of it: leave out "
                "grad_drop=True, or take screen='attribution'"
            )


def _warn_of_hooks(model: nn.Module) -> None:
    hooks = backward_hooks(model)
    if hooks:
        warn(
            f"the model has {in_words(hooks)}, which may change gradients: the estimate is made of "
            "what it leaves of them",
            EngineWarning,
        )


def _warn_of_unused(estimation: Estimation) -> None:
    """Of AtP* one half is for every site, and says nothing of the other."""
    repairs, places = estimation.repairs, estimation.sweep.patches.places
    if repairs.qk_fix and not repairs.grad_drop and not estimation.fixed:
        names = dict.fromkeys(place.name for place in places)
        warn(
            f"qk_fix=True changes nothing without {' or '.join(FIXED)} among the sites, which are "
            f"of {', '.join(names)}",
            EstimateWarning,
        )


def _check_slopes(sweep: Sweep, runs: Runs, repairs: Repairs) -> None:
    """Raise `MetricError` for a metric that is flat at an unablated run, which is its source."""
    for name, metric in sweep.metrics.items():
        if runs.ablation and repairs.steps is None and is_lowest_at_source(metric):
            raise MetricError(
                f"metric {name!r} from the unablated run is 0 there, which is its lowest: its "
                "gradient is 0, so that nothing can be attributed; steps= looks further"
            )


class _Estimate:
    """The estimate of a sweep; where all prompts run together, their graph is made once."""

    def __init__(self, estimation: Estimation, runs: Runs, values: Values) -> None:
        self._estimation, self._runs, self._values = estimation, runs, values
        chunks = estimation.chunks
        self._kept = self._open(chunks[0]) if len(chunks) == 1 else None

    def context(self) -> MetricContext:
        """The context that metrics compare with: the recorded runs are the unpatched ones too."""
        if self._kept is not None:
            return self._runs.context(self._kept.source_logits, self._kept.logits)
        return self._runs.unpatched(self._estimation.sweep, self._estimation.chunks)

    def tally(self, context: MetricContext, tally: Tally) -> Tally:
        """The tally with estimates in it."""
        weights = self._estimation.weights(context)
        values = {name: value.double() for name, value in tally.values.items()}
        for group in self._estimation.groups():
            along = self._along(group, context)
            for chunk in self._estimation.chunks:
                opened = self._open(chunk) if self._kept is None else self._kept
                changes, elided, unread = self._estimation.estimate(
                    opened,
                    context.rows(_numbers(chunk)),
                    {name: weight[chunk] for name, weight in weights.items()},
                    group,
                    {
                        terms: {name: each[:, chunk] for name, each in gradients.items()}
                        for terms, gradients in along.items()
                    },
                )
                for name, change in changes.items():
                    values[name][:, chunk] += change
                tally.elided[:, chunk], tally.unread[:, chunk] = elided, unread
                # Its graph must not stay while the next one is made.
                del opened
        tally.note("gradient", None)
        return attrs.evolve(tally, values=values)

    def _open(self, chunk: slice) -> OpenedGraph:
        source_logits, intervention = self._values.of(self._estimation.sweep, chunk)
        target = self._runs.target.rows(chunk)
        return self._estimation.open(chunk, target, intervention, source_logits)

    def _along(
        self, group: Sequence[Terms], context: MetricContext
    ) -> dict[Terms, dict[str, Tensor]]:
        """For the terms of `group` the gradients, along a path, of metrics given all prompts.

        They are the gradients of all prompts, so the paths must be run before any graph is made of
        them. Nothing where no metric needs it.
        """
        if not self._estimation.at_once:
            return {}
        parts: dict[Terms, list[Tensor]] = {terms: [] for terms in group}
        for chunk in self._estimation.chunks:
            some = context.rows(_numbers(chunk))
            logits = self._estimation.path_logits(self._open(chunk), some, group)
            for terms, each in logits.items():
                parts[terms].append(each)
        return {
            terms: self._estimation.path_weights(torch.cat(parts.pop(terms), 1), context)
            for terms in group
        }


def _numbers(chunk: slice) -> Tensor:
    return torch.arange(chunk.start, chunk.stop, device="cpu")


def _advance(bar: Any) -> None:
    if bar.n < bar.total:
        bar.update()
