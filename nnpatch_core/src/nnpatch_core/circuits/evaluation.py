"""How much of what a model does a circuit does alone."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._arguments import check_flags, listed
from nnpatch_core._html import block, preformatted
from nnpatch_core._integers import strict_int, strict_seed
from nnpatch_core._models import in_one_thread
from nnpatch_core._printable import shown
from nnpatch_core.batch import GivenTokens
from nnpatch_core.circuits.circuit import Circuit
from nnpatch_core.circuits.measured import CIRCUIT, CircuitMeasure
from nnpatch_core.circuits.names import RANDOM, WITHOUT
from nnpatch_core.circuits.reported import facts_of_evaluation, study_of_evaluation
from nnpatch_core.edges import Nodes, Setting, open_setting, read_ablated
from nnpatch_core.errors import EdgeError, PatchingError
from nnpatch_core.interventions import Ablation, PairArguments
from nnpatch_core.memory import MemoryBudget
from nnpatch_core.metrics import MetricSpec
from nnpatch_core.names import AblationName
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.results import Interval, Outcome, in_digits
from nnpatch_core.sweep import Options

if TYPE_CHECKING:
    import pandas

#: What a circuit is called that is given without a name.
_OWN = "circuit"
#: So many random circuits at most.
_MOST = 10_000


@attrs.frozen(eq=False, repr=False)
class CircuitEvaluation(Reports):
    """How faithful circuits are, and the outcome that this is read from.

    Args:
        outcome: the outcome as any sweep has it: its one name is `"circuit"`, as is its axis.
        circuits: the circuits, by name, in the order of the axis.
    """

    outcome: Outcome
    circuits: Mapping[str, Circuit]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the circuits."""
        return tuple(self.circuits)

    @property
    def faithfulness(self) -> Tensor:
        """`[circuits]`: 0 is the run without edges, 1 the source run, which has all."""
        return self.outcome[CIRCUIT]

    @property
    def raw(self) -> Tensor:
        """`[circuits]`: the metric itself, its mean over the prompts."""
        return self.outcome.patched(CIRCUIT).double().mean(-1)

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """The interval of the faithfulness over prompts, `[circuits]` each end."""
        return self.outcome.interval(CIRCUIT, level=level, seed=seed)

    def __getitem__(self, name: str) -> float:
        """The faithfulness of a circuit, by its name."""
        if name not in self.circuits:
            raise EdgeError(f"no circuit {shown(name)} was measured; there are {shown(self.names)}")
        return float(self.faithfulness[self.names.index(name)])

    def __float__(self) -> float:
        """The faithfulness of the first circuit."""
        return float(self.faithfulness[0])

    def minimality(self, name: str | None = None) -> dict[str, float]:
        """For each edge of a circuit the faithfulness that is lost without it, largest first.

        Args:
            name: of the circuit; None is the first.

        Raises:
            EdgeError: it was not asked for, by `minimality=True`.
        """
        name = self.names[0] if name is None else name
        whole, start = self[name], f"{name} without "
        edges = [edge for edge in self.circuits[name] if f"{start}{edge}" in self.circuits]
        found = {edge: whole - self[f"{start}{edge}"] for edge in edges}
        if not found:
            raise EdgeError("no circuit was measured without an edge: pass minimality=True")
        return dict(sorted(found.items(), key=lambda item: -abs(item[1])))

    def to_dataframe(self) -> pandas.DataFrame:
        """A frame with a row for each circuit.

        Raises:
            OutcomeError: pandas is not installed.
        """
        frame = self.outcome.to_dataframe()
        frame.insert(1, "edges", [len(each) for each in self.circuits.values()])
        return frame

    def __str__(self) -> str:
        rows = [["circuit", "edges", "faithfulness"]]
        values, doubts = self.in_words()
        for value, (name, circuit) in zip(values, self.circuits.items(), strict=True):
            rows.append([name, f"{len(circuit):,}", value])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}".rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *doubts])

    def in_words(self, level: float = 0.95) -> tuple[list[str], list[str]]:
        """The faithfulness of each circuit with its interval, and what is to be said of intervals.

        Whoever prints it reads that, and need not be warned.
        """
        values = [in_digits(each) for each in self.faithfulness.tolist()]
        if self.outcome.count == 1:
            return values, []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            low, high = (end.tolist() for end in self.interval(level))
        ends = [
            f"[{in_digits(one)}, {in_digits(other)}]" for one, other in zip(low, high, strict=True)
        ]
        told = dict.fromkeys(str(each.message) for each in caught)
        return [" ".join(each) for each in zip(values, ends, strict=True)], [*told]

    def __repr__(self) -> str:
        return (
            f"CircuitEvaluation({len(self.circuits)} circuits, {self.names[0]}: {float(self):.3g})"
        )

    def _repr_html_(self) -> str:
        return block(preformatted(str(self)))

    def _study(self, level: float) -> Study:
        return study_of_evaluation(self, level)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of_evaluation(self, width, level)


