"""Edge patching: what one node adds to the stream, as another alone reads it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._garbage import collecting_later
from nnpatch_core._integers import strict_int
from nnpatch_core._models import in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.batch import GivenTokens
from nnpatch_core.edges import (
    BOTH,
    EDGE_METHODS,
    EXACT,
    EdgeOutcome,
    EdgePut,
    EdgeSites,
    Estimate,
    Nodes,
    estimate_edges,
    fitting_prompts,
    open_setting,
    read_ablated,
)
from nnpatch_core.engine import check_engine, choose_engines
from nnpatch_core.errors import EdgeError, PatchingError, PositionError, UnknownNameError
from nnpatch_core.interventions import PairArguments, PairRuns
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import AblationName, EdgeMethodName, EngineName, SeqPosName
from nnpatch_core.patching.elsewhere import on_workers
from nnpatch_core.patching.screen import ScreenOptions, check_screen, measure_chosen
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import Outcome
from nnpatch_core.seq_pos import PlacedSeqPos, PromptBatch, SeqPos, Span
from nnpatch_core.sites import strategy_of
from nnpatch_core.sweep import (
    Checkpoint,
    Options,
    Sweep,
    budget_of,
    measure_sweep,
    prepare,
    warn_of_chunks,
)

#: Points on a path from the target run to the source run, where nothing else is asked for.
EDGE_STEPS = 5


@on_workers
@in_one_thread
def edge_patching(
    nnmodel: Any,
    api: Any,
    source_tokens: GivenTokens | PromptPairs,
    target_tokens: GivenTokens | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    method: EdgeMethodName = "exact",
    senders: Sequence[str] | str | None = None,
    receivers: Sequence[str] | str | None = None,
    seq_pos_type: SeqPosName | str | SeqPos | PlacedSeqPos | None = None,
    seq_pos: Any = None,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    spans: Mapping[str, Span] | None = None,
    metric: MetricSpec = "logit_difference",
    metric_data: Mapping[str, Tensor] | None = None,
    source_answer_tokens: Tensor | None = None,
    target_answer_tokens: Tensor | None = None,
    force_model_confidence: bool = False,
    ablation: AblationName | None = None,
    reference: Any = None,
    per_position: bool = False,
    steps: int | None = None,
    top_k: int | None = None,
    spot_checks: int | None = None,
    seed: int | None = None,
    engine: EngineName = "auto",
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> EdgeOutcome:
    """Measure, or estimate, each edge of the model: a sender's change, read by one receiver alone.

    Senders are the `input`, each head `a{layer}.h{head}` and each MLP `m{layer}`. Receivers are
    each head's queries, `a{layer}.h{head}<q>`, each key/value head's keys `<k>` and values `<v>`,
    each MLP, and the `logits`. The value of `"a0.h1->m3"` is what comes of it if MLP 3 reads the
    stream with the change that head 1 of layer 0 would make, were its activation that of the source
    run; nothing else reads that change. So an edge is a path of two nodes, as in Goldowsky-Dill et
    al., "Localizing Model Behavior with Path Patching" (2023).

    A head's change is taken as it is added to the stream: behind the output projection, and behind
    a norm after it, of all heads of the layer together.

    `method="exact"` measures. The other methods estimate all edges from a few gradients:

    - `"eap"`: the gradient in the target run; Syed et al., "Attribution Patching Outperforms
      Automated Circuit Discovery" (2023). Two forwards and a backward.
    - `"eap-ig-inputs"`: the mean of the gradients in runs whose embeddings lie between those of
      target and source run, and `"eap-ig-activations"`: those in which each sender's layer does;
      Hanna et al., "Have Faith in Faithfulness" (2024).
    - `"clean-corrupted"`: the mean of the gradients in both runs.

    With `top_k=` the estimate chooses: as many edges are measured, and some others at random, which
    bound what was missed (`edges.outcome.screening`). `edges.exact` says which were.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        api: an adapter (class or instance), its registered name, or None to find it by the model.
        source_tokens: `[batch, seq]`, where activations are taken, or a tokenizer's output; or a
            `PromptPairs`, which stands for all arguments about the prompts.
        target_tokens: the same, where edges are patched.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        method: `"exact"` or one of the estimates.
        senders: the names of those that are swept, or one; None is all.
        receivers: the same.
        seq_pos_type: where a sender is changed, as for `Sites`: one group of positions at a time;
            None is everywhere at once.
        seq_pos: what the strategy takes.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        spans: parts of the prompts by name; a `PromptPairs` brings its own.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`.
        metric_data: what metrics are to know of each prompt.
        source_answer_tokens: `[batch, n]`, all tokens of the source prompts' answers.
        target_answer_tokens: the same of the target prompts.
        force_model_confidence: raise unless each run prefers its own answer for every prompt.
        ablation: what senders get in place of the source run's activations: `"zero"`, `"mean"` or
            `"resample"`, as in `ablation_patching`. Values stay on the scale of the two runs.
        reference: a data set for the mean, or to resample from; None is the target prompts.
        per_position: whether each position has a mean of its own.
        steps: points on the way from the target run to the source run, of the two that integrate;
            None is 5.
        top_k: how many edges are measured of those that an estimate has chosen.
        spot_checks: how many of the others, at random; None is as many as `top_k`.
        seed: of what is drawn; None is 0.
        engine: `"cone"` computes for each edge only what it can reach, `"full"` runs a whole
            forward for each; `"auto"` is the first where adapter and model allow it.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that may be used besides the model's weights, or a string such as
            `"4 GiB"`; None is half of what is free. Of each device, where the model lies on
            several; or sizes by device, as `{"cuda:0": "4 GiB", "cuda:1": "9 GiB"}`.
        checkpoint: a file that is kept up to date with what was measured, or estimated where
            nothing is measured.
        progress: whether a bar shows the edges done.
        tokenizer: gives the outcome its token strings.

    Returns:
        The `EdgeOutcome`: edge name to value.

    Raises:
        PatchingError: one of its kinds, before any sweep runs, naming the value that is wrong.
        EdgeError: a sender or receiver that the model does not have, or no edge between them.
        AdapterError: the adapter lacks the components of a layer that edges go by.
        EngineError: the model's layers cannot be called by themselves, or do not add to a stream.
        GradientError: no gradient flows through the model, and an estimate was asked for.

    Examples:
        >>> import torch
        >>> from nnpatch_core.testing import tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> edges = edge_patching(
        ...     tiny_model(), None, source, target, torch.tensor([1]), torch.tensor([2]),
        ...     senders=["a0.h1", "m0"], progress=False,
        ... )
        >>> len(edges), edges.matrix.shape
        (39, torch.Size([16, 28]))
    """
    check_flags(force_model_confidence=force_model_confidence, per_position=per_position)
    check_engine(engine)
    how = _method(method, steps)
    resampled = isinstance(ablation, str) and ablation == "resample"
    screen = _screen(how, top_k, spot_checks, None if resampled else seed)
    if seed is not None and not resampled and screen is None:
        raise PatchingError(f"seed={shown(seed)} means nothing without top_k= or a resample")
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
    given = read_ablated(ablation, reference, per_position, seed)
    if given is not None and method == BOTH:
        raise PatchingError(
            f"method={method!r} takes gradients in the target and in the source run, and with "
            f"ablation={ablation!r} senders get nothing of the source run: take 'eap' or another "
            "estimate"
        )
    strategy = None
    if seq_pos_type is not None or seq_pos is not None:
        strategy = strategy_of(seq_pos_type, seq_pos)
    setting = open_setting(
        nnmodel,
        api,
        arguments,
        given,
        metric_data=metric_data,
        confident=force_model_confidence,
    )
    traced, adapter, runs = setting.nnmodel, setting.api, setting.runs
    # Nodes have their names before it is known which of them stand side by side.
    sites = EdgeSites(
        setting.likely,
        _numbers("senders", senders, setting.likely),
        _numbers("receivers", receivers, setting.likely),
        strategy,
        apart=given is not None,
    )
    sites.check()
    file = None if checkpoint is None else Checkpoint(checkpoint)
    drawn = None if screen is None else screen.seed
    options = fitting_prompts(
        traced,
        runs.target,
        Options(batch_size, budget_of(file, memory_budget), progress, seed=drawn),
        layers=setting.api.layers,
        estimated=None if how is None else sites,
        told=memory_budget is not None,
    )
    ablated = setting.given(options)
    prompts = PromptBatch(runs.target, runs.source, runs.spans)
    if ablated is not None and ablated.by_place and sites.by_prompt(prompts):
        raise PositionError(
            f"with ablation={ablation!r}{' and per_position=True' * per_position} a sender gets "
            "activations of its own position from the end, and seq_pos names positions of each "
            "prompt, which need not go together: name the same ones for all prompts, or take "
            "ablation='zero' or 'mean'"
        )
    told = "edge" if given is None else f"edge (ablation {given.method})"
    runs = attrs.evolve(runs, kind=told, shifted=sites.shifted(prompts))
    with warnings.catch_warnings(action="ignore"):
        # One edge tells what is wrong with a call. Only then some tokens are run, to find out how
        # the layers are built.
        one, _ = prepare(traced, adapter, sites.one(), runs, metric, options, gathers=how is None)
        measured = how is None or screen is not None
        if measured:
            choose_engines(engine, one.patches)
    structure = setting.built(alone=measured)
    sites = attrs.evolve(sites, nodes=structure.nodes)
    sites.check()
    put = EdgePut(adapter, structure, ablated)
    runs = attrs.evolve(runs, put=put)
    with collecting_later():
        sweep, runs = prepare(traced, adapter, sites, runs, metric, options, gathers=how is None)
    warn_of_chunks(sweep, sweep.chunks)
    outcome = _swept(sweep, runs, put, how, screen, engine, file)
    return EdgeOutcome.of(outcome, structure.nodes)


def _swept(
    sweep: Sweep,
    runs: PairRuns,
    put: EdgePut,
    how: Estimate | None,
    screen: ScreenOptions | None,
    engine: str,
    file: Checkpoint | None,
) -> Outcome:
    if how is None:
        return measure_sweep(sweep, runs, choose_engines(engine, sweep.patches), file)
    if screen is None:
        return estimate_edges(sweep, runs, put, how, file)
    estimated = estimate_edges(sweep, runs, put, how)
    choice = choose_engines(engine, sweep.patches)
    return measure_chosen(screen, estimated, estimated, sweep, runs, choice, file)


def _method(method: Any, steps: Any) -> Estimate | None:
    """The estimate that arguments ask for; None if edges are measured."""
    names = (EXACT, *EDGE_METHODS)
    if not isinstance(method, str) or method not in names:
        raise UnknownNameError(f"unknown method {shown(method)}; there are {', '.join(names)}")
    if steps is not None:
        if "-ig-" not in method:
            raise PatchingError(f"steps={shown(steps)} means nothing with method={method!r}")
        if not 1 <= strict_int(steps, "steps", PatchingError) < 2**31:
            raise PatchingError(f"steps must be at least 1, and not beyond 2**31, got {steps}")
    return None if method == EXACT else Estimate(method, EDGE_STEPS if steps is None else steps)


def _screen(how: Estimate | None, top_k: Any, spot_checks: Any, seed: Any) -> ScreenOptions | None:
    if how is None:
        for name, value in (("top_k", top_k), ("spot_checks", spot_checks)):
            if value is not None:
                raise PatchingError(
                    f"{name}={shown(value)} means nothing with method='exact', which measures all "
                    "edges: name the estimate that chooses, as method='eap'"
                )
        return None
    if top_k is None:
        if spot_checks is not None:
            raise PatchingError(f"spot_checks={shown(spot_checks)} means nothing without top_k=")
        return None
    options = check_screen("attribution", top_k, spot_checks, seed)
    assert options is not None
    return attrs.evolve(options, by=how.words)


def _numbers(argument: str, given: Any, nodes: Nodes) -> list[int]:
    """The numbers of the nodes that an argument names, each once, in their order."""
    sending = argument == "senders"
    if given is None:
        return [*range(len(nodes.senders if sending else nodes.receivers))]
    names = (given,) if isinstance(given, str) else listed(given)
    if not names:
        raise EdgeError(f"{argument} must be names of nodes, or a single name, got {shown(given)}")
    return sorted({nodes.sender(name) if sending else nodes.receiver(name) for name in names})
