"""The files of EAP-IG's numbers are of the models that they are compared on, and add up."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.helpers.eap_ig import edge_names, grouped, groups, packed, reference, unpacked
from tests.helpers.formula_models import MODELS, checksum, formula_model

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@pytest.fixture(scope="module", params=list(MODELS))
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"name": request.param, **reference(request.param)}


def difference(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> list[float]:
    """Good minus bad answer's logit after each prompt, alone."""
    with torch.no_grad():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    pairs = zip(logits, answers, strict=True)
    return [(one[good] - one[bad]).item() for one, (good, bad) in pairs]


def test_models_are_those_of_the_files(found: dict[str, Any]) -> None:
    model = formula_model(found["name"])
    assert type(model).__name__ == found["class"]
    assert checksum(model) == found["checksum"]
    for side, way in enumerate(("clean", "corrupted")):
        prompts = [[found["first_token"], *pair[side]] for pair in found["pairs"]]
        measured = difference(model, prompts, found["answers"])
        assert measured == pytest.approx(found[way], abs=1e-4)
        ragged = [[found["first_token"], *pair[side]] for pair in found["ragged_pairs"]]
        measured = difference(model, ragged, found["ragged"]["answers"])
        assert measured == pytest.approx(found["ragged"][way], abs=1e-4)


def test_circuits_of_all_and_of_none(found: dict[str, Any]) -> None:
    circuits = {circuit["title"]: circuit for circuit in found["circuits"]}
    assert circuits["all"]["edges"] == found["edges"]
    assert circuits["all"]["values"] == pytest.approx(found["clean"], abs=1e-5)
    assert circuits["none"]["edges"] == []
    assert circuits["none"]["values"] == pytest.approx(found["corrupted"], abs=1e-5)
    for circuit in found["circuits"]:
        assert set(circuit["left_by_pruning"]) <= set(circuit["edges"])
        for edges in groups(found["edges"], found["shared"]).values():
            assert len({edge in circuit["edges"] for edge in edges}) == 1


def test_areas_are_trapezoids_over_the_linear_fraction(found: dict[str, Any]) -> None:
    def area(values: list[float]) -> float:
        steps = itertools.pairwise(zip(FRACTIONS, values, strict=True))
        return math.fsum((right - left) * (low + high) / 2 for (left, low), (right, high) in steps)

    for curve in found["curves"]:
        faithfulness = curve["faithfulness"]
        assert area(faithfulness) == pytest.approx(curve["cpr"], abs=1e-5)
        assert area([abs(1 - each) for each in faithfulness]) == pytest.approx(
            curve["cmd"], abs=1e-5
        )


def test_exact_edges_are_of_a_fresh_graph(found: dict[str, Any]) -> None:
    # EAP-IG's own loop goes on with a graph that it pruned, which matters in parallel blocks.
    own = found["its_exact_from_a_fresh_graph"]
    behind = found["edges"].index("input->m0") + 1
    assert own["edges"] == (len(found["edges"]) - behind if found["parallel"] else 0)


def test_batches_scale_scores(found: dict[str, Any]) -> None:
    single, whole = found["batches"]["[1, 1, 1]"], found["batches"]["[3]"]
    assert single == pytest.approx(3 * whole, rel=1e-4)
    assert single == found["scores"]["eap"][0]


@pytest.mark.parametrize(("layers", "heads", "parallel"), [(3, 4, False), (2, 4, True)])
def test_edges_count(layers: int, heads: int, parallel: bool) -> None:
    names = edge_names(layers, heads, parallel)
    senders = range(layers)
    below = [1 + layer * (heads + 1) for layer in senders]
    mlps = below if parallel else [each + heads for each in below]
    assert len(names) == 3 * heads * sum(below) + sum(mlps) + 1 + layers * (heads + 1)
    assert len(set(names)) == len(names)


def test_names() -> None:
    assert grouped("a0.h3->a1.h3<k>", 2) == "a0.h3->a1.h1<k>"
    assert grouped("a0.h3->a1.h3<q>", 2) == "a0.h3->a1.h3<q>"
    names = edge_names(1, 2, parallel=False)
    assert list(unpacked(packed(names[1::3], names), names)) == names[1::3]
