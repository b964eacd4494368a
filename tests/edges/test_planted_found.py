"""Planted circuits are found, and docs/edges-details.md tells what estimates make of them."""

from __future__ import annotations

import functools
import re

import pytest

from nnpatch_core import Circuit, edge_patching
from tests.helpers.paths import ROOT
from tests.helpers.planted_cases import EACH, NOTHING, STEPS, estimated, planted
from tests.helpers.planted_circuits import PLANTED
from tests.helpers.planted_oracle import METHODS

#: As the page calls the models.
CALLED = {
    "a chain of six steps": "chain",
    "an OR of two paths": "redundant",
    "an OR without a leak": "redundant, no leak",
    "an OR, from off to on": "redundant, restored",
    "a backup head": "backup",
    "a backup head that rests": "backup, spared",
    "a negative head": "negative",
}
COLUMNS = ("exact", "eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")


@functools.cache
def found(name: str, method: str = "exact") -> dict[str, float]:
    circuit = planted(name)
    return dict(
        edge_patching(
            circuit.model,
            None,
            circuit.source_tokens,
            circuit.target_tokens,
            circuit.source_answer_index,
            circuit.target_answer_index,
            method=method,
            steps=STEPS if "-ig-" in method else None,
            progress=False,
        )
    )


@EACH
def test_measured_edges_are_those_that_were_planted(name: str) -> None:
    circuit, edges = planted(name), found(name)
    for edge, value in edges.items():
        assert value == pytest.approx(circuit.values.get(edge, 0.0), abs=NOTHING), edge
    assert {edge for edge, value in edges.items() if abs(value) > circuit.threshold} == (
        circuit.edges
    )


@EACH
def test_the_circuit_is_recovered(name: str) -> None:
    circuit = planted(name)
    edges = edge_patching(
        circuit.model,
        None,
        circuit.source_tokens,
        circuit.target_tokens,
        circuit.source_answer_index,
        circuit.target_answer_index,
        progress=False,
    )
    known = Circuit.of(edges.nodes, circuit.edges)
    chosen = Circuit.from_edges(
        edges, method="threshold", threshold=circuit.threshold, pruned=False
    )
    assert chosen == known
    result = chosen.precision_recall(known)
    assert (result.precision, result.recall) == (1, 1)


@pytest.mark.parametrize("method", METHODS)
@EACH
def test_estimates_are_the_oracle_s(name: str, method: str) -> None:
    for edge, value in estimated(name, method).items():
        assert found(name, method)[edge] == pytest.approx(value, abs=NOTHING), edge


def test_the_page_tells_what_methods_say() -> None:
    page = (ROOT / "docs" / "edges-details.md").read_text("utf-8")
    page = page.split("\n## Where methods differ\n")[1]
    rows = re.findall(r"^\|([^|]*)\| `([^`|]*->[^`|]*)` \|(.*)\|$", page, re.MULTILINE)
    assert len(rows) == 20
    model, told = "", set()
    for called, edge, cells in rows:
        model = CALLED[called.strip()] if called.strip() else model
        told.add(model)
        numbers = [float(cell) for cell in cells.split("|")]
        for method, number in zip(COLUMNS, numbers, strict=True):
            value = found(model, method)[edge]
            assert value == pytest.approx(number, abs=6e-4), (model, edge, method)
    assert told == set(PLANTED)
