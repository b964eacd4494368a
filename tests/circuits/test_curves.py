"""What `circuit_curve` takes and gives: sizes, areas, intervals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from nnpatch_core import edge_patching
from nnpatch_core.circuits import FRACTIONS, Circuit, areas, circuit_curve, evaluate_circuit
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError, PatchingError, StatisticsWarning, UnknownNameError
from nnpatch_core.testing import tiny_api, tiny_model
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


def test_whole_parts_count_as_they_are_written() -> None:
    """0.29 times 100 is 28.999999999999996."""
    for share, edges in ((0.1, 19), (0.3, 57), (0.7, 133), (0.9, 171)):
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


def test_one_prompt_has_no_interval() -> None:
    found = curve(**EVEN.some(0).arguments())
    assert found.low.isnan().all()
    assert found.high.isnan().all()
    assert "low" not in str(found)


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
