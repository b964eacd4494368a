"""Sweeps of a steered model, against plain hooks that steer and patch a copy of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import (
    Add,
    Set,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
    steer,
)
from nnpatch_core.errors import CheckpointError, EngineError, EngineWarning, SteeringError
from nnpatch_core.spaces import Subspace
from nnpatch_core.testing import tiny_api, tiny_model
from nnpatch_core.tracing import forward_hooks
from tests.helpers.samples import THREE

#: That a sweep runs in the full engine is said by a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:this sweep runs:nnpatch_core.errors.EngineWarning")

API, MODEL = tiny_api(), tiny_model("llama")
PLAIN = copy.deepcopy(MODEL)
SPACE = Subspace.random(32, seed=2)
SOURCE, TARGET, ANSWERS = THREE
SITES = Sites(["mlp", "resid"], seq_pos_type="each")
VALUES = torch.tensor([4.0, -8.0, 12.0])
ATOL = 1e-5


def site(seq_pos: Any) -> Site:
    return Site.get_site(API, "resid", 1, seq_pos=seq_pos, subspace=SPACE)


def sweep(sites: Any = SITES, function: Any = activation_patching, **options: Any) -> Any:
    return function(MODEL, API, sites, SOURCE, TARGET, *ANSWERS, progress=False, **options)


# Plain hooks.


@contextmanager
def hooked(module: nn.Module, change: Any) -> Iterator[None]:
    hook = module.register_forward_hook(lambda *seen: change(seen[2].clone()))
    try:
        yield
    finally:
        hook.remove()


def steering(seq_pos: list[int] | None, values: Tensor) -> Any:
    basis = SPACE.basis[:, 0]

    def change(x: Tensor) -> Tensor:
        at = range(x.shape[1]) if seq_pos is None else seq_pos
        for position in at:
            own = x[:, position]
            x[:, position] = own + (values - own @ basis)[:, None] * basis
        return x

    return change


def module_of(name: str, layer: int) -> nn.Module:
    whole: Any = PLAIN.model.layers[layer]
    return whole if name == "resid" else whole.mlp


def expected(name: str, seq_pos: Any, values: Tensor) -> Tensor:
    """`[layers, seq]`: each cell's share of the gap, by whole forwards."""

    def difference(tokens: Tensor) -> Tensor:
        logits = PLAIN(tokens, use_cache=False).logits[:, -1]
        rows = torch.arange(3)
        return (logits[rows, ANSWERS[0]] - logits[rows, ANSWERS[1]]).mean()

    steered = PLAIN.model.layers[1], steering(seq_pos, values)
    found = torch.zeros(3, 6)
    with torch.no_grad():
        with hooked(*steered):
            source, target = difference(SOURCE), difference(TARGET)
        for layer in range(3):
            module = module_of(name, layer)
            kept: list[Tensor] = []
            # What a site is, its module itself gives; who steers comes after.
            with hooked(module, kept.append), hooked(*steered):
                PLAIN(SOURCE, use_cache=False)
            for position in range(6):

                def patch(x: Tensor, own: Any = kept[0], position: int = position) -> Tensor:
                    x[:, position] = own[:, position]
                    return x

                with hooked(module, patch), hooked(*steered):
                    found[layer, position] = (difference(TARGET) - target) / (source - target)
    return found


@pytest.mark.parametrize("seq_pos", [None, [-1], [-2, 3]])
@pytest.mark.parametrize("engine", ["auto", "full", "cone"])
def test_a_sweep_is_right(seq_pos: Any, engine: str) -> None:
    with steer(MODEL, site(seq_pos), 4.0):
        out = sweep(engine=engine)
    assert out.info["engine"] == ("cone" if engine == "cone" else "full")
    for name in ("mlp", "resid"):
        known = expected(name, seq_pos, torch.full([3], 4.0))
        torch.testing.assert_close(out[name].float(), known, atol=ATOL, rtol=0)
        plain = sweep()[name].float()
        assert (plain - known).abs().max() > 0.05, "the test has no power"


