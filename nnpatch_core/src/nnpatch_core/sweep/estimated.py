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
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.estimation import Estimation, OpenedGraph, Repairs
from nnpatch_core.sweep.identity import identity
from nnpatch_core.sweep.labels import outcome
from nnpatch_core.sweep.ledger import Ledger
from nnpatch_core.sweep.progress import make_bar
from nnpatch_core.sweep.runs import Runs, Values
from nnpatch_core.sweep.sweep import Sweep, baselines, warn_of_chunks
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.sweep.versions import Versions
from nnpatch_core.tracing import backward_hooks, in_words


def estimate_sweep(
    sweep: Sweep,
    runs: Runs,
    repairs: Repairs,
    checkpoint: Checkpoint | None = None,
    *,
    chunks_told: bool = False,
    screening: bool = False,
) -> Outcome:
    """Estimate what each cell would measure.

    Args:
        sweep: what is patched.
        runs: into which prompts, and what is put there.
        repairs: how it is estimated.
        checkpoint: where what was estimated is kept.
        chunks_told: whether the user was told that the prompts run in several chunks.
        screening: whether a screen estimates, which asks for its repairs whatever the sites are.

    Raises:
        PatchingError: one of its kinds; bad input before any backward runs.
    """
    model = sweep.patches.model
    words = ", ".join([*([runs.ablation] if runs.ablation else []), *repairs.words])
    kind = f"attribution ({words})" if words else "attribution"
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
            if checkpoint is not None:
                limits = estimation.told
                own = identity(sweep, runs, values, kind, "gradient", limits, context, baseline)
                checkpoint.open(own, sweep.options.call, model)
            parts, chunks = estimation.parts, estimation.chunks
            ledger = Ledger.of(parts, chunks, sweep.metrics, checkpoint)
            estimate.fill(context, ledger)
            bar.update(bar.total - bar.n)
            ledger.close()
    tally = versions.tally(ledger.total(baseline, estimation.folded))
    return outcome(
        versions.sweep(sweep),
        kind,
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

    def fill(self, context: MetricContext, ledger: Ledger) -> None:
        """Make what is to be made here, and put it into the ledger."""
        estimation = self._estimation
        weights = estimation.weights(context)
        for group in estimation.groups():
            left = {number: ledger.to_make(number, group) for number in range(len(ledger.chunks))}
            along = self._along(
                sorted({each for parts in left.values() for each in parts}), context
            )
            for number, parts in left.items():
                if not parts:
                    continue
                chunk = ledger.chunks[number]
                opened = self._open(chunk) if self._kept is None else self._kept
                elided, unread = estimation.still(opened)
                made = estimation.estimate(
                    opened,
                    context.rows(_numbers(chunk)),
                    {name: weight[chunk] for name, weight in weights.items()},
                    parts,
                    {
                        terms: {name: each[:, chunk] for name, each in gradients.items()}
                        for terms, gradients in along.items()
                    },
                )
                for some, changes in made:
                    ledger.note(number, some, changes, elided, unread)
                # Its graph must not stay while the next one is made.
                del opened, made

    def _open(self, chunk: slice) -> OpenedGraph:
        source_logits, intervention = self._values.of(self._estimation.sweep, chunk)
        target = self._runs.target.rows(chunk)
        return self._estimation.open(chunk, target, intervention, source_logits)

    def _along(
        self, parts: Sequence[int], context: MetricContext
    ) -> dict[Terms, dict[str, Tensor]]:
        """For the terms of some paths the gradients, along each, of metrics given all prompts.

        They are the gradients of all prompts, so the paths must be run before any graph is made of
        them. Nothing where no metric needs it.
        """
        if not self._estimation.at_once or not parts:
            return {}
        group = [self._estimation.every[part] for part in parts]
        found: dict[Terms, list[Tensor]] = {terms: [] for terms in group}
        for chunk in self._estimation.chunks:
            some = context.rows(_numbers(chunk))
            logits = self._estimation.path_logits(self._open(chunk), some, group)
            for terms, each in logits.items():
                found[terms].append(each)
        return {
            terms: self._estimation.path_weights(torch.cat(found.pop(terms), 1), context)
            for terms in group
        }


def _numbers(chunk: slice) -> Tensor:
    return torch.arange(chunk.start, chunk.stop, device="cpu")


def _advance(bar: Any) -> None:
    if bar.n < bar.total:
        bar.update()
