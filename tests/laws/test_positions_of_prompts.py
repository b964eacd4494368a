"""Positions of each prompt: every way to sweep gives what plain hooks give, prompt by prompt."""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnsight import NNsight
from torch import Tensor

from nnpatch_core import (
    CustomConstant,
    MultiSite,
    Outcome,
    Site,
    Sites,
    Span,
    attribution_patching,
    plan_sweep,
)
from nnpatch_core.errors import PromptWarning
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
def cases(
    draw: st.DrawFn,
    variants: tuple[str, ...] = ("llama", "gemma3"),
    counts: tuple[int, int] = (1, 3),
    apart: bool = False,
) -> Case:
    """`apart`: whether the columns of a prompt are other tokens; two may be one token otherwise."""
    count = draw(st.integers(*counts))
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
            places = st.lists(
                st.integers(1, len(prompt)), min_size=columns, max_size=columns, unique=apart
            )
            rows.append(tuple(draw(places)))
        return tuple(rows)

    layout = draw(st.sampled_from(["left", "right", "mixed"]))
    pairs = Pairs(draw(st.sampled_from(variants)), source, target, layout, draw(st.integers(0, 1)))
    return Case(pairs, backs(target), backs(source))


RELAXED = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


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
@given(case=cases(apart=True), engine=st.sampled_from(["cone", "full"]), data=st.data())
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


@RELAXED
@given(case=cases(counts=(1, 2)), data=st.data())
def test_an_estimate_of_a_column_does_not_depend_on_the_others(case: Case, data: Any) -> None:
    """Two columns may be one token that takes its value from two places."""
    # The first column's token once more, from another place where there is one.
    target = tuple((*row, row[0]) for row in case.target)
    source = tuple(
        (*row, row[0] % len(prompt) + 1)
        for row, prompt in zip(case.source, case.pairs.source, strict=True)
    )
    case = Case(case.pairs, target, source)
    component = data.draw(st.sampled_from(["q", "k", "mlp"]))
    repair = data.draw(st.sampled_from([{}, {"steps": 3}, {"grad_drop": True}]))
    names = list(case.spans())
    together = estimated(case, Sites(component, seq_pos_type="spans", seq_pos=names), **repair)
    for column, name in enumerate(names):
        alone = estimated(case, Sites(component, seq_pos_type="spans", seq_pos=[name]), **repair)
        torch.testing.assert_close(together[component][:, column], alone[component][:, 0], **CLOSE)


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


def ablated(case: Case, sites: Any, engine: str, **options: Any) -> Outcome:
    return case.pairs.ablate(sites, engine, spans=case.spans(), **options)


ABLATIONS: list[dict[str, Any]] = [
    {"method": "zero"},
    {"method": "mean"},
    {"method": "mean", "per_position": True},
    {"method": "resample"},
]


@pytest.mark.parametrize("kind", ABLATIONS, ids=lambda kind: " ".join(map(str, kind.values())))
@RELAXED
@given(case=cases(counts=(2, 2)), engine=st.sampled_from(["cone", "full"]), data=st.data())
def test_ablations_of_spans_are_what_hooks_give(
    case: Case, engine: str, data: Any, kind: dict[str, Any]
) -> None:
    component = data.draw(st.sampled_from(["q", "k", "mlp", "resid"]))
    options = data.draw(st.sampled_from([{}, {"batch_size": 1}]))
    sites = Sites(component, seq_pos_type="spans", seq_pos=list(case.spans()))
    out = ablated(case, sites, engine, **kind, **options)
    oracle, prompts = case.pairs.oracle, case.pairs.target
    unpatched = case.pairs.difference(torch.stack([oracle.logits(each) for each in prompts]))
    for layer in range(LAYERS):
        for column in range(len(case.target[0])):
            for number, head in enumerate(heads(case, component)):
                place = Place(component, layer, head)
                rows = []
                for prompt, tokens in enumerate(prompts):
                    value = ablation_of(case, kind, place, prompt, column)
                    there = place._replace(from_end=(case.target[prompt][column],))
                    rows.append(oracle.replaced(tokens, [there], lambda *_, v=value: v))
                found = out[component][layer, column]
                found = found if head is None else found[number]
                expected = (case.pairs.difference(torch.stack(rows)) - unpatched).mean().item()
                assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def ablation_of(case: Case, kind: dict[str, Any], place: Place, prompt: int, column: int) -> Tensor:
    """The vector that an ablation puts into a prompt at its own position of a column."""
    oracle, prompts = case.pairs.oracle, case.pairs.target

    def at(other: int) -> Tensor:
        whole = oracle.activation(prompts[other], place.component, place.layer)
        return oracle.part(whole[len(prompts[other]) - case.target[other][column]], place)

    if kind["method"] == "zero":
        return torch.zeros(1)
    if kind["method"] == "resample":
        return at(1 - prompt)
    if kind.get("per_position"):
        return torch.stack([at(other) for other in range(len(prompts))]).double().mean(0)
    found = [oracle.activation(each, place.component, place.layer) for each in prompts]
    return oracle.part(torch.cat(found).double().mean(0), place)