@pytest.mark.parametrize("seq_pos", [None, [-1]])
def test_a_sweep_with_values_of_each_prompt(seq_pos: Any) -> None:
    with steer(MODEL, site(seq_pos), VALUES):
        out = sweep()
        with pytest.raises(EngineError, match="let a sweep run by engine='full'"):
            sweep(engine="cone")
        with (
            pytest.warns(EngineWarning, match="the prompts run in several parts"),
            pytest.raises(SteeringError, match="run all prompts at once"),
        ):
            sweep(batch_size=2)
    for name in ("mlp", "resid"):
        known = expected(name, seq_pos, VALUES)
        torch.testing.assert_close(out[name].float(), known, atol=ATOL, rtol=0)


def test_it_counts_as_a_hook_of_the_users() -> None:
    with steer(MODEL, site(None), 4.0):
        assert forward_hooks(MODEL) == ["the forward hook `steered` on 'model.layers.1'"]
        out = sweep()
    assert "the forward hook `steered`" in out.info["fallback"]
    assert forward_hooks(MODEL) == []
    before = Site.get_site(API, "o", 1)
    with steer(MODEL, before, Set(torch.zeros(32))):
        (told,) = forward_hooks(MODEL)
    assert told == "the forward pre-hook `steered_input` on 'model.layers.1.self_attn.o_proj'"


def test_estimates_and_ablations_are_those_of_plain_hooks() -> None:
    """Of the same hook, put there by hand."""
    sites = Sites("resid", seq_pos_type="each")

    def both() -> list[Tensor]:
        ablated = ablation_patching(
            MODEL, API, sites, TARGET, ANSWERS[1], ANSWERS[0], progress=False
        )
        return [ablated["resid"], sweep(sites, attribution_patching)["resid"]]

    with steer(MODEL, site([-1]), VALUES):
        found = both()
    with hooked(MODEL.model.layers[1], steering([-1], VALUES)):
        known = both()
    for each, other in zip(found, known, strict=True):
        torch.testing.assert_close(each, other, atol=ATOL, rtol=0)


@pytest.mark.parametrize("backs", [[-1], [-2]])
def test_an_answer_that_is_appended_is_as_if_it_were_generated(backs: Any) -> None:
    """Positions are those of the prompt; what follows is steered with its last token."""
    answers = torch.tensor([[7, 8], [9, 3], [4, 4]])
    with steer(MODEL, site(backs), 4.0):
        out = activation_patching(
            MODEL, API, Sites("resid", seq_pos_type="last"), SOURCE, TARGET, *ANSWERS,
            metric="sequence_log_probability", source_answer_tokens=answers, progress=False,
        )  # fmt: skip
    whole = torch.cat([TARGET, answers], 1)
    at = [5, 6, 7] if backs == [-1] else [4]
    with torch.no_grad(), hooked(PLAIN.model.layers[1], steering(at, torch.full([3], 4.0))):
        logs = PLAIN(whole, use_cache=False).logits.log_softmax(-1)
    known = torch.stack([logs[:, 5 + n].gather(1, answers[:, n : n + 1])[:, 0] for n in (0, 1)])
    found = out.baselines["sequence_log_probability"].target
    torch.testing.assert_close(found.float(), known.sum(0), atol=ATOL, rtol=0)


def test_a_checkpoint_knows_how_it_was_steered(tmp_path: Path) -> None:
    def swept(value: Any) -> Any:
        with steer(MODEL, site(None), value):
            return sweep(checkpoint=tmp_path / "file")

    first = swept(4.0)
    with steer(MODEL, site(None), 4.0):
        # It does not matter how often the model ran before.
        MODEL(SOURCE)
        assert torch.equal(sweep(checkpoint=tmp_path / "file")["mlp"], first["mlp"])
    with pytest.raises(CheckpointError, match="hooks"):
        swept(5.0)
    with pytest.raises(CheckpointError, match="hooks"):
        swept(Add(4.0))


def test_a_screen_is_steered() -> None:
    with steer(MODEL, site([-1]), 4.0):
        out = sweep(Sites("resid", seq_pos_type="each"), screen="attribution", top_k=4)
    known = expected("resid", [-1], torch.full([3], 4.0))
    exact = out.exact("resid")
    assert exact.sum() >= 4
    torch.testing.assert_close(out["resid"].float()[exact], known[exact], atol=ATOL, rtol=0)
