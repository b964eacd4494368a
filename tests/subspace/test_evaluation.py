"""What a subspace does on some pairs is what a loop by hand finds, with its interval."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from nnpatch_core import Site, Sites, activation_patching
from nnpatch_core.errors import PatchingError, PromptWarning, SubspaceError
from nnpatch_core.metrics import per_prompt
from nnpatch_core.subspace import (
    Features,
    Proportion,
    Subspace,
    Trained,
    evaluate_subspace,
)
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.family_oracle import LAYOUTS
from tests.helpers.learning_oracle import LearningOracle, Where
from tests.helpers.lessons import as_pairs, last, learned, random_pairs, some_pairs, taught_pairs

TAUGHT = tuple(taught_pairs([5] * 16, 4))
#: Of a random model, the answers that it gives.
LENGTHS = (4, 6, 5, 3, 5, 6, 4, 5)


@functools.cache
def oracle() -> LearningOracle:
    return LearningOracle(tiny_model("llama"), LAYOUTS["gemma"])


@functools.cache
def answered() -> tuple[Any, ...]:
    """Pairs whose answers the model gives: after the source, and after the target prompt."""
    pairs = []
    for pair in random_pairs([*LENGTHS, *LENGTHS, *LENGTHS], 5):
        tops = [int(oracle().logits(prompt).argmax()) for prompt in (pair.source, pair.target)]
        if tops[0] != tops[1] and min(tops) > 3:
            pairs.append(pair._replace(answer=tops[0], other=tops[1]))
    assert len(pairs) > 12
    return tuple(pairs)


def shares(where: Where, basis: Tensor | None, back: int = 1) -> tuple[float, float]:
    """How many patched runs give the source answer, and the target answer, by hand."""
    source = target = 0
    for pair in answered():
        logits = oracle().patched(pair, where, [(back, back)], basis)
        source += int(logits.argmax()) == pair.answer
        target += int(logits.argmax()) == pair.other
    return source / len(answered()), target / len(answered())


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize(("component", "head"), [("resid", None), ("attn", None), ("o", 2)])
@pytest.mark.parametrize("rank", [1, 6])
def test_shares_are_those_of_a_loop_by_hand(
    component: str, head: int | None, rank: int, engine: str
) -> None:
    where, width = Where(component, 2, head), 32 if head is None else 8
    site = Site.get_site(tiny_api(), *where, [-1])
    space = Subspace.random(width, rank, 3)
    found = evaluate_subspace(
        tiny_model("llama"), None, site, as_pairs(answered()), space, seed=7, engine=engine
    )
    assert found.engine == engine
    assert list(found) == ["subspace", "random subspace", "whole component", "nothing"]
    assert found.pairs == len(answered())
    assert found.source.value == 1.0
    rows = {"subspace": space.basis.double(), "whole component": None}
    for name, basis in rows.items():
        own = found[name]
        assert (own.accuracy.value, own.target.value) == pytest.approx(shares(where, basis))
    assert found.accuracy == found["subspace"].accuracy
    assert found.target_accuracy == found["subspace"].target
    draws = [
        shares(where, Subspace.random(width, rank, 7 + number).basis.double())
        for number in range(5)
    ]
    accuracy, target = torch.tensor(draws, dtype=torch.float64).mean(0).tolist()
    assert found["random subspace"].accuracy.value == pytest.approx(accuracy)
    assert found["random subspace"].target.value == pytest.approx(target)
    assert found["nothing"].accuracy.value == 0.0
    assert found["nothing"].target.value == 1.0
    frame = found.to_dataframe()
    assert list(frame["patched"]) == list(found)
    assert list(frame["accuracy"]) == [each.accuracy.value for each in found.values()]


def test_the_whole_component_is_activation_patching() -> None:
    model, pairs = tiny_model("llama"), as_pairs(answered())

    @per_prompt
    def hit(logits: Tensor, context: Any) -> Tensor:
        return (logits.argmax(-1) == context.source_answer_index).float() + logits[:, 0] * 0

    out = activation_patching(
        model, None, Sites("resid", seq_pos_type="last"), pairs, metric=hit, progress=False
    )
    for layer in range(3):
        found = evaluate_subspace(
            model, None, last("resid", layer), pairs, Subspace.random(32), draws=0
        )
        share = float(out.patched("resid")[layer].double().mean())
        assert found["whole component"].accuracy.value == pytest.approx(share)
    # All coordinates are the whole.
    every = evaluate_subspace(model, None, last(), pairs, Subspace.random(32, 32), draws=1)
    assert every.accuracy == every["whole component"].accuracy == every["random subspace"].accuracy


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_intervals_are_scipys(count: int) -> None:
    for hits in {0, 1, count // 2, count - 1, count}:
        found = Proportion.of(torch.arange(count) < hits)
        expected = binomtest(hits, count).proportion_ci(method="wilson")
        assert found.value == pytest.approx(hits / count)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.count == count
        several = Proportion.of((torch.arange(count) < hits).expand(3, -1))
        assert several == found


class Paired:
    """An autoencoder: each axis has two features, one for either sign."""

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu(), (-x).relu()], -1)

    def decode(self, c: Tensor) -> Tensor:
        half = c.shape[-1] // 2
        return c[..., :half] - c[..., half:]


def test_features() -> None:
    model, pairs = tiny_model("llama"), as_pairs(answered())
    every = evaluate_subspace(model, None, last("resid", 2), pairs, Features(Paired()))
    assert every.accuracy == every["whole component"].accuracy
    assert "random subspace" not in every
    assert any("rank of what is patched is not known" in note for note in every.notes)
    # Both signs of some axes are these axes.
    axes = [3, 8, 20]
    some = evaluate_subspace(
        model, None, last("resid", 2), pairs,
        Features(Paired(), [*axes, *(axis + 32 for axis in axes)]), draws=1,
    )  # fmt: skip
    basis = torch.eye(32, dtype=torch.float64)[:, axes]
    assert some.accuracy.value == pytest.approx(shares(Where("resid", 2), basis)[0])
    # Anything with these two methods will do.
    plain = evaluate_subspace(model, None, last("resid", 2), pairs, Paired())
    assert plain.accuracy == every.accuracy


# How the site and the subspace are named.


def test_a_subspace_names_its_site() -> None:
    model, pairs = tiny_model("llama"), as_pairs(answered())
    site = last("resid", 2)
    made = Subspace.random(32, 4, site=site)
    wanted = evaluate_subspace(model, None, site, pairs, made)
    for found in (
        evaluate_subspace(model, None, made, pairs),
        evaluate_subspace(model, None, attrs.evolve(site, subspace=made), pairs),
        evaluate_subspace(model, None, Sites("resid", [2], "last", subspace=made), pairs),
    ):
        assert found.rows == wanted.rows
        assert "L2" in found.site


def test_what_was_learned_brings_its_controls() -> None:
    model, pairs = tiny_model("llama"), as_pairs(TAUGHT)
    trained = learned(model, pairs, random_labels=True)
    found = evaluate_subspace(model, None, trained, trained.held_out_pairs)
    assert isinstance(trained, Trained)
    assert set(found) == {*trained.evaluation}
    for name in ("subspace", "difference of means", "whole component", "nothing"):
        assert found[name] == trained.evaluation[name]
    other = as_pairs(taught_pairs([5] * 4, 99))
    assert evaluate_subspace(model, None, trained, other).pairs == 4
    given = evaluate_subspace(model, None, last(), other, trained)
    assert given.rows == evaluate_subspace(model, None, trained, other).rows
    # What is measured at the site where something else was learned has nothing to do with that.
    beside = evaluate_subspace(model, None, trained, pairs, Subspace.random(32))
    assert "difference of means" not in beside


def test_pairs_that_were_learned_from_are_told() -> None:
    model, pairs = tiny_model("llama"), as_pairs(TAUGHT)
    trained = learned(model, pairs)
    with pytest.warns(PromptWarning, match=r"13 of 16 pairs are pairs that.*held_out_pairs"):
        evaluate_subspace(model, None, trained, pairs)
    # However they are padded.
    wider = as_pairs([*TAUGHT, *taught_pairs([9], 50)])
    with pytest.warns(PromptWarning, match=r"13 of 17 pairs are pairs that"):
        evaluate_subspace(model, None, trained, wider)


def test_a_subspace_of_positions_of_each_prompt_needs_a_site() -> None:
    model, pairs = tiny_model("llama"), as_pairs(TAUGHT)
    rows = [[-1], [-2]] * 8
    site = Site.get_site(tiny_api(), "resid", 1, seq_pos=rows)
    trained = learned(model, pairs, site)
    with pytest.raises(SubspaceError, match="which are others in other prompts: name the site"):
        evaluate_subspace(model, None, trained, pairs)
    found = evaluate_subspace(model, None, site, pairs, trained.subspace)
    assert found.pairs == 16


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no subspace": ({}, "no subspace to evaluate: pass it as the fifth argument"),
    "width": ({"subspace": Subspace.random(31)}, "31 wide, and resid of layer 1 is 32 wide"),
    "type": ({"subspace": 3}, "subspace must be a Subspace"),
    "draws": ({"subspace": Subspace.random(32), "draws": -1}, "draws must be at least 0, got -1"),
    "no draws": ({"subspace": Subspace.random(32), "draws": 1.5}, "draws must be an integer"),
    "no site": ({"site": Subspace.random(32)}, "does not say where it was made: name the site"),
    "two": (
        {"site": last(subspace=Subspace.random(32)), "subspace": Subspace.random(32)},
        "the site has a subspace already",
    ),
    "no pairs": ({"subspace": Subspace.random(32), "pairs": [1]}, "pairs must be a PromptPairs"),
    "sites": (
        {"subspace": Subspace.random(32), "site": Sites("resid", seq_pos_type="last")},
        "a subspace is of one site, and there are 3",
    ),
    "seed": ({"subspace": Subspace.random(32), "seed": 2**64}, "seed must be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_runs(name: str) -> None:
    given, told = REFUSED[name]
    model, ran = tiny_model("llama"), list[int]()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    options = {"site": last(), "pairs": some_pairs(), **given}
    with pytest.raises(PatchingError, match=told):
        evaluate_subspace(model, None, options.pop("site"), options.pop("pairs"), **options)
    assert not ran


def test_nothing_is_left_on_the_model() -> None:
    model = tiny_model("llama").train()
    with torch.inference_mode():
        evaluate_subspace(model, None, last(), some_pairs(), Subspace.random(32))
    assert all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_notebook_shows_the_tables() -> None:
    trained = learned(tiny_model("llama"), some_pairs(), epochs=1)
    for shown in (trained, trained.evaluation):
        page = shown._repr_html_()
        assert "whole component" in page
        assert page.startswith("<")
