"""Activation patching: copy a source run's activations into a target run, one site at a time."""

from __future__ import annotations

import os
from typing import Any

import attrs
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._models import as_nnsight, evaluating, in_one_thread, module_of
from nnpatch_core.interventions.pairs import (
    PairArguments,
    check_confidence,
    check_denominators,
    pair_arguments,
    read_pairs,
)
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.patching.attribution import attribution_patching
from nnpatch_core.patching.planned import differs_of
from nnpatch_core.patching.screen import Screened, check_screen, screen_by
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Outcome
from nnpatch_core.sites import SweepSites
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.identity import identity
from nnpatch_core.sweep.labels import label_prompts, outcome
from nnpatch_core.sweep.lengths import Spoken, warn_of_lengths
from nnpatch_core.sweep.run import Chunk, open_chunk, run_cells
from nnpatch_core.sweep.sweep import (
    Sweep,
    baselines,
    check_padding,
    prepare,
    run_baseline,
    warn_of_parts,
)
from nnpatch_core.sweep.trials import try_out
from nnpatch_core.tracing import Recorded, record


@in_one_thread
def activation_patching(
    nnmodel: Any,
    api: Any,
    sites: SweepSites,
    source_tokens: Tensor | PromptPairs,
    target_tokens: Tensor | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    metric: MetricSpec = "logit_difference",
    force_model_confidence: bool = False,
    engine: str = "auto",
    batch_size: int | None = None,
    memory_budget: int | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    screen: str | None = None,
    top_k: int | None = None,
    spot_checks: int | None = None,
    seed: int | None = None,
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
        source_tokens: `[batch, seq]`, where activations are taken; or a `PromptPairs`, which stands
            for this and all other arguments about the prompts.
        target_tokens: `[batch, seq]`, where they are put.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
        engine: `"cone"` computes for each cell only what its patch can reach, `"full"` runs a whole
            forward for each; `"auto"` is the first where adapter and model allow it. The
            outcome's `info` says which it was, and why.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that the sweep may use besides the model's weights, or a string such
            as `"4 GiB"`; None is half of what is free on the device.
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
        progress: whether a bar shows the cells done; none does where the environment variable
            `TQDM_DISABLE` is set.
        tokenizer: gives the outcome its token strings; by default the one of a `PromptPairs` or a
            `TransformersModel`.

    Returns:
        The `Outcome`: site name to tensor, with the first metric's values.

    Raises:
        PatchingError: one of its kinds, before any forward runs, naming the value that is wrong.
        EngineError: `engine="cone"` was asked for and cannot run this sweep.
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
    screening = check_screen(screen, top_k, spot_checks, seed)
    given = pair_arguments(
        PairArguments(
            source_tokens,
            target_tokens,
            source_answer_index,
            target_answer_index,
            attention_mask,
            source_attention_mask,
            target_attention_mask,
            tokenizer,
        )
    )
    traced = as_nnsight(nnmodel)
    model = module_of(traced)
    pairs = read_pairs(traced, given)
    source, target, count = pairs.source, pairs.target, len(pairs)
    file = None if checkpoint is None else Checkpoint(checkpoint)
    # As the sweep was begun: what runs together decides on last digits, so on a screen's near ties.
    memory_budget = file.budget if file and memory_budget is None else memory_budget
    sweep = prepare(
        traced,
        api,
        sites,
        target,
        metric=metric,
        engine=engine,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )
    warn_of_parts(sweep, count)
    for batch in (source, target):
        check_padding(sweep, batch)
    warn_of_lengths(sites, source, target)
    prompts = label_prompts(sweep, source, target, given.tokenizer)
    both = pairs.mask
    whole = sweep = sweep.where_present(both)
    screened: Screened | None = None
    if screening is not None:
        # Packed: what was to be said of their padding has been said.
        checked = attrs.evolve(
            given,
            source_tokens=source.tokens,
            target_tokens=target.tokens,
            attention_mask=None,
            source_attention_mask=source.mask,
            target_attention_mask=target.mask,
        )

        def estimate(qk_fix: bool, grad_drop: bool) -> Outcome:
            return attribution_patching(
                traced,
                # Found once: an adapter that is inferred takes a while, and warns.
                whole.sites[0].api,
                Spoken(sites),
                **checked.keywords(),
                metric=metric,
                force_model_confidence=force_model_confidence,
                batch_size=batch_size,
                memory_budget=memory_budget,
                progress=progress,
                qk_fix=qk_fix,
                grad_drop=grad_drop,
            )

        screened = screen_by(screening, estimate)
        sweep = whole.only(screened.chosen)

    def opened(some: Sweep, rows: slice) -> Chunk:
        store = some.limits.store
        logits, activations = record(traced, source.rows(rows), some.places, store)
        return open_chunk(some, target.rows(rows), Recorded(activations, both[rows]), logits)

    with evaluating(model):
        # Where all prompts run together, the recorded runs are the unpatched ones too.
        kept = [opened(sweep, slice(0, count))] if sweep.limits.prompts >= count else []
        if kept and kept[0].source_logits is not None:
            logits = kept[0].source_logits, kept[0].run.logits
        else:
            logits = run_baseline(sweep, source), run_baseline(sweep, target)
        context = pairs.context(*logits)
        if force_model_confidence:
            check_confidence(context, prompts)
        baseline = baselines(sweep, context)
        check_denominators(baseline)
        try_out(sweep.metrics, context, baseline)
        if file is not None:
            runs = {"source": source, "target": target}
            file.open(identity(sweep, "activation", runs, context, baseline, {"mask": both}))

        def chunk_of(some: Sweep, rows: slice) -> Chunk:
            # Handed over, not kept: it must not stay in memory beside what is opened later.
            return kept.pop() if kept else opened(some, rows)

        changed = differs_of(source, target) & both.bool().cpu().numpy()
        tally = run_cells(sweep, context, baseline, chunk_of, file, changed=changed)
    if screened is None:
        return outcome(sweep, "activation", "restored", tally, baseline, prompts, both)
    laid = screened.laid(whole, tally, baseline)
    kind = f"activation, screened by {screened.screen.by}"
    found = outcome(
        whole, kind, "restored", laid, baseline, prompts, both, exact=screened.exact(laid)
    )
    return attrs.evolve(found, screening=screened.screening(found))
