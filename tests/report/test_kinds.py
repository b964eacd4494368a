"""Reports of outcomes of every kind, as sweeps, edges, circuits and subspaces give them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch

from nnpatch_core import (
    EdgeOutcome,
    MultiSite,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    edge_patching,
    evaluate_circuit,
    find_circuit,
    path_patching,
)
from nnpatch_core.report import advice
from nnpatch_core.subspace import Proportion, evaluate_subspace, train_subspace
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer
from tests.helpers.pages import Page

WORDS = [" red", " blue", " green", " black", " white", " pink", " brown", " grey"]
OTHERS = WORDS[1:] + WORDS[:1]
PAIRS = PromptPairs.from_texts(
    [f"the colour{word} is" for word in WORDS],
    [f"the colour{word} is" for word in OTHERS],
    WORDS,
    OTHERS,
    tiny_tokenizer([*WORDS, "the colour is"]),
)
MODEL = tiny_model()
EACH, LAST = Sites(["mlp", "q"], seq_pos_type="each"), Sites("mlp", seq_pos_type="last")
SITE = Site.get_site(tiny_api(), "resid", layer=1, seq_pos=[-1])
BOTH = MultiSite([SITE, Site.get_site(tiny_api(), "mlp", layer=2, seq_pos=[-1])])


def ran(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call gives; that prompts tell little is no news here."""
    with warnings.catch_warnings(action="ignore"):
        return run(MODEL, None, *arguments, **options)


@functools.cache
def found_circuit() -> Any:
    return ran(find_circuit, PAIRS, top_k=20, progress=False)


@functools.cache
def measured_edges() -> Any:
    return ran(edge_patching, PAIRS, progress=False)


