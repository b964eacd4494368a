"""Circuits of growing size, each run and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags
from nnpatch_core._models import in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.batch import GivenTokens
from nnpatch_core.circuits.areas import FRACTIONS, areas, areas_of_draws, as_numbers
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.curve import CircuitCurve
from nnpatch_core.circuits.evaluation import check_nodes, check_seed, evaluated
from nnpatch_core.circuits.measured import CIRCUIT
from nnpatch_core.circuits.scored import Scored, Scores, read_scores
from nnpatch_core.edges import Nodes, Setting, open_setting, read_ablated
from nnpatch_core.errors import EdgeError, UnknownNameError
from nnpatch_core.interventions import PairArguments
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import AblationName
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.results import interval_of_figures
from nnpatch_core.sweep import Options

#: The ways to choose that go by a number of edges.
_METHODS = ("greedy", "top")


@in_one_thread
def circuit_curve(
    nnmodel: Any,
    api: Any,
    edges: Scored | Circuit | Mapping[str, float],
    source_tokens: GivenTokens | PromptPairs,
    target_tokens: GivenTokens | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    method: str = "greedy",
    absolute: bool = True,
    swap: bool = False,
    attention_mask: Tensor | None = None,
    source_attention_mask: Tensor | None = None,
    target_attention_mask: Tensor | None = None,
    metric: MetricSpec = "logit_difference",
    metric_data: Mapping[str, Tensor] | None = None,
    source_answer_tokens: Tensor | None = None,
    target_answer_tokens: Tensor | None = None,
    ablation: AblationName | None = None,
    reference: Any = None,
    per_position: bool = False,
    seed: int | None = None,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> CircuitCurve:
    """Choose circuits of growing size by the scores of edges, and see how faithful each is.

    The areas CPR and CMD are those of Mueller et al., "MIB: A Mechanistic Interpretability
    Benchmark" (2025). MIB takes CPR from circuits chosen by value (`absolute=False`), CMD from
    those chosen by size.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        edges: the outcome of `edge_patching`, a `Circuit` with scores, or numbers by edge names.
        source_tokens: as for `evaluate_circuit`, and all other arguments about prompts.
        target_tokens: as for `evaluate_circuit`.
        source_answer_index: as for `evaluate_circuit`.
        target_answer_index: as for `evaluate_circuit`.
        fractions: which shares of all edges the circuits have, before pruning; the whole part of
            fraction x edges counts.
        method: `"greedy"` or `"top"`, as for `Circuit.from_edges`.
        absolute: whether edges are chosen by size, or by value.
        swap: as for `evaluate_circuit`.
        attention_mask: as for `evaluate_circuit`.
        source_attention_mask: as for `evaluate_circuit`.
        target_attention_mask: as for `evaluate_circuit`.
        metric: as for `evaluate_circuit`; the curve is of the first one.
        metric_data: as for `evaluate_circuit`.
        source_answer_tokens: as for `evaluate_circuit`.
        target_answer_tokens: as for `evaluate_circuit`.
        ablation: as for `evaluate_circuit`, and the two arguments about it.
        reference: as for `evaluate_circuit`.
        per_position: as for `evaluate_circuit`.
        seed: of a resample; None is 0.
        batch_size: as for `evaluate_circuit`.
        memory_budget: as for `evaluate_circuit`.
        progress: whether a bar shows the circuits done.
        tokenizer: as for `evaluate_circuit`.

    Returns:
        The `CircuitCurve`, with intervals over prompts where there are several: of each point as
        `evaluate_circuit` has them, and of both areas, which are computed anew of the same draws.

    Raises:
        PatchingError: one of its kinds, before any circuit runs, naming the value that is wrong.
        EdgeError: scores of another model, or fractions that are none.

    Examples:
        >>> from nnpatch_core import edge_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> model, answers = tiny_model(), (torch.tensor([1]), torch.tensor([2]))
        >>> prompts = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> edges = edge_patching(model, None, *prompts, *answers, progress=False)
        >>> curve = circuit_curve(
        ...     model, None, edges, *prompts, *answers, fractions=[0.1, 0.5, 1], progress=False
        ... )
        >>> curve.sizes[-1], round(float(curve.faithfulness[-1]), 4)
        (190, 1.0)
    """
    check_flags(absolute=absolute, swap=swap, per_position=per_position)
    if not isinstance(method, str) or method not in _METHODS:
        raise UnknownNameError(f"unknown method {shown(method)}; there are {', '.join(_METHODS)}")
    shares = as_numbers(fractions, "fractions").tolist()
    if len(shares) < 2 or not all(0 < one <= 1 for one in shares) or sorted({*shares}) != shares:
        raise EdgeError(
            f"fractions must be at least two, increase, and be above 0 and up to 1, got "
            f"{shown(shares)}"
        )
    ablated = read_ablated(ablation, reference, per_position, seed)
    check_seed(seed, ablated, drawn=False, without="a resample")
    setting = open_setting(
        nnmodel,
        api,
        PairArguments(
            source_tokens,
            target_tokens,
            source_answer_index,
            target_answer_index,
            attention_mask,
            source_attention_mask,
            target_attention_mask,
            tokenizer,
            source_answer_tokens=source_answer_tokens,
            target_answer_tokens=target_answer_tokens,
        ),
        ablated,
        metric_data=metric_data,
        swapped=swap,
    )
    options = Options(batch_size, memory_budget, progress, seed=seed)
    return curve_of(setting, edges, shares, method, metric, options, absolute=absolute)


def curve_of(
    setting: Setting,
    edges: Scored | Circuit | Mapping[str, float],
    fractions: Sequence[float],
    method: Any,
    metric: MetricSpec,
    options: Options,
    *,
    absolute: bool,
) -> CircuitCurve:
    """The curve of circuits that are chosen by the scores of edges."""
    nodes = setting.structure.nodes
    scores = _scores(edges, nodes)
    circuits = {
        f"{share:g}": Circuit.from_edges(
            scores, n=int(share * len(nodes) + 1e-9), method=method, absolute=absolute
        )
        for share in fractions
    }
    found = evaluated(setting, circuits, metric, options)
    faithfulness = found.faithfulness.double()
    low = high = torch.full_like(faithfulness, torch.nan)
    ends = [(nan, nan)] * 2
    if found.outcome.count > 1:
        low, high = found.interval()
        around = interval_of_figures(found.outcome, CIRCUIT, areas_of_draws(fractions))
        ends = [(float(one), float(other)) for one, other in zip(*around, strict=True)]
    cpr, cmd = areas(fractions, faithfulness)
    return CircuitCurve(
        fractions=fractions,
        sizes=[len(each) for each in circuits.values()],
        faithfulness=faithfulness,
        low=low,
        high=high,
        circuits=[*circuits.values()],
        cpr=cpr,
        cmd=cmd,
        absolute=absolute,
        info=dict(found.outcome.info),
        cpr_interval=ends[0],
        cmd_interval=ends[1],
    )


def _scores(edges: Any, nodes: Nodes) -> Scores:
    """The scores of all edges of a model.

    Raises:
        EdgeError: they are none, or of another model.
    """
    if isinstance(edges, Circuit):
        if edges.scores is None:
            raise EdgeError("edges must be scored, and a circuit without scores was given")
        found = Scores(edges.nodes, edges.scores, edges.exact, edges.info)
    else:
        by_name = isinstance(edges, Mapping) and not hasattr(edges, "nodes")
        found = read_scores(edges, nodes if by_name else None)
    check_nodes("edges", found.nodes, nodes)
    return found
