"""What is kept of a sweep in subspaces: its outcome, its checkpoint, and metrics that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import (
    MetricContext,
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    per_prompt,
    plan_sweep,
    reads_activations,
)
from nnpatch_core.errors import CheckpointError
from nnpatch_core.spaces import Features, Space, Subspace
from nnpatch_core.sweep.fingerprint import fingerprint
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.checkpoints import ANSWERS, SOURCE, TARGET, header, numbers, sweep
from tests.helpers.faults import broken_after
from tests.helpers.oracle import Oracle, Place, part_spanned
from tests.helpers.refusals import raises

WIDTH, HEAD = 32, 8


def space(rank: int = 2, seed: int = 0, width: int = WIDTH) -> Subspace:
    return Subspace.random(width, rank, seed)


def grid(part: Any, **more: Any) -> Sites:
    return Sites(["resid", "mlp"], seq_pos_type="each", subspace=part, **more)


class Coder:
    """An autoencoder with a number."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def encode(self, x: Tensor) -> Tensor:
        return (x * self.scale).relu()

    def decode(self, c: Tensor) -> Tensor:
        return c


class First:
    """A space of a user's own, which is no more than it must be; it cannot be hashed."""

    width, rank = WIDTH, 1
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> Any:
        return torch.ones(2) == 1

    def encode(self, x: Tensor) -> Tensor:
        return x[..., :1]

    def decode(self, c: Tensor) -> Tensor:
        return torch.nn.functional.pad(c, (0, WIDTH - 1))

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        return torch.cat([source[..., :1], target[..., 1:]], -1)

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        return torch.cat([values, target[..., 1:]], -1)


# Checkpoints.


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("part", [space(), {0: space(), 2: space(1)}, Coder(1.0)])
def test_resumes_bitwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, part: Any
) -> None:
    unbroken = sweep(sites=grid(part), engine=engine)
    mend = broken_after(monkeypatch, 3, engine)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "c", sites=grid(part), engine=engine)
    mend()
    resumed = sweep(tmp_path / "c", sites=grid(part), engine=engine)
    assert numbers(resumed).equal(numbers(unbroken))


