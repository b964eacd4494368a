"""The cost of a sweep, told before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import as_nnsight
from nnpatch_core._warnings import warn
from nnpatch_core.batch import GivenTokens
from nnpatch_core.engine import Plan, beginning_for, choose_engines
from nnpatch_core.errors import EngineWarning
from nnpatch_core.interventions import (
    PairArguments,
    ablated_arguments,
    differs_of,
    pair_arguments,
    patchable,
    read_batch,
    read_spans,
    read_two,
)
from nnpatch_core.memory import MemoryBudget, limits_of
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.seq_pos import PromptBatch, Span
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep import Options, label_prompts, lay_out, plan_of, warn_of_columns


def plan_sweep(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: GivenTokens | PromptPairs | None,
    target_tokens: GivenTokens | PromptPairs | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    spans: Mapping[str, Span] | None = None,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
) -> Plan:
    """Plan a sweep in the cone engine, as `activation_patching` will, without a forward.

    What is elided is told from the tokens: nothing changes left of the first token in which a
    prompt's two runs differ. The sweep itself compares activations, and may find more.

    Where hooks on the model make the default another engine, a warning says so; and where columns
    of the outcome would mix the words of several templates, if a tokenizer is at hand.

    The model's weights are not looked at: one on torch's `meta` device will do.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        sites: what to patch.
        source_tokens: `[batch, seq]`, or a tokenizer's output; None for an ablation, which changes
            every token; or a `PromptPairs`, which stands for this, the target tokens and the masks.
        target_tokens: the same; or, after None, a `PromptPairs`, whose source prompts an ablation
            runs.
        attention_mask: `[batch, seq]`, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        spans: as for `activation_patching`.
        batch_size: how many prompts run together, at most.
        memory_budget: as for `activation_patching`.

    Raises:
        EngineError: the cone engine cannot run the sweep; the message says why.
        PatchingError: another kind of it, for other bad input.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Sites
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> sites = Sites("resid", seq_pos_type="each")
        >>> plan = plan_sweep(tiny_model("llama"), tiny_api(), sites, source, target)
        >>> plan.cells, plan.elided, plan.token_layers, plan.full_token_layers
        (9, 3, 12, 81)
    """
    given = PairArguments(
        source_tokens,
        target_tokens,
        attention_mask=attention_mask,
        source_attention_mask=source_attention_mask,
        target_attention_mask=target_attention_mask,
        spans=spans,
    )
    options, traced = Options(batch_size, memory_budget), as_nnsight(nnmodel)
    if source_tokens is None:
        run = ablated_arguments(given, answers=False)
        tokenizer = run.tokenizer
        source = target = read_batch(traced, "target_tokens", run.tokens, run.attention_mask)
        own = read_spans(run.spans, len(target), target.seq_len)
        prompts = PromptBatch(target, None, own)
        changed = target.mask.bool()
    else:
        pairs = pair_arguments(given, answers=False)
        tokenizer = pairs.tokenizer
        source, target = read_two(traced, pairs)
        own = read_spans(pairs.spans, len(target), target.seq_len)
        prompts = PromptBatch(target, source, own)
        changed = torch.from_numpy(differs_of(source, target))
    layout = lay_out(traced, api, sites, prompts)
    mask = patchable(source, target, layout.patches)
    sizes = len(target), target.seq_len
    # Of all cells, as the sweep has it: those that meet padding alone are left out after that.
    limits = limits_of(
        layout.patches,
        *sizes,
        given=options.memory_budget,
        batch_size=options.batch_size,
        whole=False,
        trimmed=source_tokens is not None,
        padded=any(bool((batch.mask == 0).any()) for batch in (source, target)),
        beginning=None
        if source_tokens is None
        else beginning_for("cone", layout.patches, [source, target]),
    )
    patches = layout.where_present(mask).patches
    # By name, so that a reason against it is an error.
    choose_engines("cone", patches)
    strings = label_prompts(traced, source, target, tokenizer).strings
    warn_of_columns(sites, prompts, strings)
    default = choose_engines("auto", patches)
    if default.fallback is not None:
        warn(
            f"this is the plan of engine='cone'; the default takes {default.name!r}: "
            f"{default.fallback}",
            EngineWarning,
        )
    made = plan_of(patches, limits, (changed.cpu() & mask.cpu().bool()).numpy())
    shortest = min(int(each.mask.sum(1).min()) for each in (source, target))
    recorded = 1 if source_tokens is None else 2
    return attrs.evolve(made, shortest=shortest, recorded_runs=recorded)
