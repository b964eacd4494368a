"""A metric gets the logits of all prompts in their order, for one cell, however they were run.

What it must give is computed from logits that plain torch hooks took, cell by cell and prompt by
prompt: with it no number may depend on entry point, engine, or what was run together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    per_prompt,
    reads_tokens,
)
from nnpatch_core.engine.cone import ascent
from nnpatch_core.errors import EngineWarning, MemoryBudgetError
from nnpatch_core.metrics import with_context
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.faults import broken_after, failing_at, room_for
from tests.helpers.metrics import OF_LAST_TOKEN
from tests.helpers.oracle import Donor, Oracle, Place, Prompt

#: Padding is a part of what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

TARGETS: list[Prompt] = [(5, 9, 7, 8, 9, 4), (5, 6, 7, 3, 9, 14), (9, 8, 7, 16), (9, 4, 3, 12, 11)]
SOURCES: list[Prompt] = [(5, 6, 7, 8, 9, 24), (5, 6, 7, 8, 9, 4), (9, 8, 27, 6), (9, 4, 3, 12, 7)]
WIDTH, BATCH, BACK = 6, 4, 2
ANSWERS = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 5, 6, 7])
SITES = Sites(["q", "mlp", "resid"], layers=[1, 2], seq_pos_type="lastk", seq_pos=BACK)
#: Few enough for one prompt at a time.
SMALL = "96 KiB"
GAP = 2e-5


def laid(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Left-padded tokens and mask."""
    spare = [WIDTH - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * n + [*each] for n, each in zip(spare, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (WIDTH - n) for n in spare])
    return tokens, mask


# Metrics, each with the same in plain Python -----------------------------------------------------


def answer(logits: Tensor, context: MetricContext) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


def ranked(logits: Tensor, context: MetricContext) -> Tensor:
    """By the rank of the prompt in the batch."""
    own = answer(logits, context)
    return own * (1 + (own[:, None] > own).sum(1))


def below_mean(logits: Tensor, context: MetricContext) -> Tensor:
    """By what the others have."""
    own = answer(logits, context)
    return own - 0.5 * own.mean() + 0.1 * own * own.max()


def by_place(logits: Tensor) -> Tensor:
    """By the number of the row."""
    return logits[:, 3] * torch.arange(1.0, len(logits) + 1)


SETS = torch.tensor([[7, 8], [9, 10], [11, 12], [13, 14]])


def answer_sets(logits: Tensor) -> Tensor:
    """By sets of answers that lie in the order of the prompts."""
    return logits.gather(1, SETS[: len(logits)]).logsumexp(1)


@reads_tokens(lambda context: context.source_answer_index[:, None])
def declared_below_mean(logits: Tensor, context: MetricContext) -> Tensor:
    """Reads few tokens, but of all prompts."""
    return below_mean(logits, context)


@per_prompt
@reads_tokens(lambda context: context.source_answer_index[:, None])
def answer_logit(logits: Tensor, context: MetricContext) -> Tensor:
    """Of each prompt alone."""
    return answer(logits, context)


def plain_answer(rows: list[list[float]]) -> list[float]:
    return [row[token] for row, token in zip(rows, ANSWERS[0].tolist(), strict=True)]


def plain_below_mean(rows: list[list[float]]) -> list[float]:
    own = plain_answer(rows)
    return [x - 0.5 * sum(own) / len(own) + 0.1 * x * max(own) for x in own]


#: Name: the metric, and `[prompts][vocab]` to numbers, in plain Python.
METRICS: dict[str, tuple[Any, Callable[[list[list[float]]], list[float]]]] = {
    "ranked": (
        ranked,
        lambda rows: [x * (1 + sum(x > y for y in plain_answer(rows))) for x in plain_answer(rows)],
    ),
    "below_mean": (below_mean, plain_below_mean),
    "by_place": (by_place, lambda rows: [row[3] * (n + 1) for n, row in enumerate(rows)]),
    "answer_sets": (
        answer_sets,
        lambda rows: [
            float(np.logaddexp.reduce([row[token] for token in tokens]))
            for row, tokens in zip(rows, SETS.tolist(), strict=True)
        ],
    ),
    "declared_below_mean": (declared_below_mean, plain_below_mean),
    "answer_logit": (answer_logit, plain_answer),
    "logit_difference": (
        "logit_difference",
        lambda rows: [
            row[one] - row[other]
            for row, one, other in zip(rows, ANSWERS[0].tolist(), ANSWERS[1].tolist(), strict=True)
        ],
    ),
}
EVERY = {name: metric for name, (metric, _) in METRICS.items()}
#: How the metrics are asked for: whether others are measured beside one decides what is computed.
ASKED = {
    "all": EVERY,
    "relative": {"below_mean": below_mean},
    "few tokens": {name: EVERY[name] for name in ("declared_below_mean", "logit_difference")},
    "mixed": {"kl": "kl_divergence", "by_place": by_place, "logit_difference": "logit_difference"},
}


