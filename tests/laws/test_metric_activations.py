"""Metrics that read activations of the patched run: a logit lens, the size of what a head writes.

Against what plain torch hooks read in the same patched run, of each prompt alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    MultiSite,
    Site,
    Sites,
    activation_patching,
    attribution_patching,
    per_prompt,
    reads_activations,
    reads_positions,
    reads_tokens,
)
from nnpatch_core.errors import MetricError
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.counted import Counted
from tests.helpers.measured import (
    ANSWERS,
    BATCH,
    EVERY,
    METRICS,
    SOURCES,
    TARGETS,
    donor_of,
    oracle,
    patched_rows,
    places_of,
    run,
)
from tests.helpers.oracle import Place

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

GAP = 5e-5
COMPONENTS = ("resid_pre", "q", "k", "v", "o", "attn", "mlp", "resid")


def site(component: str, layer: int, head: int | None, *positions: int) -> Site:
    return Site.get_site(tiny_api(), component, layer, head, positions or None)


Read = Callable[[Place], Callable[[int], Tensor]]
HEAD, LENS, TWO, WHOLE = (
    site("o", 1, 2, -1),
    site("resid", 1, None, -1),
    site("mlp", 2, None, -2, -1),
    site("resid_pre", 2, None),
)


@functools.cache
def frozen() -> Any:
    model = tiny_model("llama")
    for weight in model.parameters():
        weight.requires_grad = False
    return model


@per_prompt
@reads_activations([HEAD])
def head_size(logits: Tensor, context: MetricContext) -> Tensor:
    """How much a head writes, before its output projection."""
    return context.activations[HEAD][:, 0].norm(dim=-1)


@per_prompt
@reads_activations([LENS])
def lens(logits: Tensor, context: MetricContext) -> Tensor:
    """The answer's logit, were the middle layer the last."""
    seen = frozen().lm_head(frozen().model.norm(context.activations[LENS][:, 0]))
    return seen.gather(1, context.source_answer_index[:, None])[:, 0]


@reads_activations([TWO, HEAD])
def relative(logits: Tensor, context: MetricContext) -> Tensor:
    """Against the other prompts, with two sites and the last token's logits."""
    own = context.activations[TWO].sum((1, 2)) + context.activations[HEAD][:, 0, 1]
    own = own + logits[:, 3] / 10
    return own - own.mean() / 2


@per_prompt
@reads_activations([WHOLE])
@reads_positions([-3, -2])
def with_positions(logits: Tensor, context: MetricContext) -> Tensor:
    """Every token's, where padding is nan; and logits at positions of its own."""
    found = context.activations[WHOLE]
    real = ~found.isnan().any(-1, keepdim=True)
    return torch.where(real, found, 0.0).tanh().sum((1, 2)) / 10 + logits[:, 0, 7]


#: What each reads, and the same from `[seq, width]` of each and the logits `[seq, vocab]`.
PLAIN: dict[str, tuple[Any, list[Place], Callable[..., Tensor]]] = {
    "head_size": (head_size, [Place("o", 1, 2)], lambda row, logits, o: o[-1].norm()),
    "lens": (
        lens,
        [Place("resid", 1)],
        lambda row, logits, x: frozen().lm_head(frozen().model.norm(x[-1]))[ANSWERS[0][row]],
    ),
    "relative": (
        relative,
        [Place("mlp", 2), Place("o", 1, 2)],
        lambda row, logits, mlp, o: mlp[-2:].sum() + o[-1, 1] + logits[-1, 3] / 10,
    ),
    "with_positions": (
        with_positions,
        [Place("resid_pre", 2)],
        lambda row, logits, x: x.tanh().sum() / 10 + logits[-3, 7],
    ),
}
OWN = {name: metric for name, (metric, _, _) in PLAIN.items()}
SWEPT = Sites(["q", "o", "mlp", "resid"], layers=[0, 1, 2], seq_pos_type="lastk", seq_pos=3)


#: Every place that one of them reads.
READ = list(dict.fromkeys(read for _, reads, _ in PLAIN.values() for read in reads))


