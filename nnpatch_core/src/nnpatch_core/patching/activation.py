"""Activation patching: copy a source run's activations into a target run, one site at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core._models import as_nnsight, evaluating, module_of, vocab_size
from nnpatch_core.batch import check_answers, check_paired
from nnpatch_core.engine import Recorded, record
from nnpatch_core.errors import ConfidenceError, MaskError, MetricError
from nnpatch_core.metrics import MetricContext, MetricSpec, logit_difference
from nnpatch_core.patching.inputs import read_batch
from nnpatch_core.patching.labels import label_prompts, outcome
from nnpatch_core.patching.sweep import (
    baselines,
    check_finite,
    check_padding,
    prepare,
    run_baseline,
    run_cells,
)
from nnpatch_core.results import Baseline, Outcome, Prompts
from nnpatch_core.sites import SweepSites


def activation_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: Tensor,
    target_tokens: Tensor,
    source_answer_index: Tensor,
    target_answer_index: Tensor,
    *,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    metric: MetricSpec = "logit_difference",
    force_model_confidence: bool = False,
    engine: str = "full",
    batch_size: int | None = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> Outcome:
    """Patch each site alone, from the source run into the target run, and see the answer move.

    The value of a cell is (mean patched - mean target) / (mean source - mean target): 0 where
    nothing moved, 1 where the source run's answer is fully restored. The method is causal tracing
    of Meng et al., "Locating and Editing Factual Associations in GPT" (2022), in the form of
    Wang et al., "Interpretability in the Wild" (2022).

    Every batch is re-packed to left padding before it runs, so that -1 is each prompt's last token
    and the outcome's positions are those of the left-padded batch; where one of the two runs has
    padding at a position, that prompt is not patched there. Dropout is off during the sweep.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        api: an adapter (class or instance), its registered name, or None to find it by the model.
        sites: what to patch: `Sites(...)` or `Sites.from_sites([...])`.
        source_tokens: `[batch, seq]`, where activations are taken.
        target_tokens: `[batch, seq]`, where they are put.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
        engine: how the sweep is executed; `"full"` runs a whole forward a cell.
        batch_size: prompts that run together; None is all.
        progress: whether a bar shows the cells done.
        tokenizer: gives the outcome its token strings; by default the one of a
            `TransformersModel`.

    Returns:
        The `Outcome`: site name to tensor, with the first metric's values.

    Raises:
        PatchingError: one of its kinds, before any forward runs, naming the value that is wrong.
        ConfidenceError: the model does not prefer an expected answer, and this was asked for.
        MetricError: source and target run do not differ in a metric, or it is not finite.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> out = activation_patching(
        ...     tiny_model("llama"), tiny_api(), Sites("resid", seq_pos_type="each"),
        ...     source, target, torch.tensor([1]), torch.tensor([2]), progress=False,
        ... )
        >>> out["resid"].shape, round(out["resid"][-1, -1].item(), 3)
        (torch.Size([3, 3]), 1.0)
    """
    traced = as_nnsight(nnmodel)
    model = module_of(traced)
    source_mask = _one_mask("source", attention_mask, source_attention_mask)
    target_mask = _one_mask("target", attention_mask, target_attention_mask)
    source = read_batch(traced, "source_tokens", source_tokens, source_mask)
    target = read_batch(traced, "target_tokens", target_tokens, target_mask)
    check_paired(source, target)
    count, vocab = len(source), vocab_size(model)
    source_answers = check_answers("source_answer_index", source_answer_index, count, vocab)
    target_answers = check_answers("target_answer_index", target_answer_index, count, vocab)
    sweep = prepare(
        traced,
        api,
        sites,
        source.seq_len,
        metric=metric,
        engine=engine,
        batch_size=batch_size,
        progress=progress,
    )
    for batch in (source, target):
        check_padding(sweep, batch)
    prompts = label_prompts(sweep, source, target, tokenizer)
    both = source.mask * target.mask.to(source.mask.device)
    sweep = sweep.where_present(both)

    with evaluating(model):
        context = MetricContext(
            source_answers,
            target_answers,
            run_baseline(traced, sweep, source),
            run_baseline(traced, sweep, target),
        )
        if force_model_confidence:
            _check_confidence(context, prompts)
        baseline = baselines(sweep, context)
        _check_denominators(baseline)

        def replacement(rows: slice) -> Recorded:
            _, activations = record(traced, source.rows(rows), sweep.sites)
            return Recorded(traced, activations, both[rows])

        raw = run_cells(sweep, target, context, replacement)
    return outcome(sweep, "activation", "restored", raw, baseline, prompts, both)


def _one_mask(run: str, both: Tensor | None, own: Tensor | None) -> Tensor | None:
    if both is not None and own is not None:
        raise MaskError(
            f"attention_mask= and {run}_attention_mask= were both given; "
            "the first is for both runs, so give one of them"
        )
    return both if own is None else own


def _check_confidence(context: MetricContext, prompts: Prompts) -> None:
    """Raise `ConfidenceError`, with the prompts, unless each run prefers its own answer."""
    source = logit_difference(context.source_logits, context)
    target = logit_difference(context.target_logits, context)
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


def _check_denominators(baseline: Mapping[str, Baseline]) -> None:
    for name, runs in baseline.items():
        source, target = runs.source.double().mean().item(), runs.target.double().mean().item()
        check_finite(name, source, "in the source run")
        check_finite(name, target, "in the target run")
        if source == target:
            raise MetricError(
                f"metric {name!r} is {source:g} in the source run and in the target run: "
                "a value relative to their difference would divide by 0"
            )
