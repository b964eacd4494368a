"""Advice: for each rule something that breaks it, and something that does not."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import attrs
import pytest
import torch

from nnpatch_core import Outcome
from nnpatch_core.errors import OutcomeError
from nnpatch_core.report import RULES, Facts, Width, advice
from nnpatch_core.report.advice import advice_on
from nnpatch_core.results import Baseline
from nnpatch_core.sites import Axis
from tests.helpers.broken_rules import CASES
from tests.helpers.made import made
from tests.helpers.made_up import outcome
from tests.helpers.paths import ROOT


def rules_of(found: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return [each.rule for each in advice(found)]


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_that_is_broken_says_so(name: str) -> None:
    broken, fine = CASES[name]
    (given,) = (each for each in advice_on(Facts(**broken)) if each.rule == name)
    assert given.text[0].isupper() or given.text[0].isdigit()
    assert given.text.endswith(".")
    assert "  " not in given.text
    assert name not in [each.rule for each in advice_on(Facts(**fine))]


def test_nothing_that_is_known_is_no_advice() -> None:
    assert advice_on(Facts()) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_source_says_who_when_and_where(rule: Any) -> None:
    source = rule.source
    assert re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{4,5}|doi\.org/10\.\S+)", source.link)
    assert 1990 < source.year < 2030
    assert str(source) == f"{source.authors} ({source.year}), {source.title}"


def test_the_pages_table_has_every_rule_with_its_source() -> None:
    page = (ROOT / "docs" / "reports-details.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| \[.*\]\((.*)\) \|$", page, re.MULTILINE)
    assert rows == [(rule.name, rule.source.link) for rule in RULES]


def test_prompts_that_do_not_tell_a_number_ask_for_more() -> None:
    width = Width("mlp L1", 0.2, math.inf, 3)
    (given,) = (each for each in advice_on(Facts(width=width, prompts=3)))
    assert "do not tell" in given.text


def test_many_prompts_are_not_all_listed() -> None:
    facts = Facts(unsure=tuple(range(0, 400, 2)), prompts=400)
    (given,) = advice_on(facts)
    assert len(given.text) < 300
    assert "…" in given.text


# Whole outcomes.

AXES = (Axis("layer", tuple(range(6))), Axis("position", tuple(range(14))))


def both_ways(found: Outcome) -> Outcome:
    """The same, as though each pair were there the other way round as well."""
    prompts = found.prompts
    half = len(prompts.source_tokens) // 2
    swapped = attrs.evolve(
        prompts,
        source_tokens=torch.cat([prompts.source_tokens[:half], prompts.target_tokens[half:]]),
        target_tokens=torch.cat([prompts.target_tokens[:half], prompts.source_tokens[half:]]),
    )
    return attrs.evolve(found, prompts=swapped)


def test_a_clear_sweep_both_ways_has_no_advice() -> None:
    found = both_ways(made([[0.1] * 20, [0.9] * 20, [0.3] * 20], [1.0] * 20, tokens=[1] * 20))
    assert rules_of(found) == []


def test_a_sweep_goes_one_way() -> None:
    found = outcome({"mlp": AXES}, noise=0.01)
    assert "one-direction" in rules_of(found)
    assert "one-direction" not in rules_of(both_ways(found))
    assert "one-direction" not in rules_of(outcome({"mlp": AXES}, scale="change"))


def test_prompts_are_not_confident() -> None:
    found = outcome({"mlp": AXES}, noise=0.01)
    baseline = found.baseline
    assert "not-confident" not in rules_of(found)
    for run, sign in (("source", -1.0), ("target", 1.0)):
        values = getattr(baseline, run).clone()
        values[3] = sign * values[3].abs()
        broken = attrs.evolve(
            found, baselines={"logit_difference": attrs.evolve(baseline, **{run: values})}
        )
        (given,) = (each for each in advice(broken) if each.rule == "not-confident")
        assert "prompt 3 of 32" in given.text


def test_confidence_goes_by_a_difference_under_its_own_name() -> None:
    found = outcome({"mlp": AXES}, metrics=["given"], noise=0.01)
    swapped = Baseline(found.baseline.target, found.baseline.source)
    assert "not-confident" not in rules_of(attrs.evolve(found, baselines={"given": swapped}))


def test_a_denominator_may_be_zero() -> None:
    whole = [1.0, -1.0, 1.2, -1.1, 0.9, -1.0]
    assert "small-denominator" in rules_of(made([[0.5] * 6, [0.1] * 6], whole))
    assert "small-denominator" not in rules_of(made([[0.5] * 6, [0.1] * 6], [1.0] * 6))


def test_some_pairs_hardly_differ() -> None:
    whole = [1.0] * 18 + [0.05, -0.2]
    (given,) = (
        each for each in advice(made([[0.1] * 20, [0.02] * 20], whole)) if "denom" in each.rule
    )
    assert "Prompts 18-19 of 20" in given.text


def test_the_width_that_is_asked_for() -> None:
    draw = torch.Generator().manual_seed(0)
    values = 0.5 + 0.4 * torch.randn(1, 12, generator=draw, dtype=torch.float64)
    found = made(values.numpy(), [1.0] * 12)
    assert "few-prompts" in rules_of(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "few-prompts" not in [each.rule for each in advice(found, width=2.0)]
        assert float(found.prompts_needed("mlp", 0.2)[0]) > 12
    (given,) = (each for each in advice(found) if each.rule == "few-prompts")
    assert f"about {float(found.prompts_needed('mlp', 0.2)[0]):.0f}" in given.text


@pytest.mark.parametrize("width", [0, -1, math.inf, math.nan, "wide", True, None])
def test_no_width(width: Any) -> None:
    with pytest.raises(OutcomeError, match="width must be a positive number"):
        advice(made([[0.5] * 3], [1.0] * 3), width=width)


@pytest.mark.parametrize("given", [None, "out", Outcome, {}])
def test_no_outcome(given: Any) -> None:
    with pytest.raises(OutcomeError, match="advice is on an outcome"):
        advice(given)


def test_the_two_strongest_overlap() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(2, 20, generator=draw, dtype=torch.float64)
    # Of two names, as neighbouring layers of almost one value are one fact.
    near = made({"attn": [[*(0.5 + noise[0])]], "mlp": [[*(0.52 + noise[1])]]}, [1.0] * 20)
    far = made({"attn": [[*(0.5 + noise[0])]], "mlp": [[*(9.0 + noise[1])]]}, [1.0] * 20)
    other = made({"attn": [[*(-0.5 - noise[0])]], "mlp": [[*(0.52 + noise[1])]]}, [1.0] * 20)
    assert "overlap" in rules_of(near)
    assert "overlap" not in rules_of(far)
    assert "overlap" in rules_of(other)


def test_one_fact_is_no_race() -> None:
    draw = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(20, generator=draw, dtype=torch.float64)
    layers = [[*(0.50 + noise)], [*(0.51 + noise)]]
    assert "overlap" not in rules_of(made(layers, [1.0] * 20))


def test_prompts_of_two_lengths_and_of_two_templates() -> None:
    found = outcome({"mlp": AXES}, noise=0.01)
    prompts = found.prompts
    mask = prompts.source_mask.clone()
    mask[0, :2] = 0
    shorter = attrs.evolve(prompts, source_mask=mask, target_mask=mask)
    other = attrs.evolve(
        prompts,
        **{
            run: torch.cat([tokens[:16], (tokens[16:] + 5) % 14])
            for run, tokens in (
                ("source_tokens", prompts.source_tokens),
                ("target_tokens", prompts.target_tokens),
            )
        },
    )
    last = found.sel(position=-1)
    for given in (shorter, other):
        assert "mixed-positions" in rules_of(attrs.evolve(found, prompts=given))
        # Where one position alone was swept none is compared with another.
        assert "mixed-positions" not in rules_of(attrs.evolve(last, prompts=given))
    assert "mixed-positions" not in rules_of(found)


def test_estimates_alone() -> None:
    found = outcome({"mlp": AXES}, kind="attribution")
    cells = found.cells["mlp"]
    guessed = attrs.evolve(cells, exact=cells.elided.all(-1))
    one = guessed.exact.clone()
    one[-1] = True
    assert "estimates-alone" in rules_of(attrs.evolve(found, cells={"mlp": guessed}))
    measured = attrs.evolve(guessed, exact=one)
    assert "estimates-alone" not in rules_of(attrs.evolve(found, cells={"mlp": measured}))


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("noise", {"kind": "activation (noise)"}),
        ("noise", {"info": {"model": "m", "corruption": "Gaussian noise"}}),
        ("zero-ablation", {"kind": "ablation (zero)"}),
        ("zero-ablation", {"kind": "edge (ablation zero)"}),
        ("several-sites", {"info": {"model": "m", "together": "1 of 9 cells patch several"}}),
    ],
)
def test_what_the_words_of_an_outcome_tell(rule: str, changes: dict[str, Any]) -> None:
    found = outcome({"mlp": AXES}, noise=0.01)
    assert rule not in rules_of(found)
    assert rule in rules_of(attrs.evolve(found, **changes))


def test_probability_alone() -> None:
    alone = outcome({"mlp": AXES}, metrics=["answer_probability"])
    both = outcome({"mlp": AXES}, metrics=["answer_probability", "logit_difference"])
    assert "probability-alone" in rules_of(alone)
    assert "probability-alone" not in rules_of(both)


@pytest.mark.parametrize(("method", "told"), [("mean", True), ("resample", True), ("zero", False)])
def test_prompts_of_one_answer(method: str, told: bool) -> None:
    found = attrs.evolve(outcome({"mlp": AXES}), kind=f"ablation ({method})")
    count = found.count
    one = attrs.evolve(found.prompts, answers={"source": (" are",) * count})
    both = attrs.evolve(found.prompts, answers={"source": (" is", *(" are",) * (count - 1))})
    assert ("one-answer" in rules_of(attrs.evolve(found, prompts=one))) is told
    for prompts in (both, attrs.evolve(found.prompts, answers={})):
        assert "one-answer" not in rules_of(attrs.evolve(found, prompts=prompts))