@in_one_thread
def evaluate_circuit(
    nnmodel: Any,
    api: Any,
    circuit: Circuit | Sequence[Circuit] | Mapping[str, Circuit],
    source_tokens: GivenTokens | PromptPairs,
    target_tokens: GivenTokens | None = None,
    source_answer_index: Tensor | None = None,
    target_answer_index: Tensor | None = None,
    *,
    swap: bool = False,
    complement: bool = False,
    random: int = 0,
    minimality: bool = False,
    seed: int | None = None,
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
    batch_size: int | None = None,
    memory_budget: MemoryBudget = None,
    progress: bool = True,
    tokenizer: Any = None,
) -> CircuitEvaluation:
    """Run circuits alone, and see how much of the model's behaviour is left.

    A run is made on the source prompts, in which the edges of the circuit carry what this very run
    computes, and all other edges what the target run has. With all edges it is the source run, with
    none the target run. Faithfulness is (mean of the circuit - mean of none) / (mean of all - mean
    of none), as Hanna et al. define it, "Have Faith in Faithfulness" (2024). What the heads of a
    layer send to one receiver goes together through the output projection, and a norm behind it.

    Args:
        nnmodel: the model, as for `activation_patching`.
        api: an adapter, its name, or None to find it by the model.
        circuit: a `Circuit`, a list of them, or several by name.
        source_tokens: `[batch, seq]`, on which circuits run; or a `PromptPairs`, which stands for
            all arguments about the prompts. The prompts of a pair must have one length.
        target_tokens: the same, what edges outside of the circuit carry.
        source_answer_index: `[batch]`, the token that each source prompt calls for.
        target_answer_index: `[batch]`, the token that each target prompt calls for.
        swap: whether source and target prompts change places, and answers stay: then the circuit
            runs on the target prompts (noising).
        complement: whether each circuit's complement is run too, `"all without ..."`: what is left
            of the model without the circuit. Low faithfulness there means that it is necessary.
        random: how many random circuits of as many edges are run beside each, up to 10,000.
        minimality: whether each circuit is run without each of its edges in turn.
        seed: of the random ones; None is 0.
        attention_mask: `[batch, seq]`, 1 for a token and 0 for padding, of both runs.
        source_attention_mask: the same, of the source run.
        target_attention_mask: the same, of the target run.
        metric: a metric's name, a callable, or several; see `nnpatch_core.metrics`. All runs are of
            the source prompts: one that goes by tokens, such as `"loss"`, goes by these. With
            several, faithfulness is that of the first.
        metric_data: what metrics are to know of each prompt.
        source_answer_tokens: `[batch, n]`, all tokens of the source prompts' answers.
        target_answer_tokens: the same of the target prompts.
        ablation: what edges outside of the circuit carry in place of the target run's: `"zero"`,
            `"mean"` or `"resample"`, as in `ablation_patching`.
        reference: a data set for the mean, or to resample from; None is the target prompts.
        per_position: whether each position has a mean of its own.
        batch_size: how many prompts run together, at most; None is as many as fit in memory.
        memory_budget: bytes that may be used besides the model's weights; None is half of what is
            free on the device.
        progress: whether a bar shows the circuits done.
        tokenizer: gives the outcome its token strings.

    Returns:
        The `CircuitEvaluation`.

    Raises:
        PatchingError: one of its kinds, before any circuit runs, naming the value that is wrong.
        EdgeError: something that is no circuit, or one of another model.
        EngineError: the model's layers cannot be called by themselves, or do not add to a stream.

    Examples:
        >>> import torch
        >>> from nnpatch_core import edge_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> model, answers = tiny_model(), (torch.tensor([1]), torch.tensor([2]))
        >>> prompts = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> edges = edge_patching(model, None, *prompts, *answers, progress=False)
        >>> circuit = Circuit.from_edges(edges, n=40)
        >>> found = evaluate_circuit(
        ...     model, None, {"some": circuit, "all": Circuit.of(edges.nodes, edges)},
        ...     *prompts, *answers, progress=False,
        ... )
        >>> round(found["all"], 4)
        1.0
    """
    check_flags(swap=swap, complement=complement, minimality=minimality, per_position=per_position)
    count = strict_int(random, "random", PatchingError)
    if not 0 <= count <= _MOST:
        raise PatchingError(f"random must be from 0 to {_MOST}, got {count}")
    ablated = read_ablated(ablation, reference, per_position, seed)
    check_seed(seed, ablated, drawn=bool(count), without="random= or a resample")
    given = named_circuits(circuit)
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
    for name, own in given.items():
        check_nodes(name, own.nodes, setting.structure.nodes)
    every = dict(given)
    for name, own in given.items():
        if complement:
            whole = torch.from_numpy(own.nodes.mask)
            _put(every, {f"{WITHOUT}{name}": _edges(own, whole & ~own.kept)})
        if count:
            _put(every, _random(name, own, count, strict_seed(seed)))
        if minimality:
            _put(every, _without_each(name, own))
    options = Options(batch_size, memory_budget, progress, seed=seed)
    return evaluated(setting, every, metric, options)


