"""A model whose answer is carried along known directions: these are found, and no others."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core import PromptPairs, Site
from nnpatch_core.subspace import Subspace, evaluate_subspace, train_subspace
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.learning_oracle import Pair, directions
from tests.helpers.lessons import as_pairs, cosine, last

WIDTH, NUISANCE, FIRST = 32, 12, 6
#: The answers' tokens: none of them stands in a prompt.
ANSWERS = range(60, 64)
KNOWN: dict[str, Any] = {"lr": 0.05, "epochs": 12, "batch_size": 16, "progress": False}


def words(content: int) -> range:
    """The tokens that have a content, each with a nuisance of its own beside it."""
    start = FIRST + content * NUISANCE
    return range(start, start + NUISANCE)


def carrying(contents: Tensor) -> Any:
    """A model that writes a token's content, and gives the answer that reads it.

    Args:
        contents: `[contents, WIDTH]`, what each content is in the residual stream.
    """
    model = tiny_model("llama")
    draw = torch.Generator().manual_seed(7)
    plane = torch.linalg.qr(contents.T.double()).Q
    with torch.no_grad():
        for layer in model.model.layers:
            # Nothing is added to the residual stream.
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        beside = torch.randn(NUISANCE, WIDTH, generator=draw, dtype=torch.float64)
        beside -= beside @ plane @ plane.T
        beside /= beside.norm(dim=1, keepdim=True)
        for number, content in enumerate(contents):
            rows = [*words(number)]
            model.model.embed_tokens.weight[rows] = (content + beside).float()
            model.lm_head.weight[ANSWERS[number]] = content / 2
    return model


def asked(contents: int, seed: int = 0, count: int = 40) -> PromptPairs:
    """Each nuisance stands as often in a source prompt as in a target prompt."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        source, target = draw.sample(range(contents), 2)
        one, other = draw.sample(range(NUISANCE), 2)
        for here, there in ((one, other), (other, one)):
            pairs.append(
                Pair(
                    (4, words(source)[here]), (4, words(target)[there]),
                    ANSWERS[source], ANSWERS[target],
                )
            )  # fmt: skip
    return as_pairs(pairs)


@functools.cache
def along_a_line() -> tuple[Any, Tensor]:
    (line,) = directions(WIDTH, 1, 3).T
    return carrying(torch.stack([line, -line])), line


@pytest.mark.parametrize("seed", range(4))
def test_a_line_is_found(seed: int) -> None:
    model, line = along_a_line()
    trained = train_subspace(
        model, None, last(), asked(2, seed), seed=seed, random_model=seed == 0, **KNOWN
    )
    assert cosine(trained.subspace.basis, line) > 0.99
    assert trained.accuracy.value == 1.0
    assert trained.target_accuracy.value == 0.0
    found = trained.evaluation
    assert found["random labels"].accuracy.value < 0.2
    assert found["random subspace"].accuracy.value <= 0.4
    assert found["whole component"].accuracy.value == 1.0
    assert found["nothing"].accuracy.value == 0.0
    assert found["nothing"].target.value == 1.0
    if seed == 0:
        assert found["random model"].accuracy.value < 0.5


@pytest.mark.parametrize("site", ["resid_pre", "the first layer", "all positions"])
def test_it_is_found_wherever_it_stands(site: str) -> None:
    model, line = along_a_line()
    where = {
        "resid_pre": last("resid_pre", 2),
        "the first layer": last("resid", 0),
        "all positions": Site.get_site(tiny_api(), "resid", 1),
    }[site]
    trained = train_subspace(model, None, where, asked(2), random_labels=False, **KNOWN)
    assert cosine(trained.subspace.basis, line) > 0.99
    assert trained.accuracy.value == 1.0


@pytest.mark.parametrize("seed", range(2))
def test_a_plane_is_found(seed: int) -> None:
    plane = directions(WIDTH, 2, 4)
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    model = carrying(corners @ plane.T)
    pairs = asked(4, seed, 60)
    options = {**KNOWN, "random_labels": False, "seed": seed}
    two = train_subspace(model, None, last(), pairs, rank=2, **options)
    assert cosine(two.subspace.basis, plane) > 0.99
    assert two.accuracy.value == 1.0
    # One direction does not do for four answers.
    one = train_subspace(model, None, last(), pairs, rank=1, **options)
    assert one.accuracy.value < 0.8
    assert one.accuracy.high < two.accuracy.low
    # A third is free.
    three = train_subspace(model, None, last(), pairs, rank=3, **options)
    spanned = three.subspace.basis.double()
    assert torch.linalg.svdvals(spanned.T @ plane)[:2].min() > 0.99


def test_where_there_is_no_direction_nothing_is_found() -> None:
    """The answer stands at the last token alone; at the one before it there is nothing to patch."""
    model, _ = along_a_line()
    before = Site.get_site(tiny_api(), "resid", 1, seq_pos=[-2])
    trained = train_subspace(model, None, before, asked(2), **{**KNOWN, "epochs": 3})
    assert {row: each.accuracy.value for row, each in trained.evaluation.items()} == dict.fromkeys(
        ("subspace", "random subspace", "random labels", "whole component", "nothing"), 0.0
    )
    # Nor is there a difference of means.
    assert any("no control by a difference of means" in note for note in trained.evaluation.notes)
    assert len(trained.history) == 4
    assert trained.best.epoch == 0


def test_many_directions_are_not_one() -> None:
    """Each pair has a direction of its own: the whole activation does it, no line does."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(WIDTH).repeat(2, 1))
        model.lm_head.weight.copy_(3 * torch.eye(WIDTH).repeat(2, 1))
        model.lm_head.weight[:WIDTH] = 0
    draw = random.Random(0)
    pairs = []
    for _ in range(80):
        source, target = draw.sample(range(6, 30), 2)
        pairs.append(Pair((source,), (target,), WIDTH + source, WIDTH + target))
    trained = train_subspace(model, None, last(), as_pairs(pairs), **KNOWN)
    assert trained.accuracy.value < 0.3
    assert trained.evaluation["whole component"].accuracy.value == 1.0
    assert trained.evaluation["random labels"].accuracy.value < 0.3


def test_what_is_known_is_measured_as_such() -> None:
    model, line = along_a_line()
    found = evaluate_subspace(model, None, last(), asked(2), Subspace(line[:, None]))
    assert found.accuracy.value == 1.0
    assert found.source.value == 1.0
    (other,) = directions(WIDTH, 2, 3)[:, 1:].T
    other = other - (other @ line) * line
    across = Subspace((other / other.norm())[:, None])
    assert evaluate_subspace(model, None, last(), asked(2), across).accuracy.value == 0.0
