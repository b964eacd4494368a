"""Positions of each prompt: every way to sweep gives what plain hooks give, prompt by prompt."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import (
    CustomConstant,
    MultiSite,
    Outcome,
    Site,
    Sites,
    Span,
    attribution_patching,
)
from tests.helpers.oracle import Place, Prompt, lay_out, random_prompts
from tests.helpers.pairs import LAYERS, Pairs

COMPONENTS = ["resid_pre", "q", "k", "o", "mlp", "resid"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


@attrs.frozen
class Case:
    """Pairs of different lengths, and for each prompt `k` positions, all counted from the end."""

    pairs: Pairs
    target: tuple[tuple[int, ...], ...]
    source: tuple[tuple[int, ...], ...]

    @property
    def width(self) -> int:
        return self.pairs.width

    def left_padded(self, backs: tuple[tuple[int, ...], ...]) -> Tensor:
        """`[batch, k]`, from 0 in the left-padded batch."""
        return self.width - torch.tensor(backs)

    def spans(self) -> dict[str, Span]:
        """Each column as a span of one token."""
        source, target = self.left_padded(self.source), self.left_padded(self.target)
        return {
            f"s{column}": Span(
                torch.stack([source[:, column], source[:, column] + 1], 1),
                torch.stack([target[:, column], target[:, column] + 1], 1),
            )
            for column in range(source.shape[1])
        }

    def patched(self, prompt: int, *parts: tuple[Place, int]) -> Tensor:
        """`[vocab]` of one prompt, by plain hooks: each place with the number of its column."""
        oracle, source = self.pairs.oracle, self.pairs.source[prompt]
        taken = {self.target[prompt][column]: self.source[prompt][column] for _, column in parts}
        places = [
            place._replace(from_end=(self.target[prompt][column],)) for place, column in parts
        ]

        def donor(place: Place, back: int) -> Tensor:
            found = oracle.activation(source, place.component, place.layer)
            return oracle.part(found[len(source) - taken[back]], place)

        return oracle.replaced(self.pairs.target[prompt], places, donor)

    def value(self, *parts: tuple[Place, int]) -> float:
        """A cell's value."""
        prompts = range(len(self.pairs.source))
        patched = torch.stack([self.patched(prompt, *parts) for prompt in prompts])
        return self.scaled(self.pairs.difference(patched).mean().item())

    def scaled(self, mean: float) -> float:
        oracle = self.pairs.oracle
        ends = [
            self.pairs.difference(torch.stack([oracle.logits(each) for each in prompts])).mean()
            for prompts in (self.pairs.target, self.pairs.source)
        ]
        return (mean - ends[0].item()) / (ends[1] - ends[0]).item()

    def sweep(self, sites: Any, engine: str, **options: Any) -> Outcome:
        return self.pairs.sweep(sites, engine, spans=self.spans(), **options)


@st.composite
def cases(draw: st.DrawFn, variants: tuple[str, ...] = ("llama", "gemma3")) -> Case:
    count = draw(st.integers(1, 3))
    source = random_prompts(
        [draw(st.integers(3, 7)) for _ in range(count)], seed=draw(st.integers(0, 3))
    )
    target = random_prompts(
        [draw(st.integers(3, 7)) for _ in range(count)], seed=draw(st.integers(4, 7))
    )
    columns = draw(st.integers(1, 3))

    def backs(prompts: list[Prompt]) -> tuple[tuple[int, ...], ...]:
        rows = []
        for prompt in prompts:
            places = st.permutations(range(1, len(prompt) + 1))
            rows.append(tuple(draw(places)[:columns]))
        return tuple(rows)

    layout = draw(st.sampled_from(["left", "right", "mixed"]))
    pairs = Pairs(draw(st.sampled_from(variants)), source, target, layout, draw(st.integers(0, 1)))
    return Case(pairs, backs(target), backs(source))


RELAXED = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


def chunked(draw: st.DrawFn) -> dict[str, Any]:
    return draw(st.sampled_from([{}, {"batch_size": 1}, {"batch_size": 2}]))


def heads(case: Case, component: str) -> list[int | None]:
    return list(case.pairs.oracle.heads(component))


@RELAXED
@given(case=cases(), engine=st.sampled_from(["cone", "full"]), data=st.data())
def test_columns_and_spans_are_what_hooks_give(case: Case, engine: str, data: Any) -> None:
    component = data.draw(st.sampled_from(COMPONENTS))
    options = data.draw(st.sampled_from([{}, {"batch_size": 1}, {"batch_size": 2}]))
    columns = len(case.target[0])
    expected = torch.tensor(
        [
            [
                [
                    case.value((Place(component, layer, head), column))
                    for head in heads(case, component)
                ]
                for column in range(columns)
            ]
            for layer in range(LAYERS)
        ]
    ).squeeze(-1)
    given = {
        "columns": Sites(
            component,
            seq_pos_type="custom",
            seq_pos=case.left_padded(case.target),
            source_seq_pos=(-torch.tensor(case.source)).tolist(),
        ),
        "spans": Sites(component, seq_pos_type="spans", seq_pos=list(case.spans())),
    }
    for how, sites in given.items():
        out = case.sweep(sites, engine, **options)
        assert out.info["engine"] == engine
        torch.testing.assert_close(out[component], expected, **CLOSE)
        assert out.axes(component)[1].name == {"columns": "column", "spans": "span"}[how]