@functools.cache
def patched_run(entry: str, row: int, place: Place | None) -> tuple[Tensor, dict[Place, Tensor]]:
    """The logits of a prompt at each token, and all that is read, in one run."""
    prompt = (SOURCES if entry == "source" else TARGETS)[row]
    places = [] if place is None else [place]
    logits, seen = oracle().all_when_replaced(prompt, places, donor_of(entry, row), READ)
    return logits, dict(zip(READ, seen, strict=True))


@functools.cache
def expected(entry: str, name: str, place: Place | None) -> Tensor:
    _, reads, formula = PLAIN[name]
    found = []
    for row in range(BATCH):
        logits, seen = patched_run(entry, row, place)
        found.append(formula(row, logits, *[seen[read] for read in reads]))
    own = torch.stack(found)
    return own - own.mean() / 2 if name == "relative" else own


def check(out: Any, entry: str, names: Any) -> None:
    for name in names:
        if name not in PLAIN:
            for component, number, place in places_of(out):
                plain = METRICS[name][1](patched_rows(entry, place)).float()
                assert (out.raw[name][component][number].float() - plain).abs().max() < GAP
            continue
        baseline = out.for_metric(name).baseline
        assert (baseline.target - expected(entry, name, None)).abs().max() < GAP
        if entry == "activation":
            assert (baseline.source - expected("source", name, None)).abs().max() < GAP
        for component, number, place in places_of(out):
            gap = out.raw[name][component][number].float() - expected(entry, name, place)
            assert gap.abs().max() < GAP, (name, place, gap)


CHUNKINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"batch_size": 1},
    "three": {"batch_size": 3},
    "small": {"memory_budget": "1 MiB"},
}


@pytest.mark.parametrize("entry", ["activation", "zero"])
@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("engine", ["cone", "full"])
def test_what_plain_hooks_read(engine: str, chunking: str, entry: str) -> None:
    out = run(entry, metric=OWN, engine=engine, sites=SWEPT, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, entry, OWN)


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_in_each_layer(component: str, engine: str) -> None:
    """Read where it is patched, below it, and above it."""
    for layer in range(3):
        head = 1 if component in ("q", "k", "v", "o") else None
        read = site(component, layer, head, -1, -2)

        @per_prompt
        @reads_activations([read])
        def mine(logits: Tensor, context: MetricContext, read: Site = read) -> Tensor:
            return context.activations[read].mean((1, 2)) + logits[:, 0] / 100

        sites = Sites(component, layers=[0, 1, 2], seq_pos_type="lastk", seq_pos=2)
        out = run("activation", metric=mine, engine=engine, sites=sites)
        for name, number, place in places_of(out):
            for row, prompt in enumerate(TARGETS):
                donor = donor_of("activation", row)
                at = Place(component, layer, head)
                logits, (seen,) = oracle().all_when_replaced(prompt, [place], donor, [at])
                gap = out.raw["mine"][name][number, row] - seen[-2:].mean() - logits[-1, 0] / 100
                assert abs(float(gap)) < GAP, (layer, place)


@settings(max_examples=20)
@given(
    names=st.lists(st.sampled_from([*OWN]), min_size=1, max_size=2, unique=True),
    others=st.lists(st.sampled_from(["loss", "below_mean", "at_own"]), max_size=2, unique=True),
    entry=st.sampled_from(["activation", "zero", "screened"]),
    engine=st.sampled_from(["cone", "full"]),
    batch_size=st.integers(1, BATCH),
)
def test_beside_other_metrics(
    names: list[str], others: list[str], entry: str, engine: str, batch_size: int
) -> None:
    metrics = {name: OWN[name] for name in names} | {name: EVERY[name] for name in others}
    out = run(entry, metric=metrics, engine=engine, batch_size=batch_size, sites=SWEPT)
    check(out, "activation" if entry == "screened" else entry, metrics)


