"""What a sweep in the cone engine will cost, told from its prompts, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from nnpatch_core._models import as_nnsight, module_of
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import n_layers
from nnpatch_core.batch import Batch, check_paired
from nnpatch_core.engine import Plan, joined, plan_cells, why_rather_full
from nnpatch_core.engine.rows import Booleans, place_of, stops_of
from nnpatch_core.errors import EngineWarning
from nnpatch_core.interventions.inputs import one_mask, read_batch
from nnpatch_core.interventions.pairs import PairArguments, ablated_arguments, pair_arguments
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep.lengths import warn_of_lengths
from nnpatch_core.sweep.sweep import Sweep, prepare


def plan_sweep(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: Tensor | PromptPairs | None,
    target_tokens: Tensor | PromptPairs | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
) -> Plan:
    """Plan a sweep in the cone engine, as `activation_patching` will, without a forward.

    What is elided is told from the tokens: nothing changes left of the first token in which a
    prompt's two runs differ. The sweep itself compares activations, and may find more.

    Where hooks on the model make the default another engine, a warning says so.

    The model's weights are not looked at: one on torch's `meta` device will do.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        sites: what to patch.
        source_tokens: `[batch, seq]`; None for an ablation, which changes every token; or a
            `PromptPairs`, which stands for this, the target tokens and the masks.
        target_tokens: `[batch, seq]`; or, after None, a `PromptPairs`, whose source prompts an
            ablation runs.
        attention_mask: `[batch, seq]`, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
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
    passed = PairArguments(
        source_tokens,
        target_tokens,
        attention_mask=attention_mask,
        source_attention_mask=source_attention_mask,
        target_attention_mask=target_attention_mask,
    )
    resolve = ablated_arguments if source_tokens is None else pair_arguments
    given = resolve(passed, answers=False)
    traced = as_nnsight(nnmodel)
    source_mask = one_mask("source", given.attention_mask, given.source_attention_mask)
    target_mask = one_mask("target", given.attention_mask, given.target_attention_mask)
    target = read_batch(traced, "target_tokens", given.target_tokens, target_mask)
    source = None
    differs, both = np.ones(target.tokens.shape, dtype=np.bool_), target.mask
    if given.source_tokens is not None:
        source = read_batch(traced, "source_tokens", given.source_tokens, source_mask)
        check_paired(source, target)
        differs, both = differs_of(source, target), source.mask * target.mask
    sweep = prepare(
        traced,
        api,
        sites,
        target,
        metric="logit_difference",
        engine="cone",
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=False,
    ).where_present(both)
    warn_of_lengths(sites, source, target)
    if reason := why_rather_full(module_of(traced)):
        warn(
            f"this is the plan of engine='cone'; the default takes 'full': {reason}", EngineWarning
        )
    return plan_of(sweep, differs & both.bool().cpu().numpy())


def plan_of(sweep: Sweep, changed: Booleans) -> Plan:
    """The plan of a sweep in the cone engine; `changed` is `[batch, seq]`: where patches differ.

    Raises:
        MemoryBudgetError: a single run does not fit.
    """
    batch, seq_len = changed.shape
    stops = stops_of(sweep.cells, sweep.nnmodel, seq_len)
    # A head changes where its component does; it takes no more columns than the cells ask for.
    heads = 1 + max((site.head or 0) for site in sweep.sites)
    every = np.broadcast_to(changed[..., None], (*changed.shape, heads))
    layers = n_layers(sweep.sites[0].api, module_of(sweep.nnmodel))
    plans = []
    for rows in sweep.chunks(batch):
        places = {place_of(site): every[rows] for site in sweep.sites}
        shape = (rows.stop - rows.start, seq_len)
        plans.append(plan_cells(stops, places, *shape, layers, sweep.limits))
    return joined(plans)


def differs_of(source: Batch, target: Batch) -> Booleans:
    """`[batch, seq]`: where the two runs of a prompt can be told apart, by their tokens so far."""
    other = (source.tokens != target.tokens.to(source.tokens.device)) & source.mask.bool()
    # Of prompts that differ in length every position differs.
    shifted = (source.mask != target.mask.to(source.mask.device)).any(1, keepdim=True)
    found: Booleans = (other.cumsum(1).bool() | shifted).cpu().numpy()
    return found