@RELAXED
@given(case=cases(), engine=st.sampled_from(["cone", "full"]), data=st.data())
def test_columns_together_are_what_hooks_give(case: Case, engine: str, data: Any) -> None:
    component = data.draw(st.sampled_from(COMPONENTS))
    sites = Sites(
        component,
        seq_pos_type=CustomConstant(-torch.tensor(case.target), case.left_padded(case.source)),
    )
    out = case.sweep(sites, engine, **data.draw(st.sampled_from([{}, {"batch_size": 2}])))
    for layer in range(LAYERS):
        for number, head in enumerate(heads(case, component)):
            parts = [
                (Place(component, layer, head), column) for column in range(len(case.target[0]))
            ]
            found = out[component][layer] if head is None else out[component][layer, number]
            assert found.item() == pytest.approx(case.value(*parts), rel=1e-3, abs=1e-4)


@RELAXED
@given(case=cases(), engine=st.sampled_from(["cone", "full"]), data=st.data())
def test_several_sites_with_sources_of_their_own(case: Case, engine: str, data: Any) -> None:
    """Two heads of one layer, a token of which each takes from another place."""
    layer = data.draw(st.integers(0, LAYERS - 1))
    columns = range(len(case.target[0]))
    first, second = (data.draw(st.sampled_from(columns)) for _ in range(2))
    api = case.pairs.api

    def site(name: str, head: int | None, column: int, at: int) -> Site:
        return Site.get_site(
            api,
            name,
            at,
            head,
            seq_pos=[[-row[column]] for row in case.target],
            source_seq_pos=[[-row[column]] for row in case.source],
        )

    both = MultiSite([site("q", 0, first, layer), site("mlp", None, second, layer)])
    out = case.sweep(Sites.from_sites([both]), engine)
    oracle = case.pairs.oracle
    rows = []
    for prompt, target in enumerate(case.pairs.target):
        source = case.pairs.source[prompt]

        def donor(place: Place, back: int, prompt: int = prompt, source: Prompt = source) -> Tensor:
            column = first if place.component == "q" else second
            assert back == case.target[prompt][column]
            found = oracle.activation(source, place.component, place.layer)
            return oracle.part(found[len(source) - case.source[prompt][column]], place)

        places = [
            Place("q", layer, 0, (case.target[prompt][first],)),
            Place("mlp", layer, None, (case.target[prompt][second],)),
        ]
        rows.append(oracle.replaced(target, places, donor))
    expected = case.scaled(case.pairs.difference(torch.stack(rows)).mean().item())
    assert out["q+mlp"][0].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@RELAXED
@given(case=cases(), data=st.data())
def test_estimates_of_spans_are_those_of_each_prompt_alone(case: Case, data: Any) -> None:
    """Whatever the estimate, a batch is its prompts: padding, chunks and neighbours do nothing."""
    component = data.draw(st.sampled_from(["q", "k", "o", "mlp", "resid"]))
    repair = data.draw(st.sampled_from([{}, {"steps": 3}, {"qk_fix": True}, {"grad_drop": True}]))
    if repair.get("qk_fix") and component not in ("q", "k"):
        repair = {}
    sites = Sites(component, seq_pos_type="spans", seq_pos=list(case.spans()))
    options = data.draw(st.sampled_from([{}, {"batch_size": 1}, {"batch_size": 2}]))
    out = estimated(case, sites, **repair, **options)
    for prompt in range(len(case.pairs.source)):
        alone = Case(
            attrs.evolve(
                case.pairs,
                source=[case.pairs.source[prompt]],
                target=[case.pairs.target[prompt]],
                layout="left",
                spare=0,
            ),
            (case.target[prompt],),
            (case.source[prompt],),
        )
        answers = case.pairs.answers
        single = estimated(
            alone,
            sites,
            answers=(answers[0][prompt : prompt + 1], answers[1][prompt : prompt + 1]),
            **repair,
        )
        torch.testing.assert_close(
            out.raw["logit_difference"][component][:, prompt],
            single.raw["logit_difference"][component][:, 0],
            **CLOSE,
        )


def estimated(case: Case, sites: Any, answers: Any = None, **options: Any) -> Outcome:
    pairs = case.pairs
    source, source_mask = lay_out(pairs.source, pairs.layout, pairs.width, seed=3)
    target, target_mask = lay_out(pairs.target, pairs.layout, pairs.width, seed=4)
    return attribution_patching(
        pairs.model,
        pairs.api,
        sites,
        source,
        target,
        *(pairs.answers if answers is None else answers),
        source_attention_mask=source_mask,
        target_attention_mask=target_mask,
        spans=case.spans(),
        progress=False,
        **options,
    )
