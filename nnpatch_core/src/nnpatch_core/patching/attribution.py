"""Attribution patching: what a patch would do, estimated for every site at once by gradients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._models import as_nnsight, in_one_thread
from nnpatch_core.batch import GivenTokens
from nnpatch_core.errors import PatchingError
from nnpatch_core.interventions import (
    AS_TARGET,
    Ablation,
    PairArguments,
    ablated_arguments,
    check_ablation,
    read_ablation,
    read_pairs,
)
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import EstimatedAblationName
from nnpatch_core.patching.batches import in_batches
from nnpatch_core.patching.elsewhere import on_workers
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Keep, Outcome
from nnpatch_core.seq_pos import Span
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep import (
    Checkpoint,
    Options,
    Runs,
    budget_of,
    check_repairs,
    estimate_sweep,
    prepare,
)


@on_workers
@in_one_thread
@in_batches("source_tokens", "target_tokens")
def attribution_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: GivenTokens | PromptPairs | None,
    target_tokens: GivenTokens | PromptPairs | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    spans: Mapping[str, Span] | None = None,
    metric: MetricSpec = "logit_difference",
    metric_data: Mapping[str, Tensor] | None = None,
    source_answer_tokens: Tensor | None = None,
    target_answer_tokens: Tensor | None = None,
    force_model_confidence: bool = False,
    ablation: EstimatedAblationName | None = None,
    reference: Any = None,
    per_position: bool = False,
    steps: int | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    keep: Keep = "prompts",
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> Outcome:
    """Estimate what `activation_patching` would measure, for all sites from one backward.

    A cell is the gradient of the metric at the site in the target run, times what patching would
    change there: the first-order estimate of Nanda, "Attribution Patching: Activation Patching At
    Industrial Scale" (2023). It takes two forwards and one backward, however many sites there are.
    The outcome has the grid, labels and scale of `activation_patching`, or of `ablation_patching`,
    so that the two can be laid on each other: `estimate.agreement(exact)`.

    Three repairs of what a tangent gets wrong can be asked for:

    - `steps=`: gradients along the straight path from the target's activation to the source's,
      of each component and layer as a whole (integrated gradients; Sundararajan et al., "Axiomatic
      Attribution for Deep Networks", 2017). The cells of `resid` in one layer then add up to the
      whole difference. It takes `steps` forwards and backwards, from its layer on, for each.
    - `qk_fix=True`: for `q` and `k`, how attention moves is computed through the real softmax,
      which a tangent misses where it is saturated.
    - `grad_drop=True`: the mean size of the estimate over backwards in each of which one layer adds
      a constant, so that a direct and an indirect effect cannot cancel. The values are sizes,
      without a sign: those of `activation_patching(...).magnitudes()`. It takes a backward for each
      layer, from that layer down.

    The last two together are AtP* of Kramár et al., "AtP*: An efficient and scalable method for
    localizing LLM behaviour to components" (2024).

    Sites of a `MultiSite` that act on one another are estimated together, in a forward and a
    backward of their own. Layout, padding and dropout are as in `activation_patching`; weights need
    not require a gradient, and none is left on them.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        api: an adapter (class or instance), its registered name, or None to find it by the model.
        sites: what would be patched: `Sites(...)` or `Sites.from_sites([...])`.
        source_tokens: `[batch, seq]`, where activations are taken, or a tokenizer's output, whose
            mask counts; None with `ablation=`; or a `PromptPairs`, which stands for this and all
            other arguments about the prompts (with `ablation=` for its source prompts, as in
            `ablation_patching`).
        target_tokens: the same, where they would be put.
        source_answer_index: `[batch]`, the token that each source prompt calls for; with
            `ablation=` the one that each prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for; with
            `ablation=` the one to compare with, for metrics that need one.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        spans: parts of the prompts by name, as tokens of the left-padded batch, for
            `seq_pos_type="spans"`; a `PromptPairs` brings its own.
        metric: a metric's name, a callable, or several, as for `activation_patching`; torch must be
            able to differentiate it.
        metric_data: what metrics are to know of each prompt, tensors `[batch, ...]` by name; a
            metric finds them in `context.data`, beside what a `PromptPairs` brings (its
            `metric_data`).
        source_answer_tokens: `[batch, n]`, all tokens of the answer that each source prompt calls
            for, for metrics of sequences, which append it; -1 fills on the right.
        target_answer_tokens: the same of each target prompt's.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
        ablation: `"zero"` or `"mean"` in place of a source run: the estimate of what
            `ablation_patching` measures.
        reference: for `"mean"`: the data set, as for `ablation_patching`.
        per_position: for `"mean"`: average each position, counted from the end, apart.
        steps: points on the path of integrated gradients; None is the gradient at its start.
        qk_fix: queries and keys through the real softmax. Where no site is one, an
            `EstimateWarning` says that it changes nothing, unless `grad_drop` makes it AtP*.
        grad_drop: the mean size over the layers that are held.
        batch_size: how many prompts run together, at most; None is as many as fit in memory. Of
            prompts in several parts the unpatched runs are made once more.
        memory_budget: bytes that may be used besides the model's weights, or a string such as
            `"4 GiB"`; None is half of what is free. Of each device, where the model lies on
            several; or sizes by device, as `{"cuda:0": "4 GiB", "cuda:1": "9 GiB"}`.
        keep: `"prompts"` keeps the numbers of each prompt; `"means"` their means and moments alone,
            so that memory does not grow with their number.
        checkpoint: a file that is kept up to date with what was estimated; another call with the
            same sweep goes on from it, with the same numbers.
        progress: whether a bar shows the backwards done; none does where the environment variable
            `TQDM_DISABLE` is set.
        tokenizer: gives the outcome its token strings; by default the one of a `PromptPairs` or a
            `TransformersModel`.

    Returns:
        The `Outcome`, all of it estimates, but for what is known to be 0: where what would be put
        is, bitwise, what is there, and what no later token can see (`out.exact`). `out.flat` tells
        where the estimate is 0 for another reason.

    Raises:
        PatchingError: one of its kinds, before any forward runs, naming the value that is wrong.
        GradientError: no gradient flows through the model, or through what was asked for.
        MetricError: a metric has no gradient, or one that is not finite; source and target run do
            not differ in it.
        ConfidenceError: the model does not prefer an expected answer, and this was asked for.
        MemoryBudgetError: the graph of one prompt does not fit in `memory_budget`.
        CheckpointError: the file is of another sweep, or is no whole checkpoint.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> out = attribution_patching(
        ...     tiny_model("llama"), tiny_api(), Sites(["resid", "q"], seq_pos_type="each"),
        ...     source, target, torch.tensor([1]), torch.tensor([2]), progress=False,
        ... )
        >>> out["q"].shape, out.exact("resid")[-1].tolist()
        (torch.Size([3, 3, 4]), [True, True, False])
    """
    check_flags(force_model_confidence=force_model_confidence, per_position=per_position)
    repairs = check_repairs(steps, qk_fix, grad_drop)
    arguments = PairArguments(
        source_tokens,
        target_tokens,
        source_answer_index,
        target_answer_index,
        attention_mask,
        source_attention_mask,
        target_attention_mask,
        tokenizer,
        spans,
        source_answer_tokens=source_answer_tokens,
        target_answer_tokens=target_answer_tokens,
    )
    file = None if checkpoint is None else Checkpoint(checkpoint)
    options = Options(batch_size, budget_of(file, memory_budget), progress)
    traced = as_nnsight(nnmodel)
    runs: Runs
    if ablation is None:
        if reference is not None or per_position:
            raise PatchingError("reference= and per_position= mean nothing without ablation='mean'")
        runs = read_pairs(
            traced, arguments, metric_data=metric_data, confident=force_model_confidence
        )
    else:
        if force_model_confidence:
            raise PatchingError(
                "force_model_confidence=True means nothing with ablation=: pass False"
            )
        how = Ablation(ablation, reference, per_position)
        check_ablation("ablation", how, estimated=True)
        runs = read_ablation(
            traced, ablated_arguments(arguments, ablation), how, AS_TARGET, metric_data=metric_data
        )
    sweep, runs = prepare(traced, api, sites, runs, metric, options, gathers=False)
    return estimate_sweep(sweep, runs, repairs, file)