# What must come out ------------------------------------------------------------------------------


@functools.cache
def oracle() -> Oracle:
    return Oracle(tiny_model("llama"), "llama")


def places_of(out: Any) -> Iterator[tuple[str, int, Place]]:
    """Each cell of an outcome: its name and number, and where it is."""
    for name, cells in out.cells.items():
        for number, index in enumerate(cells.index.tolist()):
            layer, position, *head = index
            yield name, number, Place(name, layer, *(head or [None]), (WIDTH - position,))


def donor_of(entry: str, row: int) -> Donor:
    known = oracle()
    if entry == "zero":
        return known.zeros
    if entry == "mean":
        return known.mean(TARGETS)
    if entry == "resample":
        return known.of_prompt(TARGETS[partners()[row]])
    return known.of_prompt(SOURCES[row])


def partners() -> list[int]:
    """Whom resampling draws with seed 0, read off a sweep of the last layer's output."""
    return _partners()


@functools.cache
def _partners() -> list[int]:
    sites = Sites("resid", layers=[2], seq_pos_type="last")
    out = run("resample", sites=sites, engine="full", metric={"own": lambda logits: logits[:, 40]})
    found = out.raw["own"]["resid"][0].tolist()
    known = [float(oracle().logits(prompt)[40]) for prompt in TARGETS]
    return [min(range(BATCH), key=lambda row: abs(known[row] - value)) for value in found]


@functools.cache
def patched_rows(entry: str, place: Place) -> list[list[float]]:
    """`[prompts][vocab]` of one cell, by plain hooks."""
    return [
        oracle().replaced(prompt, [place], donor_of(entry, row)).tolist()
        for row, prompt in enumerate(TARGETS)
    ]


def run(entry: str, **options: Any) -> Any:
    options = {"sites": SITES, "metric": EVERY, "progress": False, **options}
    model, sites = options.pop("model", None) or tiny_model("llama"), options.pop("sites")
    tokens, mask = laid(TARGETS)
    if entry in ("zero", "mean", "resample"):
        return ablation_patching(
            model, tiny_api(), sites, tokens, *ANSWERS, method=entry, attention_mask=mask, **options
        )
    if entry == "screened":
        options = {"screen": "attribution", "top_k": 1000, **options}
    if entry in ("attribution", "steps", "atp*"):
        options |= {"steps": {"steps": 3}, "atp*": {"qk_fix": True, "grad_drop": True}}.get(
            entry, {}
        )
        options.pop("engine", None)
    patch = activation_patching if entry in ("activation", "screened") else attribution_patching
    source, own = laid(SOURCES)
    return patch(
        model,
        tiny_api(),
        sites,
        source,
        tokens,
        *ANSWERS,
        source_attention_mask=own,
        target_attention_mask=mask,
        **options,
    )


#: Differentiable ones only.
SMOOTH = {name: EVERY[name] for name in ("below_mean", "by_place", "answer_sets", "answer_logit")}
CHUNKINGS: dict[str, dict[str, Any]] = {
    "all": {},
    "one": {"batch_size": 1},
    "two": {"batch_size": 2},
    "three": {"batch_size": 3},
    "small": {"memory_budget": SMALL},
}
chunkings = pytest.mark.parametrize("chunking", CHUNKINGS)
engines = pytest.mark.parametrize("engine", ["cone", "full"])