def evaluated(
    setting: Setting, circuits: Mapping[str, Circuit], metric: MetricSpec, options: Options
) -> CircuitEvaluation:
    """Circuits by name, run and measured."""
    outcome = CircuitMeasure(setting, metric, options).outcome(circuits)
    return CircuitEvaluation(outcome, dict(circuits))


def named_circuits(given: Any) -> dict[str, Circuit]:
    """The circuits that an argument names, each with a name.

    Raises:
        EdgeError: it is none.
    """
    if isinstance(given, Circuit):
        return {_OWN: given}
    if isinstance(given, PromptPairs):
        raise EdgeError("circuit is a PromptPairs: the circuit comes before the prompts")
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        several = listed(given)
        if several is None or isinstance(given, str):
            raise EdgeError(f"circuit must be a Circuit, or several, got {shown(given)}")
        named = {f"{_OWN} {number}": each for number, each in enumerate(several)}
    for name, each in named.items():
        if not isinstance(name, str) or not isinstance(each, Circuit):
            raise EdgeError(
                f"circuits must be Circuit objects by name, got {shown(name)}: {shown(each)}; "
                "Circuit.from_edges and Circuit.of make one"
            )
    if not named:
        raise EdgeError("there is no circuit: give at least one")
    return named


def check_nodes(name: str, own: Nodes, nodes: Nodes) -> None:
    """Raise `EdgeError` for a circuit, or edges, of another model."""
    if own == nodes:
        return
    sizes = [f"{each.n_layers} layers, {len(each):,} edges" for each in (own, nodes)]
    told = sizes if sizes[0] != sizes[1] else [repr(own), repr(nodes)]
    raise EdgeError(f"{name}: of a model of {told[0]}, and this model has {told[1]}")


def check_seed(seed: Any, ablation: Ablation | None, *, drawn: bool, without: str) -> None:
    """Raise `PatchingError` for a seed of nothing.

    Args:
        seed: as it was given.
        ablation: what edges outside of a circuit carry.
        drawn: whether something else is drawn.
        without: what would be.
    """
    if seed is not None and not drawn and (ablation is None or ablation.drawn is None):
        raise PatchingError(f"seed={shown(seed)} means nothing without {without}")


def _put(circuits: dict[str, Circuit], more: Mapping[str, Circuit]) -> None:
    twice = next((name for name in more if name in circuits), None)
    if twice is not None:
        raise EdgeError(
            f"{shown(twice)} is the name of one circuit, and of one that is made of another: give "
            "them other names"
        )
    circuits.update(more)


def _random(name: str, circuit: Circuit, count: int, seed: int) -> dict[str, Circuit]:
    """Random circuits of as many edges as another."""
    edges = torch.from_numpy(circuit.nodes.mask).nonzero()
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(count):
        chosen = edges[torch.randperm(len(edges), generator=draw, device="cpu")[: len(circuit)]]
        kept = torch.zeros_like(circuit.kept)
        kept[tuple(chosen.T)] = True
        found[f"{RANDOM}{name} {number}"] = _edges(circuit, kept)
    return found


def _without_each(name: str, circuit: Circuit) -> dict[str, Circuit]:
    """A circuit without each of its edges in turn."""
    found = {}
    for place, edge in zip(circuit.kept.nonzero().tolist(), circuit, strict=True):
        kept = circuit.kept.clone()
        kept[tuple(place)] = False
        found[f"{name} without {edge}"] = _edges(circuit, kept)
    return found


def _edges(circuit: Circuit, kept: Tensor) -> Circuit:
    """Other edges of the same nodes; scores are left out, as there may be many circuits."""
    return Circuit(circuit.nodes, kept)
