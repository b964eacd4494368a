"""Ablation: take an activation away, one site at a time, and see what the answer loses."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core._models import in_one_thread
from nnpatch_core.batch import GivenTokens
from nnpatch_core.engine import check_engine, choose_engines
from nnpatch_core.interventions import (
    Ablation,
    RunArguments,
    check_ablation,
    read_ablation,
    run_arguments,
)
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import AblationName, EngineName
from nnpatch_core.patching.batches import in_batches
from nnpatch_core.patching.elsewhere import check_sent, on_workers
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Keep, Outcome
from nnpatch_core.seq_pos import Span
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep import (
    Checkpoint,
    Options,
    budget_of,
    measure_sweep,
    prepare,
    warn_of_chunks,
)
from nnpatch_core.tracing import model_for


@on_workers
@in_one_thread
@in_batches("tokens")
def ablation_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    tokens: GivenTokens | PromptPairs,
    answer_index: Tensor | None = None,
    other_answer_index: Tensor | None = None,
    *,
    method: AblationName = "zero",
    reference: Any = None,
    per_position: bool = False,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    spans: Mapping[str, Span] | None = None,
    metric: MetricSpec = "logit_difference",
    metric_data: Mapping[str, Tensor] | None = None,
    answer_tokens: Tensor | None = None,
    other_answer_tokens: Tensor | None = None,
    engine: EngineName = "auto",
    remote: bool | str = False,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    checkpoint: str | os.PathLike[str] | None = None,
    keep: Keep = "prompts",
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
        tokens: `[batch, seq]`, or a tokenizer's output, whose mask counts; or a `PromptPairs`,
            which stands for this and all other arguments about the prompts, by its source prompts
            and both answers.
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
        spans: parts of the prompts by name, as tokens of the left-padded batch, for
            `seq_pos_type="spans"`; a `PromptPairs` brings its own.
        metric: a metric's name, a callable, or several; `"kl_divergence"` is from the unablated
            run.
        metric_data: what metrics are to know of each prompt, tensors `[batch, ...]` by name; a
            metric finds them in `context.data`, beside what a `PromptPairs` brings (its
            `metric_data`).
        answer_tokens: `[batch, n]`, all tokens of the answer that each prompt calls for, for
            metrics of sequences, which append it; -1 fills on the right. In `context.data` it is
            `source_answer_tokens`.
        other_answer_tokens: the same of the answer to compare with; `target_answer_tokens` there.
        engine: `"cone"` computes for each cell only what its patch can reach, `"full"` runs a whole
            forward for each; `"auto"` is the first where adapter and model allow it. The
            outcome's `info` says which it was, and why.
        remote: where the model runs. False is here; True is NDIF, or the server that nnsight is set
            up for; an address, as `"https://..."`, another one; `"local"` rehearses that in this
            process. For nnsight's `TransformersModel`, which then needs no weights here. It is the
            full engine, with some cells in each request.
        batch_size: how many prompts run together, at most; None is as many as fit in memory, and
            elsewhere as make 4096 tokens.
        memory_budget: bytes that the sweep may use besides the model's weights, or a string such
            as `"4 GiB"`; None is half of what is free. Of each device, where the model lies on
            several; or sizes by device, as `{"cuda:0": "4 GiB", "cuda:1": "9 GiB"}`.
        checkpoint: a file that is kept up to date with what was measured. The same call goes on
            from it, with the outcome of an unbroken run; another call is refused.
        keep: `"prompts"` keeps the numbers of each prompt; `"means"` their means and moments alone,
            so that memory does not grow with their number.
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
    ablation = Ablation(method, reference, per_position, seed)
    check_ablation("method", ablation)
    check_engine(engine)
    arguments = RunArguments(
        tokens,
        answer_index,
        other_answer_index,
        attention_mask,
        tokenizer,
        spans,
        answer_tokens=answer_tokens,
        other_answer_tokens=other_answer_tokens,
    )
    file = None if checkpoint is None else Checkpoint(checkpoint)
    options = Options(batch_size, budget_of(file, memory_budget), progress, seed=ablation.drawn)
    traced = model_for(nnmodel, remote)
    runs = read_ablation(traced, run_arguments(arguments), ablation, metric_data=metric_data)
    sweep, runs = prepare(traced, api, sites, runs, metric, options, engine=engine)
    check_sent(sweep, runs)
    choice = choose_engines(engine, sweep.patches)
    warn_of_chunks(sweep, sweep.chunks)
    return measure_sweep(sweep, runs, choice, file)