def test_attribution_differentiates_through_them() -> None:
    """A small step of each cell, by exact runs: the estimate is its slope."""
    sites = Sites(["mlp", "resid"], layers=[0, 1], seq_pos_type="lastk", seq_pos=1)
    names = ["head_size", "lens", "relative"]
    out = run("attribution", metric={name: OWN[name] for name in names}, sites=sites)
    parts = run(
        "attribution", metric={name: OWN[name] for name in names}, sites=sites, batch_size=2
    )
    share = 1e-3
    for name in names:
        _, reads, formula = PLAIN[name]
        for component, number, place in places_of(out):
            moved: list[Tensor] = []
            before: list[Tensor] = []
            for row, prompt in enumerate(TARGETS):
                there = oracle().activation(prompt, place.component, place.layer)[-1]
                given_ = oracle().activation(SOURCES[row], place.component, place.layer)[-1]
                for found, step in ((before, 0.0), (moved, share)):
                    value = there + step * (given_ - there)
                    donor = lambda *_, value=value: value  # noqa: E731
                    logits, seen = oracle().all_when_replaced(prompt, [place], donor, reads)
                    found.append(formula(row, logits, *seen).double())
            slope = (torch.stack(moved) - torch.stack(before)) / share
            if name == "relative":
                # Of the sum over all prompts, of which each has half of its own.
                slope = slope / 2
            change = out.raw[name][component][number] - out.for_metric(name).baseline.target
            assert (change - slope).abs().max() < 2e-2 * max(1.0, float(slope.abs().max()))
            again = parts.raw[name][component][number]
            assert (out.raw[name][component][number] - again).abs().max() < 1e-4


def test_where_nothing_is_read_is_unread_and_elided() -> None:
    early = site("resid", 0, None, -3)

    @per_prompt
    @reads_activations([early])
    @reads_positions([-3])
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        return context.activations[early].sum((1, 2)) + logits[:, 0, 0]

    sites = Sites("resid", layers=[0, 1], seq_pos_type="lastk", seq_pos=4)
    out = run("activation", metric=mine, sites=sites, engine="cone")
    assert out.cells["resid"].elided.view(2, 4, BATCH)[:, 2:].all()
    full = run("activation", metric=mine, sites=sites, engine="full")
    assert (out.raw["mine"]["resid"] - full.raw["mine"]["resid"]).abs().max() < GAP


REFUSED: dict[str, tuple[Any, str]] = {
    "a name": (["resid"], "must be a list of Site"),
    "several": ([MultiSite([HEAD, LENS])], "must be a list of Site"),
    "no such layer": ([site("resid", 7, None, -1)], "reads resid L7"),
    "far": ([site("resid", 1, None, -9)], "position -9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sites_that_are_none(case: str) -> None:
    wanted, told = REFUSED[case]
    model = Counted(tiny_model("llama"))
    metric = {"mine": reads_activations(wanted)(lambda logits: logits[:, 0])}
    with pytest.raises(MetricError, match=told):
        run("activation", metric=metric, model=model.model)
    assert not model.forwards


@pytest.mark.parametrize("options", [{"steps": 2}, {"grad_drop": True}, {"qk_fix": True}])
def test_repairs_that_look_at_logits_alone_are_refused(options: dict[str, Any]) -> None:
    model = Counted(tiny_model("llama"))
    tokens = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
    answers = torch.tensor([1]), torch.tensor([2])
    arguments = model.model, tiny_api(), Sites("q", seq_pos_type="last"), *tokens, *answers
    if "qk_fix" in options:
        attribution_patching(*arguments, metric=head_size, progress=False, **options)
        return
    with pytest.raises(MetricError, match="'head_size' reads activations, and"):
        attribution_patching(*arguments, metric=head_size, progress=False, **options)
    assert not model.forwards
    if "grad_drop" in options:
        with pytest.raises(MetricError, match="'head_size' reads activations, and"):
            activation_patching(
                *arguments, metric=head_size, screen="atp*", top_k=1, progress=False
            )


def test_undeclared_tokens_are_tried_beside_activations() -> None:
    @reads_activations([LENS])
    @reads_tokens(lambda context: context.source_answer_index[:, None])
    def mine(logits: Tensor, context: MetricContext) -> Tensor:
        own = logits.gather(1, context.source_answer_index[:, None])
        return own[:, 0] + context.activations[LENS].sum((1, 2))

    out = run("activation", metric={"mine": mine}, sites=SWEPT)
    assert out["resid"].isfinite().all()

    @reads_activations([LENS])
    @reads_tokens(lambda context: context.source_answer_index[:, None])
    def sly(logits: Tensor, context: MetricContext) -> Tensor:
        own = logits.gather(1, context.source_answer_index[:, None])
        return own[:, 0] + (logits > own).sum(1)

    with pytest.raises(MetricError, match="did not declare with reads_tokens"):
        run("activation", metric={"sly": sly}, sites=SWEPT)