def check(out: Any, entry: str, names: Sequence[str]) -> None:
    for name in names:
        plain = METRICS[name][1]
        for site, number, place in places_of(out):
            expected = torch.tensor(plain(patched_rows(entry, place)))
            found = out.raw[name][site][number].float()
            assert (found - expected).abs().max() < GAP, (name, place, found, expected)


@pytest.mark.parametrize("asked", ["all", "relative", "few tokens"])
@chunkings
@engines
def test_activation_patching(engine: str, chunking: str, asked: str) -> None:
    metrics = ASKED[asked]
    out = run("activation", engine=engine, metric=metrics, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, "activation", [*metrics])


@pytest.mark.parametrize("entry", ["zero", "mean", "resample"])
@chunkings
@engines
def test_ablation_patching(engine: str, chunking: str, entry: str) -> None:
    out = run(entry, engine=engine, **CHUNKINGS[chunking])
    assert (out.info["engine"], "fallback" in out.info) == (engine, False)
    check(out, entry, [*EVERY])


@chunkings
@engines
def test_a_screened_sweep(engine: str, chunking: str) -> None:
    metrics = {name: EVERY[name] for name in ("below_mean", "by_place", "logit_difference")}
    # A graph needs more than a forward.
    options = {"small": {"memory_budget": "180 KiB"}}.get(chunking, CHUNKINGS[chunking])
    out = run("screened", engine=engine, metric=metrics, **options)
    check(out, "screened", [*metrics])


# Estimates: by autograd of plain hooks -----------------------------------------------------------


