"""From prompts to a circuit in one call: estimate, verify, choose, prune, and say how sure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import attrs

from nnpatch_core._arguments import check_flags
from nnpatch_core._html import block, preformatted
from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core._models import in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.evaluation import CircuitEvaluation, evaluate_circuit
from nnpatch_core.circuits.measured import CIRCUIT, CircuitMeasure
from nnpatch_core.circuits.names import RANDOM, WITHOUT
from nnpatch_core.circuits.reported import facts_of_found, study_of_found
from nnpatch_core.circuits.shrinking import (
    ROUNDING,
    Search,
    Step,
    as_acdc,
    is_faithful,
    smallest,
    without_blocks,
)
from nnpatch_core.edges import EDGE_METHODS, EdgeOutcome, open_setting, read_ablated
from nnpatch_core.errors import PatchingError, TokensError, UnknownNameError
from nnpatch_core.interventions import PairArguments, Remembered
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import AblationName
from nnpatch_core.patching import edge_patching
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.results import in_digits
from nnpatch_core.sweep import Options, make_bar

PruneMethod: TypeAlias = Literal["blocks", "acdc"]
#: Circuits of the ranking that are tried: so many edges, and up to all of them.
_SIZES = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
#: How many random circuits are run beside the one that was found.
_RANDOM = 5


@attrs.frozen(eq=False, repr=False)
class FoundCircuit(Reports):
    """A circuit that was found, how faithful it is, and the cost of finding it.

    Args:
        circuit: the circuit, with the scores of all edges.
        edges: the scores: measured for the strongest edges, estimated for the others.
        evaluation: of the circuit, of all edges but its own, and of random ones of its size.
        steps: the circuits that were run on the way.
        goal: how faithful it was to be.
        evaluations: how many circuits might be run on the way.
        cost: seconds by stage.
    """

    circuit: Circuit
    edges: EdgeOutcome
    evaluation: CircuitEvaluation
    steps: tuple[Step, ...]
    goal: float
    evaluations: int
    cost: dict[str, float]

    @property
    def faithfulness(self) -> float:
        """Of the circuit: 0 is the run without edges, 1 the source run."""
        return self.evaluation[CIRCUIT]

    @property
    def reached(self) -> bool:
        """Whether it is as faithful as it was to be."""
        # Once more by rounding: it was run beside others.
        return is_faithful(self.faithfulness, self.goal - ROUNDING)

    def __str__(self) -> str:
        found, whole = self.evaluation, len(self.circuit.nodes)
        words = "" if self.reached else ": no circuit that was run is faithful enough"
        if words and any(is_faithful(step.faithfulness, self.goal) for step in self.steps):
            words = ": pruning has made it less faithful than was asked for"
        random = [name for name in found.names if name.startswith(RANDOM)]
        (value, *_), doubts = found.in_words()
        # As good as nothing is 0, whatever its rounding.
        values = [
            value if abs(value) > ROUNDING else 0.0 for value in map(found.__getitem__, random)
        ]
        others = ", ".join(map(in_digits, values))
        exact = int(self.edges.outcome.cells["edge"].exact.sum())
        others_too = "" if exact == whole else f", the others estimated ({self.edges.outcome.kind})"
        all_of_them = (
            ", as many as evaluations= allows" if len(self.steps) == self.evaluations else ""
        )
        cost = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.cost.items())
        lines = {
            "circuit": f"{len(self.circuit):,} of {whole:,} edges, "
            f"{len(self.circuit.nodes_in_it):,} nodes{words}",
            "faithfulness": f"{value}, where {in_digits(self.goal)} was asked for",
            "without it": f"{in_digits(found[f'{WITHOUT}{CIRCUIT}'])} is left",
            "random": f"{others} with as many edges",
            "edges": f"{exact:,} of {whole:,} exact{others_too}",
            "runs": f"{len(self.steps)} circuits{all_of_them}, in {found.outcome.count} prompts",
            "seconds": cost,
        }
        width = max(map(len, lines))
        return "\n".join([*(f"{name:<{width}}  {text}" for name, text in lines.items()), *doubts])

    def __repr__(self) -> str:
        return f"FoundCircuit({len(self.circuit):,} edges, faithfulness {self.faithfulness:.3g})"

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def _study(self, level: float) -> Study:
        return study_of_found(self, level)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of_found(self, width, level)


@in_one_thread
def find_circuit(
    nnmodel: Any,
    api: Any,
    pairs: PromptPairs,
    faithfulness: float = 0.9,
    *,
    method: str = "eap-ig-inputs",
    steps: int | None = None,
    top_k: int = 1000,
    prune: PruneMethod | None = "blocks",
    threshold: float | None = None,
    evaluations: int = 150,
    metric: MetricSpec = "logit_difference",
    ablation: AblationName | None = None,
    reference: Any = None,
    per_position: bool = False,
    seed: int | None = None,
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    progress: bool = True,
) -> FoundCircuit:
    """Find a small circuit that does what the model does on some pairs of prompts.

    It estimates all edges, measures the strongest of them exactly, takes the smallest circuit of
    that ranking that is faithful, and drops what it does without, as runs tell. The circuit is then
    run beside its complement and random circuits of its size.

    A circuit is faithful enough if `1 - |1 - faithfulness|` reaches the goal: one that overshoots,
    because it lacks what works against the answer, is no better than one that falls short.

    The pairs that it is chosen by are those that it is measured on. Measure it on others, by
    `evaluate_circuit`, before you say that it generalises.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        pairs: the prompts; those of a pair must have one length.
        faithfulness: the goal, above 0 and up to 1.
        method: the estimate, one of those of `edge_patching`.
        steps: points on the way of an estimate that integrates; None is 5.
        top_k: how many edges are measured exactly; 0 takes the estimate alone.
        prune: `"blocks"` drops edges in blocks, from the weakest on, down to single ones;
            `"acdc"` drops each edge whose loss changes the faithfulness by less than `threshold`,
            from the logits down, which takes a run for each edge; None drops none.
        threshold: for `"acdc"`; None is 0.01.
        evaluations: how many circuits may be run, at most.
        metric: a metric's name, or a callable; of several the first counts.
        ablation: what edges outside of the circuit carry in place of the target run's; see
            `evaluate_circuit`.
        reference: a data set for the mean, or to resample from.
        per_position: whether each position has a mean of its own.
        seed: of what is drawn; None is 0.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that may be used besides the model's weights.
        progress: whether bars show what is done.

    Returns:
        The `FoundCircuit`; printed, it says how large, how faithful and how dear it is.

    Raises:
        PatchingError: one of its kinds, before anything runs, naming the value that is wrong.

    Examples:
        >>> from nnpatch_core.testing import tiny_model, tiny_tokenizer
        >>> words = [" red", " blue", " green", " black"]
        >>> others = words[1:] + words[:1]
        >>> pairs = PromptPairs.from_texts(words, others, words, others, tiny_tokenizer(words))
        >>> found = find_circuit(tiny_model(), None, pairs, top_k=20, progress=False)
        >>> found.reached
        True
    """
    check_flags(per_position=per_position, progress=progress)
    goal = _goal(faithfulness)
    least = _threshold(prune, threshold)
    count = _checked("top_k", top_k, 0)
    most = _checked("evaluations", evaluations, 1)
    if not isinstance(method, str) or method not in EDGE_METHODS:
        raise UnknownNameError(
            f"unknown method {shown(method)}; there are {', '.join(EDGE_METHODS)}"
        )
    if not isinstance(pairs, PromptPairs):
        raise TokensError(f"pairs must be a PromptPairs, got {shown(pairs)}")
    strict_seed(seed)
    cost = _Cost()
    reference = _several_times(reference, ablation, per_position)
    given = read_ablated(ablation, reference, per_position, seed)
    setting = open_setting(nnmodel, api, PairArguments(pairs, None), given)
    # The circuits' own checks come first: a sweep of edges takes its time.
    measure = CircuitMeasure(setting, metric, Options(batch_size, memory_budget, seed=seed))
    total = len(setting.structure.nodes)
    edges: EdgeOutcome = edge_patching(
        nnmodel,
        setting.api,
        pairs,
        method=method,  # type: ignore[arg-type]
        steps=steps,
        top_k=min(count, total) or None,
        spot_checks=0 if count else None,
        ablation=ablation,
        reference=reference,
        per_position=per_position,
        seed=seed if count or (given is not None and given.drawn is not None) else None,
        metric=metric,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=progress,
    )
    cost.note("edges")
    with make_bar(most, progress, desc="circuits") as bar:

        def run(circuit: Circuit) -> float:
            (value,) = measure.faithfulness([circuit])
            bar.update(1)
            return value

        search = Search(run, goal, most)
        sizes = [*(size for size in _SIZES if size < total), total]

        def choose(size: int) -> Circuit:
            if size == total:
                return Circuit.from_edges(edges, n=total, method="top", pruned=False)
            return Circuit.from_edges(edges, n=size, method="greedy")

        circuit = smallest(search, choose, sizes)
        cost.note("size")
        if prune == "acdc":
            circuit = as_acdc(search, circuit, least)
        elif prune == "blocks" and search.reaches(search.run("prune", circuit)):
            circuit = without_blocks(search, circuit, edges.matrix)
        cost.note("prune")
    evaluation = evaluate_circuit(
        nnmodel,
        setting.api,
        circuit,
        pairs,
        complement=True,
        random=_RANDOM,
        seed=seed,
        metric=metric,
        ablation=ablation,
        reference=reference,
        per_position=per_position,
        batch_size=batch_size,
        memory_budget=memory_budget,
        progress=False,
    )
    cost.note("evaluation")
    info = {**circuit.info, "faithfulness": f"{float(evaluation):.6g}", "goal": f"{goal:g}"}
    return FoundCircuit(
        attrs.evolve(circuit, info=info),
        edges,
        evaluation,
        tuple(search.steps),
        goal,
        most,
        cost.seconds,
    )


@attrs.define
class _Cost:
    """Seconds by stage."""

    seconds: dict[str, float] = attrs.field(factory=dict)
    since: float = attrs.field(factory=time.monotonic)

    def note(self, stage: str) -> None:
        """The time since the last stage was this stage's."""
        now = time.monotonic()
        self.seconds[stage], self.since = now - self.since, now


def _several_times(reference: Any, ablation: Any, per_position: Any) -> Any:
    """A data set that several sweeps read, whose mean is made once, and which may be a stream."""
    averaged = isinstance(ablation, str) and ablation == "mean" and not per_position
    if reference is not None and averaged:
        return Remembered(reference)
    return list(reference) if isinstance(reference, Iterator) else reference


def _goal(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise PatchingError(f"faithfulness must be above 0 and up to 1, got {shown(value)}")
    return float(value)


def _threshold(prune: Any, value: Any) -> float:
    methods = get_args(PruneMethod)
    if prune is not None and (not isinstance(prune, str) or prune not in methods):
        raise UnknownNameError(
            f"unknown prune {shown(prune)}; there are {', '.join(methods)} and None"
        )
    if value is None:
        return 0.01
    if prune != "acdc":
        raise PatchingError(f"threshold={shown(value)} means nothing with prune={shown(prune)}")
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise PatchingError(f"threshold must be a number from 0 on, got {shown(value)}")
    return float(value)


def _checked(name: str, value: Any, least: int) -> int:
    number = strict_int(value, name, PatchingError)
    if number < least:
        raise PatchingError(f"{name} must be at least {least}, got {number}")
    return number
