"""What `circuit_curve` takes and gives: sizes, areas, intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from nnpatch_core import edge_patching
from nnpatch_core.circuits import FRACTIONS, Circuit, areas, circuit_curve, evaluate_circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError, PatchingError, StatisticsWarning, UnknownNameError
from nnpatch_core.results.statistics import drawing, samples
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers import statistics_oracle
from tests.helpers.edge_pairs import EVEN

#: Padding is a part of what is tested here, so that what it mixes needs no word; and so are
#: intervals of few prompts.
pytestmark = [
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
    pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning"),
]

MODEL, API = tiny_model("llama"), tiny_api()
SOME = EVEN.arguments()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    EDGES: Any = edge_patching(MODEL, API, **SOME, method="eap", progress=False)
NODES = EDGES.nodes
TOTAL = 190
ROUNDING = 2e-5


def curve(edges: Any = EDGES, **options: Any) -> Any:
    return circuit_curve(MODEL, API, edges, **{**SOME, "progress": False, **options})


@pytest.mark.parametrize("method", ["greedy", "top"])
@pytest.mark.parametrize("absolute", [True, False])
def test_circuits_are_those_of_the_scores(method: Any, absolute: bool) -> None:
    found = curve(method=method, absolute=absolute)
    assert found.fractions == FRACTIONS
    assert found.absolute is absolute
    for share, size, circuit in zip(FRACTIONS, found.sizes, found.circuits, strict=True):
        n = int(share * TOTAL + 1e-9)
        chosen = Circuit.from_edges(EDGES, n=n, method=method, absolute=absolute)
        assert circuit == chosen
        assert size == len(chosen) <= n
    assert found.sizes[-1] == TOTAL
    if method == "greedy":
        assert found.sizes[5:] != (0,) * 5


def test_the_whole_part_of_the_fraction_counts() -> None:
    for share, edges in ((0.1, 19), (0.3, 57), (0.304, 57), (0.306, 58)):
        found = curve(fractions=[share, 1], method="greedy")
        assert found.circuits[0] == Circuit.from_edges(EDGES, n=edges, method="greedy")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"swap": True},
        {"ablation": "mean"},
        {"ablation": "resample", "seed": 2},
        {"metric": ["kl_divergence", "logit_difference"]},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_each_point_is_that_circuit_evaluated(options: dict[str, Any]) -> None:
    found = curve(fractions=[0.1, 0.4, 1], **options)
    alone = evaluate_circuit(
        MODEL, API, list(found.circuits), **{**SOME, "progress": False, **options}
    )
    torch.testing.assert_close(
        found.faithfulness, alone.faithfulness.double(), rtol=0, atol=ROUNDING
    )
    low, high = alone.interval()
    torch.testing.assert_close(found.low, low.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.high, high.double(), rtol=0, atol=1e-4)
    assert (found.cpr, found.cmd) == areas([0.1, 0.4, 1], found.faithfulness)
    assert found.faithfulness[-1] == pytest.approx(1, abs=1e-4)


#: Few enough to be quick, and enough for intervals.
MANY = 8


def apart(*, surely: bool) -> dict[str, Any]:
    """Pairs whose runs a metric tells apart: in each the same way, or in half of them the other."""
    random = torch.Generator().manual_seed(4)
    source, target = torch.randint(3, 60, (2, MANY, 5), generator=random)
    with torch.no_grad():
        one, other = (MODEL(tokens).logits[:, -1] for tokens in (source, target))
    answers = [(one - other).argmax(-1), (one - other).argmin(-1)]
    if not surely:
        first = torch.arange(MANY) % 2 == 0
        answers = [torch.where(first, *answers), torch.where(first, *answers[::-1])]
    return {
        "source_tokens": source,
        "target_tokens": target,
        "source_attention_mask": None,
        "target_attention_mask": None,
        "source_answer_index": answers[0],
        "target_answer_index": answers[1],
    }


Row = Sequence[float]


def areas_by_hand(
    fractions: Row, runs: Sequence[Row], source: Row, target: Row, rows: Sequence[int]
) -> tuple[float, float]:
    """CPR and CMD of some pairs, from the metric of each circuit and baseline in each."""
    none, whole = (math.fsum(each[row] for row in rows) for each in (target, source))
    values = [(math.fsum(run[row] for row in rows) - none) / (whole - none) for run in runs]
    cpr = cmd = 0.0
    for place in range(len(values) - 1):
        step, ends = fractions[place + 1] - fractions[place], values[place : place + 2]
        cpr += step * sum(ends) / 2
        cmd += step * sum(abs(1 - end) for end in ends) / 2
    return cpr, cmd


def test_intervals_of_the_areas_are_those_of_a_loop() -> None:
    """Pairs are drawn for all circuits and both baselines at once, and the areas anew of each."""
    fractions, pairs = [0.05, 0.3, 0.6, 1], apart(surely=True)
    found = curve(fractions=fractions, **pairs)
    alone = evaluate_circuit(
        MODEL, API, list(found.circuits), **{**SOME, **pairs, "progress": False}
    ).outcome
    runs = alone.raw["logit_difference"]["circuit"].double().tolist()
    source, target = alone.baseline.source.tolist(), alone.baseline.target.tolist()
    (order,) = samples.orders([alone]) or ()
    (drawn,) = drawing.counts(MANY, 10_000, 0, 0)
    picks = [np.repeat(order, each.astype(int)).tolist() for each in drawn]

    def by_hand(rows: Sequence[int]) -> tuple[float, float]:
        return areas_by_hand(fractions, runs, source, target, rows)

    every = list(range(MANY))
    values = by_hand(every)
    resampled = list(zip(*map(by_hand, picks), strict=True))
    without = list(
        zip(*(by_hand([row for row in every if row != left]) for left in every), strict=True)
    )
    # Some draws have circuits that do more than all edges do, and some do not: CMD is no mean.
    assert max(found.high.tolist()) > 1
    assert (found.cpr, found.cmd) == pytest.approx(values, abs=ROUNDING)
    for number, ends in enumerate((found.cpr_interval, found.cmd_interval)):
        expected = statistics_oracle.bca_of(
            values[number], resampled[number], without[number], MANY, 0.95
        )
        assert ends == pytest.approx(expected, abs=ROUNDING)
        assert ends[0] < values[number] < ends[1]
    told = str(found).splitlines()[0]
    assert f"[{found.cpr_interval[0]:.3f}, {found.cpr_interval[1]:.3f}], CMD" in told


def test_areas_of_runs_that_may_not_differ_may_be_anything() -> None:
    with pytest.warns(StatisticsWarning, match="every interval is") as caught:
        found = curve(fractions=[0.2, 1], **apart(surely=False))
    assert len(caught) == 1
    assert found.cpr_interval == found.cmd_interval == (-math.inf, math.inf)
    assert found.low.isinf().all()


def test_one_prompt_has_no_interval() -> None:
    found = curve(**EVEN.some(0).arguments())
    assert found.low.isnan().all()
    assert found.high.isnan().all()
    assert "low" not in str(found)
    assert all(map(math.isnan, (*found.cpr_interval, *found.cmd_interval)))
    assert "[" not in str(found)


def test_few_prompts_are_a_warning_once() -> None:
    with pytest.warns(StatisticsWarning) as caught:
        curve(fractions=[0.2, 1])
    assert len(caught) == 1


def test_scores_may_be_a_circuit_s_or_numbers_by_name() -> None:
    expected = curve(fractions=[0.1, 1])
    circuit = Circuit.from_edges(EDGES, n=3, pruned=False)
    named = {edge: float(EDGES[edge]) for edge in EDGES}
    for edges in (circuit, named):
        found = curve(edges, fractions=[0.1, 1])
        assert found.circuits == expected.circuits
        assert found.faithfulness.equal(expected.faithfulness)
    assert found.circuits[0].scores is not None


SMALL = Nodes((4,) * 2, (2,) * 2, (False,) * 2)
ERRORS: dict[str, tuple[dict[str, Any], type[PatchingError], str]] = {
    "none": ({"edges": None}, EdgeError, "a circuit is made of the outcome of edge_patching"),
    "no scores": (
        {"edges": Circuit.of(NODES, NODES)},
        EdgeError,
        "edges must be scored, and a circuit without scores was given",
    ),
    "another model's": (
        {"edges": Circuit.from_edges(dict.fromkeys(SMALL, 1.0), n=3, nodes=SMALL)},
        EdgeError,
        "edges: of a model of 2 layers, 82 edges, and this model has 3 layers, 190 edges",
    ),
    "names of another model": ({"edges": {"m7->logits": 1.0}}, EdgeError, "m7"),
    "some scores": (
        {"edges": dict.fromkeys(list(NODES)[:40], 1.0), "fractions": [0.1, 1], "method": "top"},
        EdgeError,
        "n is 190, and 40 edges have a score",
    ),
    "one fraction": ({"fractions": [0.5]}, EdgeError, "fractions must be at least two, increase"),
    "falling": ({"fractions": [0.5, 0.1]}, EdgeError, "fractions must be at least two, increase"),
    "twice": ({"fractions": [0.5, 0.5]}, EdgeError, "fractions must be at least two, increase"),
    "above 1": ({"fractions": [0.5, 1.5]}, EdgeError, "above 0 and up to 1, got"),
    "0": ({"fractions": [0, 0.5]}, EdgeError, "above 0 and up to 1, got"),
    "nan": ({"fractions": [0.5, float("nan")]}, EdgeError, "fractions must be"),
    "texts": ({"fractions": "half"}, EdgeError, "fractions must be numbers, got 'half'"),
    "threshold": ({"method": "threshold"}, UnknownNameError, "'threshold'; there are greedy, top"),
    "absolute": ({"absolute": "yes"}, PatchingError, "absolute must be True or False"),
    "seed": ({"seed": 3}, PatchingError, "seed=3 means nothing without a resample"),
    "no seed": ({"seed": "x", "ablation": "resample"}, PatchingError, "seed must be an integer"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(what: str) -> None:
    options, kind, message = ERRORS[what]
    with pytest.raises(kind, match=message):
        curve(**options)
