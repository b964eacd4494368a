"""Metrics of every kind: at positions, of answer sets, with data, relative to the batch.

Their numbers do not depend on entry point, engine, or what was run together; and are those of plain
logits of each prompt, run alone by plain torch hooks on a copy.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core.testing import tiny_model
from tests.helpers.measured import (
    BATCH,
    EVERY,
    METRICS,
    SOURCES,
    TARGETS,
    oracle,
    patched_rows,
    places_of,
    run,
    unpatched_rows,
)
from tests.helpers.oracle import Oracle, Place

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

GAP = 3e-5
CHUNKINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"batch_size": 1},
    "three": {"batch_size": 3},
    "small": {"memory_budget": "600 KiB"},
}
chunkings = pytest.mark.parametrize("chunking", CHUNKINGS)
engines = pytest.mark.parametrize("engine", ["cone", "full"])


def check(out: Any, entry: str, names: Any) -> None:
    for name in names:
        plain = METRICS[name][1]
        baseline = out.for_metric(name).baseline
        gap = (baseline.target - plain(unpatched_rows(TARGETS))).abs().max()
        assert gap < GAP, name
        if entry == "activation":
            gap = (baseline.source - plain(unpatched_rows(SOURCES))).abs().max()
            assert gap < GAP, name
        for site, number, place in places_of(out):
            expected = plain(patched_rows(entry, place)).float()
            found = out.raw[name][site][number].float()
            assert (found - expected).abs().max() < GAP, (name, place, found, expected)


@chunkings
@engines
def test_activation_patching(engine: str, chunking: str) -> None:
    out = run("activation", engine=engine, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, "activation", EVERY)


@pytest.mark.parametrize("entry", ["zero", "mean"])
@chunkings
@engines
def test_ablation_patching(engine: str, chunking: str, entry: str) -> None:
    metrics = {name: each for name, each in EVERY.items() if name != "moved"}
    out = run(entry, engine=engine, metric=metrics, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, entry, metrics)


@chunkings
@engines
def test_a_screened_sweep(engine: str, chunking: str) -> None:
    # A graph needs more than a forward.
    options = {"small": {"memory_budget": "1400 KiB"}}.get(chunking, CHUNKINGS[chunking])
    out = run("screened", engine=engine, **options)
    check(out, "activation", EVERY)


# Estimates: by autograd of plain hooks -----------------------------------------------------------

#: `ranked` has a derivative that says nothing of ranks; all others are smooth.
SMOOTH = {name: each for name, each in EVERY.items() if name != "ranked"}


class Along(Oracle):
    """The same model, with the graph from one activation on."""

    def logits_along(self, place: Place, row: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """A share of the way to the source: logits `[seq, vocab]`, leaf, and the whole way."""
        target, source = TARGETS[row], SOURCES[row]
        there = oracle().activation(target, place.component, place.layer)
        given = oracle().activation(source, place.component, place.layer)
        common = min(len(target), len(source))
        move = torch.zeros_like(there)
        move[len(target) - common :] = given[len(source) - common :] - there[-common:]
        leaf = (there + share * move).requires_grad_()
        remove = self._hook(place, lambda activation: leaf[None].to(activation.dtype))
        try:
            logits = self.model(input_ids=torch.tensor([target]), use_cache=False).logits[0]
        finally:
            remove()
        return logits, leaf, move


@functools.cache
def along() -> Along:
    return Along(tiny_model("llama"), "llama")


@functools.cache
def effects(place: Place, name: str, steps: int | None) -> list[Tensor]:
    """`[seq, width]` of each prompt: what a change there is estimated to do."""
    points, weights = [-1.0], [2.0]
    if steps is not None:
        points, weights = (each.tolist() for each in np.polynomial.legendre.leggauss(steps))
    found: list[Tensor] = []
    for point, weight in zip(points, weights, strict=True):
        runs = [along().logits_along(place, row, (point + 1) / 2) for row in range(BATCH)]
        rows = [(logits, prompt) for (logits, _, _), prompt in zip(runs, TARGETS, strict=True)]
        total = METRICS[name][1](rows).sum()
        gradients = torch.autograd.grad(total, [leaf for _, leaf, _ in runs])
        parts = [weight / 2 * g * move for g, (_, _, move) in zip(gradients, runs, strict=True)]
        found = parts if not found else [a + b for a, b in zip(found, parts, strict=True)]
    return found


@pytest.mark.parametrize(("entry", "steps"), [("attribution", None), ("steps", 3)])
@chunkings
def test_attribution_patching(chunking: str, entry: str, steps: int | None) -> None:
    options = {"small": {"memory_budget": "1400 KiB"}}.get(chunking, CHUNKINGS[chunking])
    out = run(entry, metric=SMOOTH, **options)
    for name in SMOOTH:
        before = METRICS[name][1](unpatched_rows(TARGETS)).float()
        for site, number, place in places_of(out):
            found = effects(place._replace(head=None, from_end=()), name, steps)
            back = place.from_end[0]
            expected = before + torch.stack(
                [
                    oracle().part(each[-back], place).sum().detach()
                    if back <= len(each)
                    else torch.tensor(0.0)
                    for each in found
                ]
            )
            gap = (out.raw[name][site][number].float() - expected).abs().max()
            assert gap < 1e-4, (name, place, gap)


# One law ----------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    names=st.lists(st.sampled_from([*EVERY]), min_size=1, max_size=4, unique=True),
    entry=st.sampled_from(["activation", "zero", "mean", "screened", "attribution"]),
    engine=st.sampled_from(["cone", "full"]),
    batch_size=st.integers(1, BATCH),
    budget=st.sampled_from([None, "1400 KiB", "2 MiB"]),
)
def test_no_number_depends_on_what_runs_together(
    names: list[str], entry: str, engine: str, batch_size: int, budget: str | None
) -> None:
    if entry in ("zero", "mean"):
        # An unablated run is no distance away from itself.
        names = [name for name in names if name != "moved"] or ["loss"]
    if entry in ("screened", "attribution"):
        names = [name for name in names if name in SMOOTH] or ["loss"]
    metrics = {name: EVERY[name] for name in names}
    out = run(entry, metric=metrics, engine=engine, batch_size=batch_size, memory_budget=budget)
    if entry == "attribution":
        whole = run(entry, metric=EVERY | SMOOTH)
        for name in names:
            for site in out:
                assert (out.raw[name][site] - whole.raw[name][site]).abs().max() < GAP
    else:
        check(out, "activation" if entry == "screened" else entry, names)
