"""Edges are those of EAP-IG where docs/edges-and-eap-ig.md says so, in the numbers of its own code.

Its scores are in units of the metric, clean is our target, and its keys and values are those of
each query head; see the page. The files have six digits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch

from nnpatch_core import (
    Circuit,
    circuit_curve,
    edge_patching,
    evaluate_circuit,
    infer_adapter,
)
from nnpatch_core.circuits import auroc
from tests.helpers.eap_ig import edge_names, grouped, groups, reference
from tests.helpers.formula_models import MODELS, formula_model
from tests.helpers.paths import ROOT
from tests.helpers.planted_cases import planted

PAGE = (ROOT / "docs" / "edges-and-eap-ig.md").read_text("utf-8")
METHODS = ("eap", "eap-ig-inputs", "clean-corrupted", "eap-ig-activations", "exact")
#: The models whose norms after attention make estimates others; see the page.
POST_NORMS = ("gemma2",)
EACH = pytest.mark.parametrize("name", MODELS)
#: In its scores, as a share of the largest.
SAME = 1e-5


@functools.cache
def model_of(name: str) -> tuple[Any, Any]:
    model = formula_model(name)
    return model, infer_adapter(model)


@functools.cache
def file_of(name: str) -> dict[str, Any]:
    return reference(name)


def padded(found: dict[str, Any], which: str) -> dict[str, Any]:
    """Its clean prompts as targets, its corrupted ones as sources, each behind the first token."""
    pairs = found[which]
    width = 1 + max(len(prompt) for pair in pairs for prompt in pair)
    rows = [
        [[0] * (width - 1 - len(prompt)) + [found["first_token"], *prompt] for prompt in side]
        for side in zip(*pairs, strict=True)
    ]
    mask = [[0] * (width - 1 - len(clean)) + [1] * (len(clean) + 1) for clean, _ in pairs]
    answers = found["answers"] if which == "pairs" else found["ragged"]["answers"]
    good, bad = torch.tensor(answers).T
    return {
        "source_tokens": torch.tensor(rows[1]),
        "target_tokens": torch.tensor(rows[0]),
        "source_answer_index": bad,
        "target_answer_index": good,
        "attention_mask": torch.tensor(mask),
    }


def patched(name: str, which: str = "pairs", **options: Any) -> Any:
    model, api = model_of(name)
    return edge_patching(model, api, **padded(file_of(name), which), progress=False, **options)


@functools.cache
def scores(name: str, method: str) -> dict[str, float]:
    """Ours, in the units of its own."""
    found = file_of(name)
    whole = math.fsum(found["corrupted"]) - math.fsum(found["clean"])
    values = patched(name, method=method)
    return {edge: value * whole / len(found["clean"]) for edge, value in values.items()}


@functools.cache
def its_own(name: str, method: str) -> dict[str, float]:
    """Its own, for the edges of key/value heads as the model has them."""
    found = file_of(name)
    single = dict(zip(found["edges"], found["scores"][method], strict=True))
    shared = groups(found["edges"], found["shared"])
    if method != "exact":
        return {edge: math.fsum(single[each] for each in own) for edge, own in shared.items()}
    together = found.get("exact_of_groups", {"edges": [], "scores": []})
    known = dict(zip(together["edges"], together["scores"], strict=True))
    return {edge: known.get(edge, single[own[0]]) for edge, own in shared.items()}


def largest_gap(name: str, method: str, edges: list[str] | None = None) -> float:
    """As a share of the largest score."""
    ours, theirs = scores(name, method), its_own(name, method)
    gaps = (abs(ours[edge] - theirs[edge]) for edge in edges or theirs)
    return max(gaps) / max(map(abs, theirs.values()))


@EACH
def test_edges_are_its_own(name: str) -> None:
    """Those of query heads under the names of the key/value heads."""
    assert set(scores(name, "eap")) == set(its_own(name, "eap"))
    counts = {"gpt2": (262, 262), "llama": (262, 190), "gemma2": (110, 82), "neox": (102, 102)}
    assert (len(file_of(name)["edges"]), len(scores(name, "eap"))) == counts[name]


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "clean-corrupted", "exact"])
@EACH
def test_scores_are_its_own(name: str, method: str) -> None:
    edges = None
    if name in POST_NORMS and method != "exact":
        # Whatever no head sends; and what one does is told as added, not as it was.
        edges = [edge for edge in its_own(name, method) if not edge.startswith("a")]
        assert largest_gap(name, method) > 0.2
    assert largest_gap(name, method, edges) < SAME
    # Where a score is not small, each is so for itself.
    ours, theirs = scores(name, method), its_own(name, method)
    top = max(map(abs, theirs.values()))
    for edge, score in theirs.items():
        if abs(score) > 0.1 * top and (edges is None or edge in edges):
            assert ours[edge] == pytest.approx(score, rel=1e-4), edge


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_prompts_of_other_lengths(name: str) -> None:
    """Padded here, and alone there."""
    found = file_of(name)
    ragged, shared = found["ragged"], groups(found["edges"], found["shared"])
    whole = math.fsum(ragged["corrupted"]) - math.fsum(ragged["clean"])
    values = patched(name, "ragged_pairs", method="eap")
    compared = 0
    for edge, score in zip(found["edges"][::3], ragged["eap, one batch"], strict=True):
        # Of the keys and values of several query heads the file does not have all.
        if len(shared.get(edge, [])) != 1 or (name in POST_NORMS and edge.startswith("a")):
            continue
        # One batch of three prompts divides by three once more.
        assert values[edge] * whole / 9 == pytest.approx(score, abs=2e-5), edge
        compared += 1
    assert compared > 5


@EACH
def test_the_page_tells_the_gaps(name: str) -> None:
    """Those of its table, whose columns are the models."""
    for method in METHODS:
        row = re.search(rf'^\| `"{method}"`[^|]*\|(.*)\|$', PAGE, re.MULTILINE)
        assert row, method
        told = float(row[1].split("|")[[*MODELS].index(name)])
        found = largest_gap(name, method)
        if told > 0.1:
            assert found == pytest.approx(told, abs=0.0051), (method, found)
        else:
            # What is left is the rounding of a file, and of float32.
            assert max(found, told) < SAME, (method, found)


def row_of(label: str, section: str) -> list[float]:
    """The numbers of a row of a table."""
    found = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    row = re.search(rf"^\| {re.escape(label)} \|(.*)\|$", found, re.MULTILINE)
    assert row, label
    return [float(cell) for cell in row[1].split("|") if re.fullmatch(r" *-?[\d.]+ *", cell)]


def correlation(one: dict[str, float], other: dict[str, float], some: list[str]) -> float:
    pair = torch.tensor([[each[edge] for edge in some] for each in (one, other)])
    return torch.corrcoef(pair.double())[0, 1].item()


def test_the_page_tells_of_norms_after_attention() -> None:
    exact, own = scores("gemma2", "exact"), its_own("gemma2", "eap")
    heads = [edge for edge in exact if edge.startswith("a")]
    assert len(heads) == 52
    assert "over the 52 edges of heads" in PAGE.replace("\n", " ")
    for label, estimate in (("as added", scores("gemma2", "eap")), ("raw results", own)):
        error = math.fsum(abs(estimate[edge] - exact[edge]) for edge in heads) / len(heads)
        told = row_of(label, "Norms after attention")
        assert [correlation(estimate, exact, heads), error] == pytest.approx(told, abs=6e-4)
    assert "`a1.h1->logits` is -0.258 exactly, -0.261 as added, -0.517 raw" in PAGE
    edge = "a1.h1->logits"
    found = [exact[edge], scores("gemma2", "eap")[edge], own[edge]]
    assert found == pytest.approx([-0.258, -0.261, -0.517], abs=6e-4)


@EACH
def test_the_page_tells_how_estimates_go_with_exact_values(name: str) -> None:
    exact = scores(name, "exact")
    estimates = {
        "its own": its_own(name, "eap-ig-activations"),
        **{
            label: scores(name, label.split('"')[1])
            for label in (
                'u\'s own group (ours, `"eap-ig-activations"`)',
                '`"eap-ig-inputs"`',
                '`"eap"`',
            )
        },
    }
    for label, estimate in estimates.items():
        told = row_of(label, "Integrated gradients of activations")[[*MODELS].index(name)]
        assert correlation(estimate, exact, [*exact]) == pytest.approx(told, abs=6e-4), label


# Circuits, whose clean prompts are sources.


def swapped(name: str) -> dict[str, Any]:
    found = padded(file_of(name), "pairs")
    names = {"source": "target", "target": "source"}
    return {
        f"{names.get(key.partition('_')[0], key.partition('_')[0])}_{key.partition('_')[2]}": value
        for key, value in found.items()
    }


def values(name: str, which: str, **options: Any) -> torch.Tensor:
    """`[circuits, prompts]`: the metric of each circuit of the file."""
    found, (model, api) = file_of(name), model_of(name)
    nodes = patched(name, method="eap").nodes
    circuits = {
        each["title"]: Circuit.of(nodes, groups(each[which], found["shared"]))
        for each in found["circuits"]
    }
    measured = evaluate_circuit(
        model, api, circuits, **swapped(name), progress=False, **options
    ).outcome
    return measured.raw[measured.metric]["circuit"].double()


@EACH
def test_circuits_are_its_own(name: str) -> None:
    told = torch.tensor([each["values"] for each in file_of(name)["circuits"]])
    gap = (values(name, "edges") - told).abs().max().item()
    assert gap < 5e-5
    row = re.search(r"^\| circuits, patched[^|]*\|(.*)\|$", PAGE, re.MULTILINE)
    assert row
    assert float(row[1].split("|")[[*MODELS].index(name)]) < 5e-5
    # With the corrupted run outside, what it prunes is nothing.
    gap = (values(name, "left_by_pruning") - told).abs().max().item()
    assert gap < 5e-5


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("llama", "zero"),
        ("gemma2", "zero"),
        ("neox", "zero"),
        ("gpt2", "mean-positional"),
        ("llama", "mean-positional"),
        ("neox", "mean-positional"),
    ],
)
def test_ablated_circuits_are_its_own(name: str, way: str) -> None:
    """Those that its pruning leaves, for it prunes them first; the means are of clean prompts."""
    ablation: dict[str, Any] = {"ablation": "zero"}
    if way != "zero":
        reference = swapped(name)["source_tokens"]
        ablation = {"ablation": "mean", "per_position": True, "reference": reference}
    told = torch.tensor([each[way] for each in file_of(name)["circuits"]])
    found = values(name, "left_by_pruning", **ablation)
    torch.testing.assert_close(found, told.double(), rtol=0, atol=5e-5)


def test_the_page_tells_of_ablations() -> None:
    """What all edges out gives here, where that is not what it gives there."""
    for name, ablation, told in (
        ("gpt2", {"ablation": "zero"}, "1.634, 0.399, -1.731"),
        ("gpt2", {"ablation": "mean"}, "-0.839, -3.544, -0.322"),
        ("gemma2", {"ablation": "mean", "per_position": True}, "2.456, 0.960, 3.890"),
    ):
        assert told in PAGE.replace("\n", " ")
        if "mean" in ablation.values():
            ablation = {**ablation, "reference": swapped(name)["source_tokens"]}
        numbers = [float(each) for each in told.split(", ")]
        assert values(name, "edges", **ablation)[0].tolist() == pytest.approx(numbers, abs=6e-4)


@pytest.mark.filterwarnings("ignore:3 prompts are too few:nnpatch_core.errors.StatisticsWarning")
@pytest.mark.parametrize("absolute", [True, False])
@EACH
def test_curves_are_those_of_mib(name: str, absolute: bool) -> None:
    """Over our edges, by its own scores; of Gemma 2 ours are others."""
    (told,) = (
        each
        for each in file_of(name)["curves"]
        if each["absolute"] == absolute and each["grouped"] == (file_of(name)["shared"] > 1)
    )
    scored = patched(name, method="eap-ig-inputs")
    if name in POST_NORMS:
        ranked = its_own(name, "eap-ig-inputs")
        matrix = scored.matrix.clone()
        for edge, score in ranked.items():
            # Its scores grow with what is lost; see the page.
            matrix[scored.nodes.place(edge)] = -score
        scored = attrs.evolve(Circuit.of(scored.nodes, ranked), scores=matrix)
    curve = circuit_curve(
        *model_of(name),
        scored,
        **swapped(name),
        method="top",
        absolute=absolute,
        progress=False,
    )
    assert curve.cpr == pytest.approx(told["cpr"], abs=1e-5)
    assert curve.cmd == pytest.approx(told["cmd"], abs=1e-5)
    assert curve.faithfulness.tolist() == pytest.approx(told["faithfulness"], abs=1e-5)
    # And the page has them.
    numbers = f"{told['cpr']:.6f}, {told['cmd']:.6f}"
    assert numbers in PAGE


#: Of planted circuits and methods: what the page has beside MIB's numbers.
RANKED = [
    ("chain", "exact"),
    ("chain", "eap"),
    ("redundant", "eap"),
    ("backup", "eap"),
    ("backup", "eap-ig-inputs"),
    ("negative", "eap"),
]


@pytest.mark.parametrize(("name", "method"), RANKED)
def test_auroc_is_what_the_page_has(name: str, method: Any) -> None:
    """Over our edges and over MIB's, which has each key and value once for each query head."""
    circuit = planted(name)
    found = edge_patching(
        circuit.model,
        None,
        circuit.source_tokens,
        circuit.target_tokens,
        circuit.source_answer_index,
        circuit.target_answer_index,
        method=method,
        progress=False,
    )
    # Below that an edge is worth nothing, and its digits are of the machine.
    matrix = found.matrix.double().round(decimals=4)
    ours = auroc(matrix, Circuit.of(found.nodes, circuit.edges), absolute=True)

    def counted(edges: Sequence[str]) -> float:
        sizes = [(abs(float(matrix[found.nodes.place(edge)])), edge) for edge in edges]
        inside = [size for size, edge in sizes if edge in circuit.edges]
        outside = [size for size, edge in sizes if edge not in circuit.edges]
        wins = [(one > other) + 0.5 * (one == other) for one in inside for other in outside]
        return math.fsum(wins) / len(wins)

    assert ours == pytest.approx(counted(list(found.nodes)))
    theirs = counted([grouped(edge, 2) for edge in edge_names(found.nodes.n_layers, 4, False)])
    assert f'| {name}, `"{method}"` | {ours:.6f} | {theirs:.6f} | ' in PAGE