BASIS = space(2).basis
OTHERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "another seed": lambda: space(2, 1),
    "another rank": lambda: space(1),
    "turned": lambda: Subspace(BASIS.flip(1)),
    "a mean": lambda: Subspace(BASIS, mean=torch.ones(WIDTH)),
    "of one layer alone": lambda: {0: Subspace(BASIS), 1: space(2, 1), 2: Subspace(BASIS)},
    "features": lambda: Coder(1.0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_subspace_is_refused(tmp_path: Path, other: str) -> None:
    sweep(tmp_path / "c", sites=grid(Subspace(BASIS)))
    with raises(CheckpointError, "subspace"):
        sweep(tmp_path / "c", sites=grid(OTHERS[other]()))
    # An equal one is the same.
    sweep(tmp_path / "c", sites=grid(Subspace(BASIS.clone())))


def test_which_layer_has_which_is_told(tmp_path: Path) -> None:
    one, other = space(2), space(2, 1)
    sweep(tmp_path / "c", sites=grid({0: one, 1: other, 2: one}))
    for mapping in ({0: other, 1: one, 2: other}, {0: one, 1: other, 2: other}):
        with raises(CheckpointError, "subspace"):
            sweep(tmp_path / "c", sites=grid(mapping))


@pytest.mark.parametrize("others", [Coder(2.0), Features(Coder(1.0), [0, 1]), First()])
def test_features_are_told_by_their_numbers(tmp_path: Path, others: Any) -> None:
    sweep(tmp_path / "c", sites=grid(Coder(1.0)))
    with raises(CheckpointError, "subspace"):
        sweep(tmp_path / "c", sites=grid(others))


def test_a_subspace_that_was_used_is_the_same(tmp_path: Path) -> None:
    """As one in another process, which never was."""
    fresh, used = Subspace(BASIS, mean=torch.ones(WIDTH)), Subspace(BASIS, mean=torch.ones(WIDTH))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        used.interchange(torch.ones(WIDTH, dtype=dtype), torch.zeros(WIDTH, dtype=dtype))
    sweep(tmp_path / "c", sites=grid(fresh))
    before = header(tmp_path / "c")
    sweep(tmp_path / "c", sites=grid(used))
    assert header(tmp_path / "c") == before


def test_a_metric_that_holds_a_subspace_is_the_same_after_it_was_used() -> None:
    held = space(2)

    def metric(logits: Tensor) -> Tensor:
        return held.project(logits[:, :WIDTH])[:, 0]

    word = fingerprint(metric).digest
    held.project(torch.ones(WIDTH, dtype=torch.float64))
    assert fingerprint(metric).digest == word
    assert fingerprint(held) != fingerprint(space(2, 1))


# Outcomes.


def entries() -> dict[str, Callable[..., Outcome]]:
    model, rest = tiny_model("llama"), {"progress": False}
    runs = SOURCE, TARGET, *ANSWERS
    return {
        "activation": lambda sites: activation_patching(model, tiny_api(), sites, *runs, **rest),
        "means": lambda sites: activation_patching(
            model, tiny_api(), sites, *runs, keep="means", **rest
        ),
        "screened": lambda sites: activation_patching(
            model, tiny_api(), sites, *runs, screen="attribution", top_k=3, **rest
        ),
        "attribution": lambda sites: attribution_patching(model, tiny_api(), sites, *runs, **rest),
        "ablation": lambda sites: ablation_patching(
            model, tiny_api(), sites, TARGET, *ANSWERS, **rest
        ),
    }


@pytest.mark.parametrize("entry", ["activation", "means", "screened", "attribution", "ablation"])
def test_an_outcome_says_in_which_subspace_it_was(tmp_path: Path, entry: str) -> None:
    run = entries()[entry]
    out = run(grid({0: space(2), 2: space(1)}))
    told = out.info["subspace"]
    assert "Subspace(rank 2 of width 32)" in told
    assert "Subspace(rank 1 of width 32)" in told
    assert "subspace" not in run(grid(None)).info
    assert run(grid({0: space(2, 1), 2: space(1)})).info["subspace"] != told
    out.save(tmp_path / "out")
    again = Outcome.load(tmp_path / "out")
    assert again.info == out.info
    for name in out:
        assert again[name].equal(out[name])


@pytest.mark.parametrize("part", [space(), First(), Coder(1.0)])
def test_means_are_those_of_all_prompts(part: Any) -> None:
    run = entries()
    whole, means = run["activation"](grid(part)), run["means"](grid(part))
    for name in whole:
        torch.testing.assert_close(means[name], whole[name], atol=1e-5, rtol=0)


def test_labels_tell_subspaces_apart() -> None:
    get = lambda part: Site.get_site(tiny_api(), "resid", 1, None, [-1], subspace=part)  # noqa: E731
    one, other = space(2), space(2, 1)
    cells = [get(None), get(one), get(other), get(one), get(space(1)), get(Coder(1.0))]
    out = sweep(sites=Sites.from_sites([*cells, MultiSite([get(one), get(other)], name="both")]))
    (axis,) = out.axes("resid")
    assert axis.labels == (
        "resid L1 [-1]",
        "resid L1 [-1] in rank 2 #1",
        "resid L1 [-1] in rank 2 #2",
        "resid L1 [-1] in rank 2 #1",
        "resid L1 [-1] in rank 1",
        "resid L1 [-1] in all of its features",
    )
    (axis,) = out.axes("both")
    assert axis.labels == ("resid L1 [-1] in rank 2 + resid L1 [-1] in rank 2",)
    assert out["resid"][1] == out["resid"][3]


def test_a_space_without_words_is_called_by_its_kind(tmp_path: Path) -> None:
    """An address is another one in each process, which could go on from no file."""
    first = sweep(tmp_path / "c", sites=grid(First()))
    assert " at 0x" not in first.info["subspace"]
    assert numbers(sweep(tmp_path / "c", sites=grid(First()))).equal(numbers(first))


@pytest.mark.parametrize("part", [space(), First(), Features(Coder(1.0), [3, 4])])
def test_plans_and_engines_do_with_any_space(part: Space) -> None:
    plan = plan_sweep(tiny_model("llama"), tiny_api(), grid(part), SOURCE, TARGET)
    other = plan_sweep(tiny_model("llama"), tiny_api(), grid(None), SOURCE, TARGET)
    assert len(str(plan)) > 0
    assert str(plan) == str(other)
    outs = [sweep(sites=grid(part), engine=engine) for engine in ("cone", "full")]
    assert "fallback" not in outs[0].info
    assert (numbers(outs[0]) - numbers(outs[1])).abs().max() < 1e-4
    assert (numbers(outs[0]) - numbers(sweep(sites=grid(None)))).abs().max() > 1e-2


# Metrics that read coordinates.


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize(
    ("component", "head", "width"), [("resid", None, WIDTH), ("k", 1, HEAD), ("o", None, WIDTH)]
)
@pytest.mark.parametrize("part", [None, space(3, 5)])
def test_a_metric_reads_coordinates(
    engine: str, component: str, head: int | None, width: int, part: Any
) -> None:
    """Of the patched run, which may itself be limited to a subspace."""
    mean = torch.linspace(-1, 1, width)
    seen = Subspace(space(2, 7, width).basis, mean=mean)
    read = Site.get_site(tiny_api(), component, 2, head, [-1], subspace=seen)

    @per_prompt
    @reads_activations([read])
    def coordinate(logits: Tensor, context: MetricContext) -> Tensor:
        found = context.activations[read]
        assert found.shape == (len(logits), 1, 2)
        return found[:, 0, 1]

    model = tiny_model("llama")
    oracle = Oracle(model, "llama")
    sites = Sites(["resid_pre", "mlp"], layers=[1], seq_pos_type="lastk", seq_pos=2, subspace=part)
    out = sweep(model=model, sites=sites, engine=engine, metric=coordinate)
    (raw,) = out.raw.values()
    moved = []
    for name in out:
        for row, (_, position, *_) in enumerate(out.cells[name].index.tolist()):
            place = Place(name, 1, None, (SOURCE.shape[1] - position,), part_spanned(part))
            expected = []
            for source, target in zip(SOURCE.tolist(), TARGET.tolist(), strict=True):
                donor = oracle.of_prompt(tuple(source))
                found = oracle.read_when_replaced(
                    tuple(target), [place], donor, Place(component, 2, head)
                )[-1]
                expected.append(float((found - mean) @ seen.basis[:, 1]))
            torch.testing.assert_close(raw[name][row], torch.tensor(expected), atol=1e-4, rtol=0)
            moved.append(raw[name][row] - out.baseline.target)
    assert torch.stack(moved).abs().max() > 1e-3


def test_features_are_read_too() -> None:
    read = Site.get_site(tiny_api(), "mlp", 2, subspace=Features(Coder(1.0), [3, 30]))

    @per_prompt
    @reads_activations([read])
    def most(logits: Tensor, context: MetricContext) -> Tensor:
        assert context.activations[read].shape == (len(logits), SOURCE.shape[1], 2)
        return context.activations[read].sum((1, 2))

    model = tiny_model("llama")
    oracle = Oracle(model, "llama")
    out = sweep(model=model, metric=most, sites=Sites("resid", layers=[0]), memory_budget=None)
    expected = [oracle.activation(tuple(row), "mlp", 2)[:, [3, 30]] for row in TARGET.tolist()]
    found = torch.stack([each.relu().sum() for each in expected])
    torch.testing.assert_close(out.baseline.target, found, atol=1e-4, rtol=0)