@RELAXED
@given(case=cases(("llama",)), data=st.data())
def test_a_trace_of_the_users_own_takes_each_prompts_positions(case: Case, data: Any) -> None:
    component = data.draw(st.sampled_from(["q", "o", "mlp", "resid"]))
    layer = data.draw(st.integers(0, LAYERS - 1))
    column = data.draw(st.integers(0, len(case.target[0]) - 1))
    pairs = case.pairs
    head = data.draw(st.sampled_from(heads(case, component)))
    site = Site.get_site(
        pairs.api,
        component,
        layer,
        head,
        seq_pos=case.left_padded(case.target)[:, [column]],
        source_seq_pos=(-torch.tensor(case.source))[:, [column]],
    )
    model = NNsight(pairs.model)
    runs = []
    for prompts, visit in ((pairs.source, site.cache), (pairs.target, site.patch)):
        tokens, mask = lay_out(prompts, "left", case.width)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with model.trace(tokens, attention_mask=mask, position_ids=positions):
            visit(model)
            logits = model.output.logits[:, -1].save()
        runs.append(logits.detach())
    expected = torch.stack(
        [
            case.patched(prompt, (Place(component, layer, head), column))
            for prompt in range(len(pairs.target))
        ]
    )
    torch.testing.assert_close(runs[1], expected, **CLOSE)


@RELAXED
@given(case=cases(), data=st.data())
def test_the_order_of_prompts_changes_nothing(case: Case, data: Any) -> None:
    order = data.draw(st.permutations(range(len(case.target))))
    turned = Case(
        attrs.evolve(
            case.pairs,
            source=[case.pairs.source[n] for n in order],
            target=[case.pairs.target[n] for n in order],
        ),
        tuple(case.target[n] for n in order),
        tuple(case.source[n] for n in order),
    )
    sites = Sites("resid", seq_pos_type="spans", seq_pos=list(case.spans()))
    # Each prompt keeps the answers of its own number.
    metric = torch.tensor([*order])

    def first(logits: Tensor) -> Tensor:
        return logits[:, 7] - logits[:, 50]

    before = case.sweep(sites, "auto", metric=first).raw["first"]["resid"]
    after = turned.sweep(sites, "auto", metric=first).raw["first"]["resid"]
    torch.testing.assert_close(after, before[:, metric], **CLOSE)


@RELAXED
@given(lengths=st.lists(st.integers(3, 6), min_size=1, max_size=3), data=st.data())
def test_equal_rows_are_one_list(lengths: list[int], data: Any) -> None:
    """`[batch, k]` of equal rows gives what `[k]` gives; so do sources equal to the target's."""
    source = random_prompts(lengths, seed=1)
    target = random_prompts(lengths, seed=2)
    pairs = Pairs("llama", source, target, data.draw(st.sampled_from(["left", "mixed"])))
    shortest = min(lengths)
    columns = data.draw(st.lists(st.integers(-shortest, -1), min_size=1, max_size=3, unique=True))
    kind = data.draw(st.sampled_from(["custom", "custom_constant"]))
    rows = [columns] * len(lengths)

    def swept(seq_pos: Any, sources: Any = None) -> Tensor:
        sites = Sites("resid", seq_pos_type=kind, seq_pos=seq_pos, source_seq_pos=sources)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            return pairs.sweep(sites, "auto")["resid"]

    plain, own = swept(columns), swept(rows)
    if kind == "custom":
        plain = plain[:, columns]
    torch.testing.assert_close(own, plain, **CLOSE)
    torch.testing.assert_close(swept(rows, rows), own, **CLOSE)
    again = swept(columns, columns)
    torch.testing.assert_close(again[:, columns] if kind == "custom" else again, plain, **CLOSE)


@RELAXED
@given(case=cases(), data=st.data())
def test_a_screen_measures_and_estimates_the_same_positions(case: Case, data: Any) -> None:
    sites = Sites(["resid", "k"], seq_pos_type="spans", seq_pos=list(case.spans()))
    screen = data.draw(st.sampled_from(["attribution", "atp*"]))
    plain = case.sweep(sites, "auto")
    screened = case.sweep(sites, "auto", screen=screen, top_k=2, spot_checks=1)
    for name in plain:
        exact = screened.exact(name)
        # In logits: two runs may differ by so little that a value is rounding, many times over.
        one, other = (each.patched(name)[exact].double() for each in (screened, plain))
        torch.testing.assert_close(one, other, **CLOSE)


@RELAXED
@given(case=cases(), data=st.data())
def test_a_plan_tells_the_rows_that_are_run(case: Case, data: Any) -> None:
    """Told from tokens, it has each row that the sweep needs: the sweep may find more to elide."""
    pairs = case.pairs
    source, source_mask = lay_out(pairs.source, pairs.layout, pairs.width, seed=3)
    target, target_mask = lay_out(pairs.target, pairs.layout, pairs.width, seed=4)
    sites = Sites("resid", seq_pos_type="spans", seq_pos=list(case.spans()))
    plan = plan_sweep(
        pairs.model,
        pairs.api,
        sites,
        source,
        target,
        source_attention_mask=source_mask,
        target_attention_mask=target_mask,
        spans=case.spans(),
    )
    out = case.sweep(sites, "cone")
    assert plan.cells == len(out.cells["resid"].index)
    assert plan.elided <= int(out.cells["resid"].elided.sum())
    starts = {int(bucket.start) for bucket in plan.buckets}
    assert starts <= set(case.left_padded(case.target).flatten().tolist())
