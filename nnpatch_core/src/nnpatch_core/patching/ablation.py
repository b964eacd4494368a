"""Ablation: take an activation away, one site at a time, and see what the answer loses."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from nnpatch_core._arguments import check_flags, shown
from nnpatch_core._integers import strict_seed
from nnpatch_core._models import as_nnsight, evaluating, in_one_thread, module_of, vocab_size
from nnpatch_core.batch import check_answers
from nnpatch_core.errors import AnswerError, PatchingError, TokensError, UnknownNameError
from nnpatch_core.interventions.inputs import read_batch, read_batches
from nnpatch_core.interventions.pairs import RunArguments, run_arguments
from nnpatch_core.interventions.values import draw, means, resampled, zeros
from nnpatch_core.metrics import MetricContext, MetricSpec, logit_difference
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Outcome
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.identity import identity
from nnpatch_core.sweep.labels import label_prompts, outcome
from nnpatch_core.sweep.lengths import warn_of_lengths
from nnpatch_core.sweep.run import Chunk, open_chunk, run_cells
from nnpatch_core.sweep.sweep import (
    Sweep,
    baselines,
    check_finite,
    check_padding,
    prepare,
    run_baseline,
    warn_of_parts,
)
from nnpatch_core.sweep.trials import try_out

METHODS = ("zero", "mean", "resample")


@in_one_thread
def ablation_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    tokens: Tensor | PromptPairs,
    answer_index: Tensor | None = None,
    other_answer_index: Tensor | None = None,
    *,
    method: str = "zero",
    reference: Any = None,
    per_position: bool = False,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    metric: MetricSpec = "logit_difference",
    engine: str = "auto",
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> Outcome:
    """Ablate each site alone in one run, and see what the metric loses.

    The value of a cell is mean ablated - mean unablated, in the metric's unit: 0 where the site did
    not matter, negative where it supported the answer. Zero, mean and resample ablation are
    compared by Zhang & Nanda, "Towards Best Practices of Activation Patching" (2024).

    Layout, padding and dropout are as in `activation_patching`.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        api: an adapter (class or instance), its registered name, or None to find it by the model.
        sites: what to ablate: `Sites(...)` or `Sites.from_sites([...])`.
        tokens: `[batch, seq]`; or a `PromptPairs`, which stands for this and all other arguments
            about the prompts, by its source prompts and both answers.
        answer_index: `[batch]`, the token that each prompt calls for.
        other_answer_index: `[batch]`, the token to compare it with, for metrics that need one.
        method: `"zero"`; `"mean"`: the mean over the tokens of `reference`; or `"resample"`: the
            activation of a random prompt of `reference`, at the same position from the end.
        reference: the data set: one batch, or (for `"mean"`) an iterable of batches, which may be
            larger than memory; a batch is tokens `[batch, seq]`, a tuple `(tokens, mask)`, or a
            tokenizer's output. None is `tokens` themselves; `"resample"` then never takes a prompt
            for itself.
        per_position: for `"mean"`: average each position, counted from the end, apart.
        seed: for `"resample"`: which prompts are drawn; None is 0.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding.
        metric: a metric's name, a callable, or several; `"kl_divergence"` is from the unablated
            run.
        engine: `"cone"` computes for each cell only what its patch can reach, `"full"` runs a whole
            forward for each; `"auto"` is the first where adapter and model allow it. The
            outcome's `info` says which it was, and why.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that the sweep may use besides the model's weights, or a string such
            as `"4 GiB"`; None is half of what is free on the device.
        checkpoint: a file that is kept up to date with what was measured. The same call goes on
            from it, with the outcome of an unbroken run; another call is refused.
        progress: whether a bar shows the cells done; none does where the environment variable
            `TQDM_DISABLE` is set.
        tokenizer: gives the outcome its token strings; by default the one of a `PromptPairs` or a
            `TransformersModel`.

    Returns:
        The `Outcome`: site name to tensor, with the first metric's values.

    Raises:
        PatchingError: one of its kinds, before any cell runs, naming the value that is wrong.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> out = ablation_patching(
        ...     tiny_model("llama"), tiny_api(), Sites(["attn", "mlp"], seq_pos_type="last"),
        ...     torch.tensor([[5, 6, 7]]), torch.tensor([1]), torch.tensor([2]), progress=False,
        ... )
        >>> out["mlp"].shape
        torch.Size([3])
    """
    check_flags(per_position=per_position)
    if not isinstance(method, str) or method not in METHODS:
        raise UnknownNameError(f"unknown method {shown(method)}; there are {', '.join(METHODS)}")
    if method == "zero" and reference is not None:
        raise PatchingError("reference= means nothing with method='zero'")
    if method != "mean" and per_position:
        raise PatchingError(f"per_position=True means nothing with method={method!r}")
    if method != "resample" and seed is not None:
        raise PatchingError(f"seed={shown(seed)} means nothing with method={method!r}")
    given = run_arguments(
        RunArguments(tokens, answer_index, other_answer_index, attention_mask, tokenizer)
    )
    traced = as_nnsight(nnmodel)
    model = module_of(traced)
    vocab = vocab_size(model)
    batch = read_batch(traced, "tokens", given.tokens, given.attention_mask)
    answers = check_answers("answer_index", given.answer_index, len(batch), vocab)
    others = given.other_answer_index
    if others is not None:
        others = check_answers("other_answer_index", others, len(batch), vocab)
    file = None if checkpoint is None else Checkpoint(checkpoint)
    sweep = prepare(
        traced,
        api,
        sites,
        batch,
        metric=metric,
        engine=engine,
        batch_size=batch_size,
        memory_budget=file.budget if file and memory_budget is None else memory_budget,
        progress=progress,
    )
    if others is None and logit_difference in sweep.metrics.values():
        raise AnswerError(
            "metric 'logit_difference' compares two answers: pass other_answer_index=, "
            "or another metric"
        )
    warn_of_parts(sweep, len(batch))
    check_padding(sweep, batch)
    prompts = label_prompts(sweep, batch, batch, given.tokenizer)
    data = None
    if reference is not None:
        read = read_batches(traced, "reference", reference)
        # What is in memory is checked now, what is streamed as it comes.
        checked = (check_padding(sweep, each) for each in read)
        data = list(checked) if isinstance(read, list) else checked
    if method == "resample":
        donors = draw(batch, data, strict_seed(0 if seed is None else seed, TokensError))
    warn_of_lengths(sites, donors if method == "resample" else None, batch)

    with evaluating(model):
        logits = run_baseline(sweep, batch)
        context = MetricContext(answers, others, logits, logits)
        baseline = baselines(sweep, context)
        for name, run in baseline.items():
            check_finite(name, run.target.mean().item(), "in the unablated run")
        try_out(sweep.metrics, context, baseline)
        if method == "zero":
            values = zeros(batch)
        elif method == "mean":
            values = means(sweep, batch, data, per_position)
        else:
            values = resampled(sweep, batch, donors)
        sweep = sweep.where_present(values.mask)
        kind = f"ablation ({method})"
        if file is not None:
            file.open(identity(sweep, kind, {"target": batch}, context, baseline, values.given))

        def chunk_of(some: Sweep, rows: slice) -> Chunk:
            return open_chunk(some, batch.rows(rows), values.of_rows(rows))

        changed = values.mask.bool().cpu().numpy()
        tally = run_cells(sweep, context, baseline, chunk_of, file, changed=changed)
    return outcome(sweep, kind, "change", tally, baseline, prompts, values.mask)
