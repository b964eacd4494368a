"""Activation patching: copy a source run's activations into a target run, one site at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._models import in_one_thread
from nnpatch_core.batch import GivenTokens
from nnpatch_core.engine import check_engine, choose_engines
from nnpatch_core.errors import RemoteError
from nnpatch_core.interventions import PairArguments, read_pairs
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import EngineName, ScreenName
from nnpatch_core.patching.batches import in_batches
from nnpatch_core.patching.elsewhere import check_sent, on_workers
from nnpatch_core.patching.screen import check_screen, screen_sweep
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
@in_batches("source_tokens")
def activation_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: GivenTokens | PromptPairs,
    target_tokens: GivenTokens | None = None,
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
    engine: EngineName = "auto",
    remote: bool | str = False,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    checkpoint: str | os.PathLike[str] | None = None,
    screen: ScreenName | None = None,
    top_k: int | None = None,
    spot_checks: int | None = None,
    seed: int | None = None,
    keep: Keep = "prompts",
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
        source_tokens: `[batch, seq]`, where activations are taken, or a tokenizer's output, whose
            mask counts; or a `PromptPairs`, which stands for this and all other arguments about the
            prompts.
        target_tokens: the same, where they are put.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        spans: parts of the prompts by name, as tokens of the left-padded batch, for
            `seq_pos_type="spans"`; a `PromptPairs` brings its own.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`.
        metric_data: what metrics are to know of each prompt, tensors `[batch, ...]` by name; a
            metric finds them in `context.data`, beside what a `PromptPairs` brings (its
            `metric_data`).
        source_answer_tokens: `[batch, n]`, all tokens of the answer that each source prompt calls
            for, for metrics of sequences, which append it; -1 fills on the right.
        target_answer_tokens: the same of each target prompt's.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
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
        screen: `"attribution"` or `"atp*"`: estimate all cells first (`attribution_patching`), and
            measure only the most promising ones; the others keep their estimates. `out.exact` says
            which is which. Those of `"atp*"` are chosen by its sizes, and estimated with a sign, by
            the QK fix.
        top_k: how many cells a screen lets through.
        spot_checks: how many of the others are measured too, drawn at random, so that
            `out.screening` can bound what was missed; None is as many as `top_k`.
        seed: of that draw; None is 0.
        keep: `"prompts"` keeps the numbers of each prompt; `"means"` their means and moments alone,
            so that memory does not grow with their number.
        progress: whether a bar shows the cells done; none does where the environment variable
            `TQDM_DISABLE` is set.
        tokenizer: gives the outcome its token strings; by default the one of a `PromptPairs` or a
            `TransformersModel`.

    Returns:
        The `Outcome`: site name to tensor, with the first metric's values.

    Raises:
        PatchingError: one of its kinds, before any forward runs, naming the value that is wrong.
        EngineError: `engine="cone"` was asked for and cannot run this sweep.
        RemoteError: the model cannot run elsewhere, something of the sweep cannot be sent, or the
            server fails.
        MemoryBudgetError: one prompt does not fit in `memory_budget`.
        CheckpointError: the checkpoint is of another sweep; the message says what differs.
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
    check_flags(force_model_confidence=force_model_confidence)
    check_engine(engine)
    screen_options = check_screen(screen, top_k, spot_checks, seed)
    if screen_options is not None and remote is not False:
        raise RemoteError(
            f"screen={screen!r} estimates by gradients, which do not come back from elsewhere: "
            "leave out screen= or remote="
        )
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
    drawn = None if screen_options is None else screen_options.seed
    options = Options(batch_size, budget_of(file, memory_budget), progress, seed=drawn)
    traced = model_for(nnmodel, remote)
    runs = read_pairs(traced, arguments, metric_data=metric_data, confident=force_model_confidence)
    sweep, runs = prepare(traced, api, sites, runs, metric, options, engine=engine)
    check_sent(sweep, runs)
    choice = choose_engines(engine, sweep.patches)
    warn_of_chunks(sweep, sweep.chunks)
    if screen_options is None:
        return measure_sweep(sweep, runs, choice, file)
    return screen_sweep(screen_options, sweep, runs, choice, file)