class Wide(Oracle):
    """The same model, with the graph."""

    def along(self, place: Place, row: int, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """What a prompt has a share of the way to its source: logits, leaf, and the whole way."""
        target, source = TARGETS[row], SOURCES[row]
        there = oracle().activation(target, place.component, place.layer)
        given = oracle().activation(source, place.component, place.layer)
        common = min(len(target), len(source))
        move = torch.zeros_like(there)
        move[len(target) - common :] = given[len(source) - common :] - there[-common:]
        leaf = (there + share * move).requires_grad_()
        whole = place._replace(head=None)
        remove = self._hook(whole, lambda activation: leaf[None].to(activation.dtype))
        try:
            logits = self.model(input_ids=torch.tensor([target]), use_cache=False).logits[0, -1]
        finally:
            remove()
        return logits, leaf, move


@functools.cache
def wide() -> Wide:
    return Wide(tiny_model("llama"), "llama")


@functools.cache
def context() -> MetricContext:
    runs = [torch.stack([*map(oracle().logits, prompts)]) for prompts in (SOURCES, TARGETS)]
    return MetricContext(*ANSWERS, *runs)


@functools.cache
def path_effects(place: Place, name: str, steps: int | None) -> list[Tensor]:
    """`[seq, width]` of each prompt: what a change there is estimated to do."""
    points, weights = [-1.0], [2.0]
    if steps is not None:
        points, weights = (each.tolist() for each in np.polynomial.legendre.leggauss(steps))
    metric = with_context(SMOOTH[name])
    found: list[Tensor] = []
    for point, weight in zip(points, weights, strict=True):
        runs = [wide().along(place, row, (point + 1) / 2) for row in range(BATCH)]
        total = metric(torch.stack([logits for logits, _, _ in runs]), context()).sum()
        gradients = torch.autograd.grad(total, [leaf for _, leaf, _ in runs])
        parts = [weight / 2 * g * move for g, (_, _, move) in zip(gradients, runs, strict=True)]
        found = parts if not found else [a + b for a, b in zip(found, parts, strict=True)]
    return found


@pytest.mark.parametrize(("entry", "steps"), [("attribution", None), ("steps", 3)])
@chunkings
def test_attribution_patching(chunking: str, entry: str, steps: int | None) -> None:
    options = {"small": {"memory_budget": "180 KiB"}}.get(chunking, CHUNKINGS[chunking])
    out = run(entry, metric=SMOOTH, **options)
    for name in SMOOTH:
        before = torch.tensor(METRICS[name][1](context().target_logits.tolist()))
        for site, number, place in places_of(out):
            effects = path_effects(place._replace(head=None, from_end=()), name, steps)
            back = place.from_end[0]
            expected = before + torch.stack(
                [oracle().part(each[-back], place).sum().detach() for each in effects]
            )
            found = out.raw[name][site][number].float()
            assert (found - expected).abs().max() < 1e-4, (name, place)


@chunkings
def test_both_repairs(chunking: str) -> None:
    options = {"small": {"memory_budget": "180 KiB"}}.get(chunking, CHUNKINGS[chunking])
    out, whole = (run("atp*", metric=SMOOTH, **each) for each in (options, {}))
    for name in SMOOTH:
        for site in out:
            gap = (out.raw[name][site] - whole.raw[name][site]).abs().max()
            assert gap < 1e-4, (name, site)


def test_the_logits_along_paths_wait_in_memory_too() -> None:
    metrics = {"below_mean": below_mean}
    options = {"memory_budget": "400 KiB", "batch_size": 1, "sites": FEW}
    with pytest.raises(MemoryBudgetError, match=r"'below_mean' together.*@per_prompt"):
        run("attribution", metric=metrics, steps=80, **options)
    # Each way out that the message names.
    alone = {"mine": per_prompt(lambda logits: logits[:, 3])}
    run("attribution", metric=alone, steps=80, **options)
    run("attribution", metric=metrics, steps=8, **options)
    run("attribution", metric=metrics, steps=80, **options | {"memory_budget": "4 MiB"})


FEW = Sites("resid", layers=[2], seq_pos_type="last")


# Groups of cells, checkpoints, what is left of a run ---------------------------------------------


def numbers(out: Any) -> Tensor:
    return torch.cat([out.raw[metric][name].flatten() for metric in out.metrics for name in out])


def few_at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("nnpatch_core.memory.Limits.cells", lambda *_: count)


def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each target run was recorded for."""
    from nnpatch_core.engine import table

    found: list[int] = []
    engine, *others = table.ENGINES

    def spied(patches: Any, *given: Any) -> Any:
        found.append(len(patches.cells))
        return engine.open(patches, *given)

    monkeypatch.setattr(table, "ENGINES", (attrs.evolve(engine, open=spied), *others))
    return found


@pytest.mark.parametrize("entry", ["activation", "zero", "mean", "resample", "screened"])
@pytest.mark.parametrize("batch_size", [1, None])
@engines
def test_cells_in_groups(
    monkeypatch: pytest.MonkeyPatch, engine: str, batch_size: int | None, entry: str
) -> None:
    metrics = {name: EVERY[name] for name in ("below_mean", "by_place", "answer_logit")}
    few_at_once(monkeypatch, 3)
    found = opened(monkeypatch)
    out = run(entry, engine=engine, batch_size=batch_size, metric=metrics)
    check(out, entry, [*metrics])
    if engine == "cone" and batch_size == 1:
        assert max(found) <= 3
        # What is known without a run, a screen leaves out.
        groups = 6 if entry == "screened" else 8
        assert len(found) == 4 * groups
        assert out.info["groups"].startswith(f"{groups} groups of cells, each with unpatched runs")


def test_metrics_that_are_declared_need_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    few_at_once(monkeypatch, 3)
    found = opened(monkeypatch)
    run("activation", metric=[*OF_LAST_TOKEN, answer_logit], batch_size=1)
    assert found == [24] * 4


def test_where_no_cell_is_left_open_there_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a cell come in one trace: none waits."""
    few_at_once(monkeypatch, 1)
    found = opened(monkeypatch)
    out = run("activation", metric=below_mean, sites=FEW)
    assert found == [1]
    assert "groups" not in out.info


def test_the_bar_counts_groups(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few_at_once(monkeypatch, 3)
    run("activation", metric=below_mean, batch_size=1, progress=True)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert "24/24 cells" in last
    assert "about 00:00 left" in last


@pytest.mark.parametrize("cells", [None, 3])
@pytest.mark.parametrize("chunking", ["all", "two", "small"])
@pytest.mark.parametrize("asked", ["relative", "few tokens", "mixed"])
@engines
def test_a_broken_sweep_resumes_bitwise(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
    asked: str,
    chunking: str,
    cells: int | None,
) -> None:
    if cells is not None:
        few_at_once(monkeypatch, cells)
    each = Sites(["mlp", "resid"], layers=[0, 1], seq_pos_type="each")
    options = {"engine": engine, "metric": ASKED[asked], "sites": each, **CHUNKINGS[chunking]}
    # Small buckets, so that there are many.
    monkeypatch.setattr("nnpatch_core.memory.needs._TOKENS_AT_ONCE", {"cpu": 12})
    unbroken = run("activation", **options)
    path = tmp_path / "sweep"
    for stop in (2, 5):
        mend = broken_after(monkeypatch, stop, engine)
        with pytest.raises(KeyboardInterrupt):
            run("activation", checkpoint=path, **options)
        mend()
    resumed = run("activation", checkpoint=path, **options)
    assert numbers(resumed).equal(numbers(unbroken))
    for name in unbroken:
        assert resumed.cells[name].elided.equal(unbroken.cells[name].elided)
    assert numbers(run("activation", checkpoint=path, **options)).equal(numbers(unbroken))


def test_only_what_was_measured_by_all_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the second chunk: no cell is complete, so all are run again."""
    from safetensors import safe_open

    path = tmp_path / "sweep"
    # Of each chunk the target run, and 24 cells.
    mend = broken_after(monkeypatch, 24 + 6, "full")
    options = {"engine": "full", "batch_size": 2, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        run("activation", metric=ASKED["few tokens"], **options)
    mend()
    with safe_open(str(path), framework="pt") as file:
        done = file.get_tensor("done").bool()
    assert done.any(1).sum() == done.all(1).sum() == 6


def test_a_checkpoint_knows_which_metrics_wait(tmp_path: Path) -> None:
    from nnpatch_core.errors import CheckpointError

    def mine(logits: Tensor) -> Tensor:
        return logits[:, 3]

    run("activation", metric=mine, checkpoint=tmp_path / "sweep")
    with pytest.raises(CheckpointError, match=r"given all prompts: mine, .* then, no metric now"):
        run("activation", metric=per_prompt(mine), checkpoint=tmp_path / "sweep")


@pytest.mark.parametrize("call", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"cells": 3}])
def test_an_engine_that_fails_midway(
    monkeypatch: pytest.MonkeyPatch, call: int, options: dict[str, Any]
) -> None:
    """What was handed over stands, and the full engine runs the rest."""
    options = dict(options)
    if "cells" in options:
        few_at_once(monkeypatch, options.pop("cells"))
    calls = failing_at(monkeypatch, call, RuntimeError("no such shape"))
    each = Sites(["mlp", "resid"], layers=[0, 1], seq_pos_type="each")
    # Small buckets, so that some come before the fault.
    monkeypatch.setattr("nnpatch_core.memory.needs._TOKENS_AT_ONCE", {"cpu": 12})
    with pytest.warns(EngineWarning, match="no such shape"):
        out = run("activation", sites=each, **options)
    assert len(calls) >= call
    assert "no such shape" in out.info["fallback"]
    check(out, "activation", [*EVERY])


def test_a_device_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnpatch_core.errors import MemoryWarning

    room_for(monkeypatch, 3)
    with pytest.warns(MemoryWarning):
        out = run("activation", engine="cone")
    check(out, "activation", [*EVERY])


@pytest.mark.parametrize("chunking", ["all", "two"])
def test_what_ran_together_runs_together_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunking: str
) -> None:
    """What is in a trace decides on last digits, which a small model may not show."""
    monkeypatch.setattr("nnpatch_core.memory.needs._TOKENS_AT_ONCE", {"cpu": 12})
    each = Sites(["mlp", "resid"], layers=[0, 1], seq_pos_type="each")
    options = {"metric": below_mean, "sites": each, **CHUNKINGS[chunking]}
    real, seen = ascent.Ascent.run, []

    def spied(self: Any) -> Any:
        rows = [len(self.prompts), self.start, *self.prompts.tolist()]
        seen.append((*rows, *map(str, self.edits)))
        return real(self)

    monkeypatch.setattr(ascent.Ascent, "run", spied)
    run("activation", **options)
    unbroken = [*seen]
    counts = []
    for stop in range(1, len(unbroken)):
        path = tmp_path / str(stop)
        mend = broken_after(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            run("activation", checkpoint=path, **options)
        mend()
        seen.clear()
        run("activation", checkpoint=path, **options)
        counts.append(len(seen))
        assert set(seen) <= set(unbroken)
    # The later, the less is left.
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] <= len(unbroken)