KINDS: dict[str, tuple[Callable[[], Any], set[str], list[str]]] = {
    "activation": (
        lambda: ran(activation_patching, EACH, PAIRS, progress=False),
        {"one-direction"},
        ["8 pairs of prompts", "activation_patching("],
    ),
    "attribution": (
        lambda: ran(attribution_patching, EACH, PAIRS, progress=False),
        {"estimates-alone"},
        ["as gradients estimate it", "an estimate", "attribution_patching("],
    ),
    "ablation": (
        lambda: ran(ablation_patching, LAST, PAIRS, method="zero", progress=False),
        {"zero-ablation"},
        ["is set to zero", "over 8 prompts", "method='zero'", "other answer"],
    ),
    "mean": (
        lambda: ran(ablation_patching, LAST, PAIRS, method="mean", progress=False),
        set(),
        ["is set to its mean", "method='mean'"],
    ),
    "screened": (
        lambda: ran(
            activation_patching, EACH, PAIRS, screen="attribution", top_k=5, spot_checks=5,
            progress=False,
        ),
        set(),
        ["put 5 cells first", "a random 5 were measured", "percent confidence at most"],
    ),
    "means": (
        lambda: ran(activation_patching, LAST, PAIRS, keep="means", progress=False),
        set(),
        ["Only means over 8 prompts were kept"],
    ),
    "listed": (
        lambda: ran(
            activation_patching, Sites.from_sites([SITE, BOTH]), PAIRS, progress=False
        ),
        {"several-sites"},
        ["1 of 2 cells patch several sites"],
    ),
    "path": (
        lambda: ran(path_patching, ["a0.h0", "m0"], ["logits", "m1"], PAIRS, progress=False),
        {"one-direction"},
        ["paths of the model", "path_patching("],
    ),
    "edges": (
        measured_edges,
        {"one-direction"},
        ["190 edges of the model", "edge_patching("],
    ),
    "estimated edges": (
        lambda: ran(edge_patching, PAIRS, method="eap", progress=False),
        {"estimates-alone"},
        ["an estimate"],
    ),
    "ablated edges": (
        lambda: ran(edge_patching, PAIRS, ablation="zero", progress=False),
        {"zero-ablation"},
        ["is set to zero", "ablation='zero'"],
    ),
    "found": (
        found_circuit,
        {"chosen-here", "one-ablation"},
        ["find_circuit(", "seconds by stage", "The circuits that were run on the way"],
    ),
    "evaluation": (
        lambda: ran(
            evaluate_circuit, {"a": found_circuit().circuit, "b": found_circuit().circuit.top(2)},
            PAIRS, progress=False,
        ),
        {"no-controls", "one-direction", "one-ablation"},
        ["2 circuits", "The edges of a", "The edges of b", "evaluate_circuit("],
    ),
    "trained": (
        lambda: ran(train_subspace, SITE, PAIRS, epochs=2, progress=False),
        set(),
        ["train_subspace(", "held out", "random subspace", "The epochs"],
    ),
    "subspace": (
        lambda: ran(
            evaluate_subspace, ran(train_subspace, SITE, PAIRS, epochs=1, progress=False), PAIRS
        ),
        {"chosen-here", "few-prompts"},
        ["evaluate_subspace(", "whole component"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_report_of_every_kind(tmp_path: Path, kind: str) -> None:
    make, rules, words = KINDS[kind]
    out = make()
    with warnings.catch_warnings(action="error"):
        out.report(tmp_path / "one.html", question="Where is it?", warnings=["careful"])
        out.report(tmp_path / "two.html", question="Where is it?", warnings=["careful"])
        given = {each.rule for each in advice(out)}
    assert rules <= given
    found = Page(tmp_path / "one.html")
    found.check()
    for word in ["Where is it?", "careful"]:
        assert word in found.text
    out.report(tmp_path / "three.html")
    text = " ".join(Page(tmp_path / "three.html").text.split())
    for word in words:
        assert word in text
    assert {each.removeprefix("advice-") for each in found.ids if each[:7] == "advice-"} == given
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert found.tags.count("svg") == (0 if kind == "subspace" else 2 if kind == "found" else
                                       3 if kind == "evaluation" else 1)  # fmt: skip
    if kind not in ("means", "subspace"):
        assert "red" in found.text


def test_edges_from_a_file(tmp_path: Path) -> None:
    edges = measured_edges()
    edges.save(tmp_path / "edges")
    edges.report(tmp_path / "one.html")
    EdgeOutcome.load(tmp_path / "edges").report(tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_controls_of_a_circuit_are_seen() -> None:
    circuit = found_circuit().circuit
    whole = ran(
        evaluate_circuit, circuit, PAIRS, complement=True, random=1, minimality=True, progress=False
    )
    rules = {each.rule for each in advice(whole)}
    assert not {"no-controls", "one-direction", "overlap", "mixed-positions"} & rules
    alone = ran(evaluate_circuit, circuit, PAIRS, random=1, progress=False)
    rules = {each.rule for each in advice(alone)}
    assert "no-controls" not in rules
    assert "one-direction" in rules


def test_swapped_prompts_are_shown_with_their_own_answers(tmp_path: Path) -> None:
    """The metric has the answers as before, and confidence goes by that."""
    circuit = found_circuit().circuit
    plain, swapped = (
        ran(evaluate_circuit, circuit, PAIRS, swap=swap, progress=False) for swap in (False, True)
    )
    assert plain.outcome.prompts.answers["source"] == tuple(WORDS)
    assert swapped.outcome.prompts.answers["source"] == tuple(OTHERS)
    assert swapped.outcome.prompts.source_tokens.equal(plain.outcome.prompts.target_tokens)
    told = [{each.rule: each.text for each in advice(one)} for one in (plain, swapped)]
    assert told[0].get("not-confident") == told[1].get("not-confident")
    swapped.report(tmp_path / "report.html")
    assert "have changed places" in Page(tmp_path / "report.html").text


def test_a_subspace_and_what_it_is_a_part_of() -> None:
    evaluation = ran(train_subspace, SITE, PAIRS, epochs=1, progress=False).evaluation
    high, low = Proportion(0.9, 0.8, 1.0, 40), Proportion(0.1, 0.0, 0.2, 40)

    def rules(**rows: Proportion) -> list[str]:
        measured = {
            name: attrs.evolve(each, accuracy=rows.get(name.replace(" ", "_"), low))
            for name, each in evaluation.rows.items()
        }
        return [each.rule for each in advice(attrs.evolve(evaluation, rows=measured, pairs=40))]

    assert rules(subspace=high) == ["few-prompts", "more-than-whole"][1:]
    assert rules(subspace=high, whole_component=high) == []
    assert rules(subspace=high, whole_component=high, random_labels=high) == ["control-as-good"]


def test_how_many_pairs_a_share_takes() -> None:
    for share in (0.0, 0.3, 0.5, 1.0):
        for width in (0.05, 0.2, 0.5):
            count = Proportion(share, 0.0, 1.0, 1).needed(width)
            hits = torch.zeros(count)
            hits[: round(share * count)] = 1
            # The share of so many may be a little off, where it is no whole number.
            found = Proportion.of(hits)
            assert found.high - found.low <= width * 1.02
            fewer = hits[: round(0.9 * count)]
            fewer[:] = 0
            fewer[: round(share * len(fewer))] = 1
            if len(fewer) < count:
                other = Proportion.of(fewer)
                assert other.high - other.low > width


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.StatisticsWarning")
def test_a_value_that_is_1_for_any_prompts_says_so(tmp_path: Path) -> None:
    """The stream at the last token after the last layer is all of the answer."""
    model = tiny_model("llama")
    source = torch.tensor([[5, 6, 7, last] for last in range(10, 18)])
    target = torch.tensor([[5, 9, 7, last] for last in range(10, 18)])
    answers = torch.tensor([1] * 8), torch.tensor([2] * 8)
    told = {}
    for layer in (1, 2):
        sites = Sites("resid", [layer], "last")
        out = activation_patching(model, None, sites, source, target, *answers, progress=False)
        out.report(tmp_path / "report.html")
        told[layer] = "1 for any prompts" in (tmp_path / "report.html").read_text("utf-8")
    assert told == {1: False, 2: True}
