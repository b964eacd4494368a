"""`find_circuit`: the goal, how it is reached, what it costs, and what it says."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import PromptPairs, edge_patching
from nnpatch_core.circuits import Circuit, CircuitEvaluation, evaluate_circuit, find_circuit
from nnpatch_core.circuits.measured import CircuitMeasure
from nnpatch_core.circuits.shrinking import Search, as_acdc, smallest, without_blocks
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import PatchingError, TokensError, UnknownNameError
from nnpatch_core.patching import edge
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.planted_cases import EACH, planted
from tests.helpers.planted_circuits import PLANTED

MODEL, API = tiny_model("llama", num_hidden_layers=2), tiny_api()
EDGES = Nodes((4,) * 2, (2,) * 2, (False,) * 2)
COUNT = len(EDGES)
#: All of one length.
WORDS = ["red blue green", "blue green red", "green red blue", "black green red"]
ANSWERS = [" red", " blue", " green", " black"]
OTHERS = [*ANSWERS[1:], ANSWERS[0]]
PAIRS = PromptPairs.from_texts(
    WORDS,
    ["red black green", "blue red red", "green green blue", "black green blue"],
    ANSWERS,
    OTHERS,
    tiny_tokenizer([*WORDS, *ANSWERS]),
)
QUICK = {"method": "eap", "top_k": 20, "evaluations": 40, "progress": False}


def found(**options: Any) -> Any:
    given = {"nnmodel": MODEL, "api": API, "pairs": PAIRS, **QUICK, **options}
    return find_circuit(**given)


@functools.cache
def usual() -> Any:
    return found()


# What it finds.


@pytest.mark.parametrize("goal", [0.5, 0.8, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("prune", ["blocks", "acdc", None])
def test_the_goal_is_reached(goal: float, prune: Any) -> None:
    circuit = found(faithfulness=goal, prune=prune)
    alone = evaluate_circuit(MODEL, API, circuit.circuit, PAIRS, progress=False)
    assert circuit.faithfulness == pytest.approx(float(alone), abs=1e-4)
    if prune != "acdc":
        assert circuit.reached
    assert circuit.reached == (1 - abs(1 - circuit.faithfulness) >= goal - 2e-5)
    assert circuit.circuit == circuit.circuit.pruned()
    assert circuit.goal == goal
    assert len(circuit.circuit) <= COUNT


def test_a_higher_goal_takes_more_edges() -> None:
    few, more = (found(faithfulness=goal, prune=None) for goal in (0.5, 0.99))
    assert len(few.circuit) < len(more.circuit)


def test_dropping_makes_it_smaller() -> None:
    sizes = {prune: len(found(prune=prune).circuit) for prune in ("blocks", None)}
    assert sizes["blocks"] < sizes[None]


def paired(name: str) -> PromptPairs:
    circuit = planted(name)
    source, target = circuit.source_tokens, circuit.target_tokens
    answers = circuit.source_answer_index, circuit.target_answer_index
    ones = torch.ones_like(source)
    nobody: Any = (None,) * len(source)
    return PromptPairs(nobody, (), source, target, ones, ones, *answers, tokenizer=None)


#: Both paths of an OR are found, which no single edge shows: the circuit that is needed is larger
#: than that of the edges that are worth something alone.
MECHANISM = {name: name for name in PLANTED} | {"redundant, no leak": "redundant"}


@EACH
@pytest.mark.parametrize(
    "options",
    [{}, {"prune": "acdc"}, {"method": "eap"}, {"top_k": 0}],
    ids=["usual", "acdc", "by eap", "by the estimate alone"],
)
def test_planted_circuits_are_recovered(name: str, options: dict[str, Any]) -> None:
    pairs = paired(name)
    circuit = find_circuit(planted(name).model, None, pairs, 0.98, **{"progress": False, **options})
    known = planted(MECHANISM[name]).edges
    assert set(circuit.circuit) == known
    assert circuit.reached
    assert circuit.evaluation["all without circuit"] == pytest.approx(0, abs=1e-4)


# How it gets there.


@pytest.mark.parametrize("most", [1, 2, 5, 9])
@pytest.mark.parametrize("prune", ["blocks", "acdc", None])
def test_no_more_circuits_are_run_than_are_allowed(
    most: int, prune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = CircuitMeasure.faithfulness

    def spy(self: CircuitMeasure, circuits: Sequence[Circuit]) -> list[float]:
        runs.append(len(circuits))
        return real(self, circuits)

    monkeypatch.setattr(CircuitMeasure, "faithfulness", spy)
    circuit = found(evaluations=most, prune=prune)
    assert sum(runs) == len(circuit.steps) <= most
    if not any(1 - abs(1 - step.faithfulness) > 0.9 for step in circuit.steps):
        assert "no circuit that was run is faithful enough" in str(circuit)
    if len(circuit.steps) == most:
        assert f"{most} circuits, as many as evaluations= allows, in 4 prompts" in str(circuit)


def test_a_goal_that_was_not_reached_is_said() -> None:
    """The one that comes closest is given."""
    circuit = found(faithfulness=0.99, evaluations=2)
    assert not circuit.reached
    assert [step.kept for step in circuit.steps] == [False, False]
    closest = max(circuit.steps, key=lambda step: 1 - abs(1 - step.faithfulness))
    assert len(circuit.circuit) == closest.edges
    first = str(circuit).split("\n")[0]
    assert first.endswith("nodes: no circuit that was run is faithful enough")


def test_pruning_below_the_goal_is_said() -> None:
    """ACDC does not know the goal: a faithful circuit was run."""
    circuit = found(prune="acdc", threshold=2, evaluations=500)
    assert max(step.faithfulness for step in circuit.steps) > 0.9
    assert not circuit.reached
    first = str(circuit).split("\n")[0]
    assert first.endswith("nodes: pruning has made it less faithful than was asked for")


def test_the_same_call_gives_the_same_circuit() -> None:
    again = found()
    assert again.circuit == usual().circuit
    assert again.faithfulness == usual().faithfulness
    assert again.steps == usual().steps


def test_the_seed_is_of_the_random_circuits() -> None:
    one, other = (found(seed=seed).evaluation.circuits for seed in (0, 1))
    assert one["circuit"] == other["circuit"]
    assert one["random circuit 0"] != other["random circuit 0"]
    assert one["random circuit 0"] == usual().evaluation.circuits["random circuit 0"]


@pytest.mark.parametrize("top_k", [0, 7, COUNT, 10**6])
def test_so_many_edges_are_measured(top_k: int) -> None:
    circuit = found(top_k=top_k)
    exact = edge_patching(MODEL, API, PAIRS, progress=False)
    measured = circuit.edges.exact[torch.from_numpy(EDGES.mask)]
    known = int(found(top_k=0).edges.exact.sum())
    assert known <= int(measured.sum()) <= min(known + top_k, COUNT)
    if top_k >= COUNT:
        torch.testing.assert_close(
            circuit.edges.matrix, exact.matrix, rtol=0, atol=1e-4, equal_nan=True
        )
        assert f"{COUNT} of {COUNT} exact\n" in str(circuit)
    else:
        assert f"{int(measured.sum())} of {COUNT} exact, the others estimated" in str(circuit)


@pytest.mark.parametrize(
    "options",
    [{"ablation": "zero"}, {"ablation": "mean"}, {"ablation": "resample", "seed": 1}],
    ids=str,
)
def test_outside_may_be_ablated(options: dict[str, Any]) -> None:
    circuit = found(**options)
    alone = evaluate_circuit(
        MODEL, API, circuit.circuit, PAIRS, complement=True, progress=False, **options
    )
    assert circuit.faithfulness == pytest.approx(float(alone), abs=1e-4)
    assert circuit.evaluation["all without circuit"] == pytest.approx(
        alone["all without circuit"], abs=1e-4
    )
    assert circuit.reached


@pytest.mark.parametrize(
    "options", [{"ablation": "mean"}, {"ablation": "resample"}, {"per_position": True}], ids=str
)
def test_a_data_set_may_be_a_stream(options: dict[str, Any]) -> None:
    """It is read as often as it is needed, and a mean of it is made once."""
    batches = [PAIRS.source_tokens[:2], PAIRS.source_tokens[2:]]
    if options.get("ablation") == "resample":
        batches = [PAIRS.source_tokens]
    read: list[int] = []

    def stream() -> Iterator[Tensor]:
        for batch in batches:
            read.append(1)
            yield batch

    given = {"ablation": "mean", **options}
    circuit = found(reference=stream(), **given)
    expected = found(reference=batches, **given)
    assert circuit.circuit == expected.circuit
    assert circuit.faithfulness == pytest.approx(expected.faithfulness, abs=1e-5)
    assert len(read) == len(batches)


def test_of_several_metrics_the_first_counts() -> None:
    both = found(metric=["answer_log_probability", "logit_difference"])
    alone = found(metric="answer_log_probability")
    assert both.circuit == alone.circuit
    assert both.faithfulness == pytest.approx(alone.faithfulness, abs=1e-5)
    assert both.evaluation.outcome.metrics == ("answer_log_probability", "logit_difference")


@pytest.mark.parametrize("cut", [{"batch_size": 1}, {"memory_budget": "300 KiB"}], ids=str)
def test_cuts_change_nothing(cut: dict[str, Any]) -> None:
    circuit = found(**cut)
    assert circuit.circuit == usual().circuit
    assert circuit.faithfulness == pytest.approx(usual().faithfulness, abs=1e-4)


# What it says.


def test_the_report() -> None:
    circuit = usual()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *lines, doubt = str(circuit).split("\n")
    told = dict(line.split("  ", 1) for line in lines)
    told = {name: text.strip() for name, text in told.items()}
    assert list(told) == [
        *("circuit", "faithfulness", "without it", "random", "edges", "runs", "seconds")
    ]
    nodes = len(circuit.circuit.nodes_in_it)
    assert told["circuit"] == f"{len(circuit.circuit)} of {COUNT} edges, {nodes} nodes"
    assert told["faithfulness"].startswith(f"{circuit.faithfulness:.3f} [")
    assert told["faithfulness"].endswith("], where 0.900 was asked for")
    without = circuit.evaluation["all without circuit"]
    assert told["without it"] == f"{without:.3f} is left"
    random = [circuit.evaluation[f"random circuit {number}"] for number in range(5)]
    assert told["random"] == f"{', '.join(f'{each:.3f}' for each in random)} with as many edges"
    assert told["runs"] == f"{len(circuit.steps)} circuits, in 4 prompts"
    assert set(circuit.cost) == {"edges", "size", "prune", "evaluation"}
    assert all(seconds > 0 for name, seconds in circuit.cost.items() if name != "prune")
    assert "prompts" in doubt
    assert repr(circuit) == (
        f"FoundCircuit({len(circuit.circuit)} edges, faithfulness {circuit.faithfulness:.3g})"
    )
    assert "where 0.900 was asked for" in circuit._repr_html_()


def test_the_circuit_knows_what_was_asked() -> None:
    info = usual().circuit.info
    assert info["goal"] == "0.9"
    assert float(info["faithfulness"]) == pytest.approx(usual().faithfulness, abs=1e-5)
    assert usual().circuit.scores.equal(usual().edges.matrix) or torch.equal(
        usual().circuit.scores.nan_to_num(0.0), usual().edges.matrix.double().nan_to_num(0.0)
    )
    assert isinstance(usual().evaluation, CircuitEvaluation)


def test_bars_count_what_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    found(progress=True, evaluations=4)
    assert "4/4" in capsys.readouterr().err
    found(progress=False)
    assert not capsys.readouterr().err


# What is refused.

ERRORS: dict[str, tuple[dict[str, Any], type[PatchingError], str]] = {
    "goal 0": ({"faithfulness": 0}, PatchingError, "faithfulness must be above 0 and up to 1"),
    "goal 2": ({"faithfulness": 2}, PatchingError, "faithfulness must be above 0 and up to 1"),
    "goal": ({"faithfulness": "high"}, PatchingError, "faithfulness must be above 0 and up to 1"),
    "true": ({"faithfulness": True}, PatchingError, "faithfulness must be above 0 and up to 1"),
    "nan": ({"faithfulness": float("nan")}, PatchingError, "faithfulness must be above 0"),
    "method": ({"method": "acdc"}, UnknownNameError, "unknown method 'acdc'; there are eap"),
    "exact": ({"method": "exact"}, UnknownNameError, "unknown method 'exact'; there are eap"),
    "steps": ({"steps": 3}, PatchingError, "steps=3 means nothing with method='eap'"),
    "top_k": ({"top_k": -1}, PatchingError, "top_k must be at least 0, got -1"),
    "evaluations": ({"evaluations": 0}, PatchingError, "evaluations must be at least 1, got 0"),
    "prune": ({"prune": "greedy"}, UnknownNameError, "unknown prune 'greedy'; there are blocks"),
    "threshold": ({"threshold": 0.1}, PatchingError, "threshold=0.1 means nothing with prune='b"),
    "low": ({"threshold": -1, "prune": "acdc"}, PatchingError, "a number from 0 on, got -1"),
    "none": (
        {"threshold": float("nan"), "prune": "acdc"},
        PatchingError,
        "a number from 0 on, got nan",
    ),
    "tokens": ({"pairs": PAIRS.source_tokens}, TokensError, "pairs must be a PromptPairs, got"),
    "reference": ({"reference": PAIRS.source_tokens}, PatchingError, "mean nothing without abl"),
    "pairs": (
        {"ablation": "mean", "reference": PAIRS},
        TokensError,
        "reference is a PromptPairs, which has two runs",
    ),
    "seed": ({"seed": "x"}, PatchingError, "seed must be an integer"),
    "progress": ({"progress": "yes"}, PatchingError, "progress must be True or False"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, kind, message = ERRORS[what]
    monkeypatch.setattr(edge, "_swept", lambda *_: pytest.fail("it ran"))
    with pytest.raises(kind, match=message):
        found(**options)


# The search alone, on made-up faithfulness.


@attrs.define
class Made:
    """Circuits whose faithfulness is a function of their edges."""

    needed: dict[str, float]
    asked: list[int] = attrs.field(factory=list)

    def __call__(self, circuit: Circuit) -> float:
        self.asked.append(len(circuit))
        return sum(worth for edge, worth in self.needed.items() if edge in circuit)


NODES = Nodes((4,) * 3, (2,) * 3, (False,) * 3)
TOTAL = len(NODES)
#: Each is on a way of its own from the input to the logits.
WAYS = ("input->m0", "m0->logits", "input->m1", "m1->logits", "input->m2", "m2->logits")
SCORES = {edge: 0.5**number for number, edge in enumerate(NODES)}
RANKING = Circuit.from_edges(SCORES, n=TOTAL, nodes=NODES, pruned=False)


def top(count: int) -> Circuit:
    return RANKING.top(count)


@pytest.mark.parametrize("needed", [1, 7, 10, 11, 40, 49, 50, 51, 120, 190])
def test_the_smallest_size_is_found_to_a_fiftieth(needed: int) -> None:
    """Where faithfulness grows with size."""
    edge = [*NODES][needed - 1]
    search = Search(Made({edge: 1.0}), 0.9, 100)
    circuit = smallest(search, top, [10, 20, 50, 100, 190])
    assert edge in circuit
    assert needed <= len(circuit) <= max(needed + 1, needed * 1.03)
    assert search.left == 100 - len(search.steps)


def test_too_much_is_as_far_off_as_too_little() -> None:
    edges = [*NODES]
    search = Search(Made({edges[4]: 1.0, edges[6]: 1.0, edges[30]: -1.0}), 0.9, 100)
    assert not search.reaches(2.0)
    assert search.reaches(1.05)
    assert search.reaches(0.95)
    # At 5 and 6 edges it is 1, but 10 are tried first, and are 2.
    assert 31 <= len(smallest(search, top, [10, 20, 50, 190])) <= 32


def test_rounding_is_no_failure() -> None:
    search = Search(Made({}), 1.0, 100)
    assert search.reaches(1 - 1e-6)
    assert search.reaches(1 + 1e-6)
    assert not search.reaches(1 - 1e-4)


def test_no_circuit_is_run_twice() -> None:
    made = Made({[*NODES][4]: 1.0})
    search = Search(made, 0.9, 100)
    circuit = smallest(search, top, [10, 190])
    assert search.run("again", circuit) == 1.0
    assert len(made.asked) == len({*made.asked}) == len(search.steps)
    assert "again" not in {step.stage for step in search.steps}


def test_blocks_leave_what_is_needed() -> None:
    scores = RANKING.scores
    assert scores is not None
    search = Search(Made(dict.fromkeys(WAYS[:4], 0.25)), 0.9, 1000)
    circuit = without_blocks(search, Circuit(NODES, RANKING.kept), scores)
    assert set(circuit) == set(WAYS[:4])


def test_with_an_edge_goes_what_led_to_it() -> None:
    scores = torch.where(torch.from_numpy(NODES.mask), 1.0, torch.nan)
    scores[NODES.place("m2->logits")] = 0.5
    search = Search(Made({"input->logits": 1.0}), 0.9, 1)
    whole = Circuit.of(NODES, ["input->logits", "input->m0", "m0->m2", "m2->logits"])
    assert list(without_blocks(search, whole, scores)) == ["input->logits"]


def test_acdc_drops_by_the_change_and_keeps_what_it_dropped_out() -> None:
    worth = {WAYS[0]: 0.5, WAYS[1]: 0.45, WAYS[2]: 0.03, WAYS[3]: 0.02}
    for threshold, left in ((0.025, WAYS[:3]), (0.04, WAYS[:2]), (0.6, ()), (0.0, None)):
        made = Made(dict(worth))
        search = Search(made, 0.9, 1000)
        whole = Circuit.of(NODES, WAYS)
        search.run("size", whole)
        circuit = as_acdc(search, whole, threshold)
        if left is None:
            assert circuit == whole
            continue
        # What it left that leads nowhere is gone in the end.
        assert circuit == Circuit.of(NODES, left).pruned()
        assert [*made.asked] == sorted(made.asked, reverse=True) or threshold < 0.6


def test_acdc_goes_from_the_logits_down() -> None:
    order: list[str] = []
    whole = Circuit.of(NODES, NODES)

    def measure(circuit: Circuit) -> float:
        order.extend(whole - circuit)
        return float(len(circuit))

    as_acdc(Search(measure, 0.9, 1000), whole, 0.5)
    assert len(order) == TOTAL
    receivers = [edge.partition("->")[2] for edge in order]
    assert receivers[0] == "logits"
    places = [NODES.receiver_names.index(each) for each in receivers]
    assert places == sorted(places, reverse=True)
    assert order[0] == "m2->logits"
    assert order[-1] == "input->a0.h0<q>"
