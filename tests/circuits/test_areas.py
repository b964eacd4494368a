"""Areas under faithfulness and under the ROC curve, and the curve's table and picture."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnpatch_core.circuits import FRACTIONS, Circuit, CircuitCurve, areas, auroc
from nnpatch_core.errors import EdgeError
from tests.helpers.circuits import Edges, made_edges, nodes_of, some_circuits

NODES = nodes_of(2, 2)
NUMBERS = st.floats(-2, 3)


# CPR and CMD --------------------------------------------------------------------------------------


@given(st.lists(NUMBERS, min_size=len(FRACTIONS), max_size=len(FRACTIONS)))
def test_areas_are_those_of_mib(values: list[float]) -> None:
    """Its two sums, written out: neither is divided by the range of the fractions."""
    cpr = cmd = 0.0
    for place in range(len(FRACTIONS) - 1):
        step = FRACTIONS[place + 1] - FRACTIONS[place]
        first, second = values[place], values[place + 1]
        cpr += step * (first + second) / 2
        cmd += step * (abs(1 - first) + abs(1 - second)) / 2
    assert areas(FRACTIONS, torch.tensor(values, dtype=torch.float64)) == pytest.approx((cpr, cmd))


@given(st.lists(NUMBERS, min_size=2, max_size=6), st.integers(0, 99))
def test_areas_are_those_of_fine_grids(values: list[float], seed: int) -> None:
    """Of a function that is straight between the points, and does not cross 1 there."""
    random = np.random.default_rng(seed)
    fractions = np.sort(random.choice(np.arange(1, 1000), len(values), replace=False)) / 1000
    fine = np.linspace(fractions[0], fractions[-1], 40_001)
    for heights in (values, np.clip(values, None, 1), np.clip(values, 1, None)):
        cpr, cmd = areas(fractions, heights)
        between = np.interp(fine, fractions, heights)
        assert cpr == pytest.approx(np.trapezoid(between, fine), abs=1e-4)
        if heights is not values:
            assert cmd == pytest.approx(np.trapezoid(abs(1 - between), fine), abs=1e-4)


def test_areas_of_what_is_known() -> None:
    assert areas(FRACTIONS, [1.0] * 10) == pytest.approx((0.999, 0))
    assert areas(FRACTIONS, [0.0] * 10) == pytest.approx((0, 0.999))
    assert areas([0.25, 0.5], [1, 3]) == pytest.approx((0.5, 0.25))
    assert all(map(math.isnan, areas([0.25, 0.5], [1, math.nan])))


@pytest.mark.parametrize(
    ("fractions", "values", "words"),
    [
        ([0.1], [1.0], "at least two points, and a faithfulness for each fraction, got 1"),
        ([0.1, 0.2], [1.0], "got 2 fractions and 1 of faithfulness"),
        ([0.2, 0.1], [1.0, 1.0], r"fractions must increase, got \[0.2, 0.1\]"),
        ([0.2, 0.2], [1.0, 1.0], "fractions must increase"),
        ([0.2, math.nan], [1.0, 1.0], "fractions must increase"),
        ("01", [1.0, 1.0], "fractions must be numbers, got '01'"),
        ([0.1, 0.2], ["x", "y"], "faithfulness must be numbers"),
        ([0.1, 0.2], torch.zeros(2, 2), "faithfulness must be numbers"),
        ([0.1, 0.2], None, "faithfulness must be numbers, got None"),
    ],
)
def test_what_has_no_areas(fractions: Any, values: Any, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        areas(fractions, values)


# AUROC --------------------------------------------------------------------------------------------


@given(some_circuits(), st.integers(0, 99), st.booleans(), st.booleans())
def test_auroc_is_a_plain_count(known: Circuit, seed: int, ties: bool, absolute: bool) -> None:
    nodes = known.nodes
    if len(nodes) > 60:
        return
    drawn = np.random.default_rng(seed).normal(size=nodes.mask.shape)
    matrix = np.where(nodes.mask, np.round(drawn) if ties else drawn, math.nan)
    found = auroc(torch.from_numpy(matrix), known, absolute=absolute)
    keys = {edge: matrix[nodes.place(edge)] for edge in nodes}
    keys = {edge: abs(key) if absolute else key for edge, key in keys.items()}
    wins = [
        (keys[one] > keys[other]) + 0.5 * (keys[one] == keys[other])
        for one in nodes
        for other in nodes
        if one in known and other not in known
    ]
    if wins:
        assert found == pytest.approx(np.mean(wins))
    else:
        assert math.isnan(found)


def test_auroc_of_edges_and_of_signs() -> None:
    edges = made_edges(NODES)
    strongest = Circuit.from_edges(edges, n=9, pruned=False)
    assert auroc(edges, strongest) == 1
    assert auroc(-edges.matrix, strongest) == 1
    signed = auroc(edges, strongest, absolute=False)
    assert signed < 1
    assert auroc(-edges.matrix, strongest, absolute=False) == pytest.approx(1 - signed)


def test_auroc_needs_scores_of_all_edges_of_its_nodes() -> None:
    edges, known = made_edges(NODES), Circuit.of(NODES, ["input->m0"])
    matrix = edges.matrix.clone()
    matrix[0, 0] = math.nan
    for scores, circuit, words in (
        (matrix, known, "1 of the 46 edges have no score"),
        (made_edges(nodes_of(1, 2)), known, "the scores are of other nodes than the known"),
        (torch.zeros(2, 2), known, "scores must have the shape"),
        (torch.zeros(matrix.shape), known, "scores has a number at"),
        ([1, 2], known, "scores must be a tensor"),
        (edges, ["input->m0"], "known must be a Circuit"),
    ):
        with pytest.raises(EdgeError, match=words):
            auroc(scores, circuit)


# The curve ----------------------------------------------------------------------------------------


def curve(**changes: Any) -> CircuitCurve:
    edges = made_edges(NODES)
    sizes = [int(fraction * len(NODES)) for fraction in FRACTIONS]
    circuits = [Circuit.from_edges(edges, n=size) for size in sizes]
    values = np.linspace(0, 1.1, len(FRACTIONS))
    cpr, cmd = areas(FRACTIONS, values)
    arguments = {
        "fractions": FRACTIONS,
        "sizes": [len(circuit) for circuit in circuits],
        "faithfulness": values,
        "low": values - 0.1,
        "high": torch.from_numpy(values + 0.2),
        "circuits": circuits,
        "cpr": cpr,
        "cmd": cmd,
        "absolute": False,
        "info": {"model": "some/folder/tiny-$x$-中/"},
        **changes,
    }
    return CircuitCurve(**arguments)


def test_its_table() -> None:
    made = curve()
    title, head, *lines = str(made).splitlines()
    assert title == f"10 circuits, edges chosen by value: CPR {made.cpr:.3f}, CMD {made.cmd:.3f}"
    assert repr(made) == f"CircuitCurve({title})"
    assert head.split() == ["fraction", "edges", "faithfulness", "low", "high"]
    assert lines[-1].split() == ["1.000", "46", "1.100", "1.000", "1.300"]
    assert len(made) == len(lines) == 10
    assert "<pre>" in made._repr_html_()
    frame = made.to_dataframe()
    assert list(frame) == ["fraction", "edges", "faithfulness", "low", "high"]
    assert frame["edges"].tolist() == list(made.sizes)
    assert made.faithfulness.tolist() == frame["faithfulness"].tolist()


def test_intervals_are_shown_if_there_are_any() -> None:
    none = [math.nan] * len(FRACTIONS)
    made = curve(low=none, high=none)
    assert str(made).splitlines()[1].split() == ["fraction", "edges", "faithfulness"]
    (axis,) = made.plot().axes
    assert not axis.collections


def test_intervals_of_the_areas_are_beside_them() -> None:
    made = curve(cpr_interval=(0.1, 0.25), cmd_interval=torch.tensor([-math.inf, math.inf]))
    assert made.cpr_interval == (0.1, 0.25)
    title = str(made).splitlines()[0]
    assert title.endswith(
        f"CPR {made.cpr:.3f} [0.100, 0.250], CMD {made.cmd:.3f} [-inf, inf]",
    )
    assert repr(made) == f"CircuitCurve({title})"
    assert "[0.100, 0.250]" in made._repr_html_()
    # A picture has no room for them.
    assert "[" not in made.plot().get_suptitle()


def test_its_picture() -> None:
    figure = curve(high=[math.inf] * len(FRACTIONS)).plot()
    (axis,) = figure.axes
    # Where no font has a character, its number stands for it.
    assert figure.get_suptitle().replace("\\u4e2d", "中").startswith("tiny-$x$-中: 10 circuits")
    assert axis.get_xscale() == "log"
    line = axis.lines[-1]
    assert line.get_xdata().tolist() == [100 * fraction for fraction in FRACTIONS]
    assert line.get_ydata().tolist() == curve().faithfulness.tolist()
    assert len(axis.collections) == 1
    assert [label.get_text() for label in axis.get_xticklabels()][:3] == ["0.1", "0.2", "0.5"]
    figure.canvas.draw()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": [1, 2]}, "as many of each as there are circuits, got 10 fractions, 2 sizes"),
        ({"sizes": [1.5] * 10}, "each of sizes must be an integer"),
        ({"sizes": "1234567890"}, "sizes must be numbers of edges"),
        ({"low": "x"}, "each of faithfulness, low and high must be numbers, got 'x'"),
        ({"circuits": [1] * 10}, "circuits must be a list of them"),
        ({"fractions": None}, "fractions must be numbers, got None"),
        ({"cpr_interval": [0.1]}, r"an interval has two ends, got \[0.1\]"),
        ({"cmd_interval": "x"}, "each of cpr_interval and cmd_interval must be numbers, got 'x'"),
    ],
)
def test_what_is_no_curve(changes: Any, words: str) -> None:
    with pytest.raises(EdgeError, match=words):
        curve(**changes)


def test_edges_is_all_that_auroc_asks_for() -> None:
    class Bare:
        matrix = made_edges(NODES).matrix

    known = Circuit.of(NODES, ["input->m0"])
    assert auroc(Bare(), known) == auroc(Edges(NODES, Bare.matrix), known)
