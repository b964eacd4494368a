"""Each mistake in a call that learns has its own error, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core import MultiSite, Site, Sites
from nnpatch_core.errors import (
    EngineError,
    EngineWarning,
    MemoryBudgetError,
    PatchingError,
    PositionError,
    SubspaceError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.subspace import Subspace, train_subspace
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.families import FAMILIES
from tests.helpers.lessons import as_pairs, last, learned, random_pairs, some_pairs, taught_pairs

NAN, INF = float("nan"), float("inf")
API = tiny_api()


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


REFUSED: list[tuple[dict[str, Any], type[PatchingError], str]] = [
    ({"rank": 0}, SubspaceError, "rank must be at least 1, got 0"),
    ({"rank": -2}, SubspaceError, "rank must be at least 1, got -2"),
    ({"rank": 33}, SubspaceError, "rank must be from 1 to the width 32, got 33"),
    ({"rank": 9, "site": last("q", head=1)}, SubspaceError, "from 1 to the width 8, got 9"),
    ({"rank": 1.0}, SubspaceError, r"rank must be an integer, got 1.0 \(float\)"),
    ({"rank": True}, SubspaceError, r"rank must be an integer, got True \(bool\)"),
    ({"rank": None}, SubspaceError, "rank must be an integer, got None"),
    ({"held_out": 1.5}, SubspaceError, "held_out must be a number from 0 to 1, got 1.5"),
    ({"held_out": -0.1}, SubspaceError, "held_out must be a number from 0 to 1, got -0.1"),
    ({"held_out": NAN}, SubspaceError, "held_out must be a number from 0 to 1, got nan"),
    ({"held_out": True}, SubspaceError, "held_out must be"),
    ({"held_out": "half"}, SubspaceError, "held_out must be"),
    ({"held_out": None}, SubspaceError, "held_out must be"),
    ({"held_out": []}, SubspaceError, "held_out is empty"),
    ({"held_out": [1, 1]}, SubspaceError, "held_out names 1 more than once"),
    ({"held_out": [1, -11]}, SubspaceError, "held_out names pair 1 more than once"),
    ({"held_out": [12]}, SubspaceError, "held_out names pair 12, and there are 12, from 0 on"),
    ({"held_out": [0.5]}, SubspaceError, "each of held_out must be an integer, got 0.5"),
    ({"held_out": 0}, SubspaceError, "12 to learn from and 0 held out, where at least 2 and 1"),
    ({"held_out": 1.0}, SubspaceError, "1 to learn from and 11 held out"),
    ({"held_out": list(range(12))}, SubspaceError, "0 to learn from and 12 held out"),
    ({"epochs": 0}, SubspaceError, "epochs must be at least 1, got 0"),
    ({"epochs": 2.5}, SubspaceError, "epochs must be an integer"),
    ({"batch_size": 0}, SubspaceError, "batch_size must be at least 1, got 0"),
    ({"batch_size": None}, SubspaceError, "batch_size must be an integer"),
    ({"lr": 0}, SubspaceError, "lr must be above 0: with lr=0 nothing is learned"),
    ({"lr": -1e-3}, SubspaceError, "lr must be a number from 0 to 1, got -0.001"),
    ({"lr": INF}, SubspaceError, "lr must be a number from 0 to 1, got inf"),
    ({"lr": 1e30}, SubspaceError, "lr must be a number from 0 to 1, got 1e"),
    ({"lr": "0.1"}, SubspaceError, "lr must be a number from 0 to 1, got '0.1'"),
    ({"lr": True}, SubspaceError, "lr must be a number from 0 to 1, got True"),
    ({"weight_decay": 1e30}, SubspaceError, "weight_decay must be at most 1 / lr = 100, got 1e"),
    ({"weight_decay": INF}, SubspaceError, "weight_decay must be finite, got inf"),
    ({"weight_decay": -1}, SubspaceError, "weight_decay must be a number at least 0, got -1"),
    ({"warmup": 1.1}, SubspaceError, "warmup must be a number from 0 to 1, got 1.1"),
    ({"warmup": None}, SubspaceError, "warmup must be a number from 0 to 1, got None"),
    ({"kl": -1}, SubspaceError, "kl must be a number at least 0, got -1"),
    ({"kl": NAN}, SubspaceError, "kl must be a number at least 0, got nan"),
    ({"patience": 0}, SubspaceError, "patience must be at least 1, got 0"),
    ({"patience": 1.5}, SubspaceError, "patience must be an integer, got 1.5"),
    ({"seed": 2**64}, PatchingError, "seed must be a number of 64 bits"),
    ({"seed": 0.5}, PatchingError, "seed must be an integer, got 0.5"),
    ({"initial": torch.eye(32)[:, :1]}, SubspaceError, "initial must be a Subspace, got"),
    ({"initial": Subspace.random(31)}, SubspaceError, "initial is .* and the site is 32 wide"),
    ({"initial": Subspace.random(32, 2)}, SubspaceError, "initial is of rank 2, and rank=1 was"),
    ({"initial": Unspeakable()}, SubspaceError, "initial must be a Subspace"),
    ({"site": last(layer=3)}, PatchingError, "layer 3"),
    ({"site": last("q", head=4)}, PatchingError, "head 4"),
    ({"site": "resid"}, SubspaceError, "site must be a Site, or Sites of one cell, got 'resid'"),
    ({"site": None}, SubspaceError, "site must be a Site, or Sites of one cell, got None"),
    ({"site": Sites}, SubspaceError, "site must be a Site"),
    ({"site": Sites("resid", seq_pos_type="last")}, SubspaceError, "one site, and there are 3"),
    ({"site": Sites("q", [1], "last")}, SubspaceError, "one site, and there are 4"),
    ({"site": Sites("resid", [1], "each")}, SubspaceError, "one site, and there are 5"),
    (
        {"site": Sites.from_sites([MultiSite([last(), last("mlp")])])},
        SubspaceError,
        "one site, and there are 2",
    ),
    ({"site": MultiSite([last(), last("mlp")])}, SubspaceError, "site must be a Site"),
    (
        {"site": last(subspace=Subspace.random(32))},
        SubspaceError,
        "limited to Subspace.* already.*without subspace=.*initial=",
    ),
    (
        {"site": Sites("resid", [1], "last", subspace={1: Subspace.random(32)})},
        SubspaceError,
        "limited to Subspace",
    ),
    ({"site": Site.get_site(API, "resid", 1, seq_pos=[-6])}, PositionError, "-6"),
    ({"site": Site.get_site(API, "resid", 1, seq_pos=[[-1]] * 3)}, PositionError, "3"),
    ({"site": Site.get_site(FAMILIES["gpt2"].api, "resid", 1)}, PatchingError, "transformer.h"),
    ({"pairs": [(1, 2)]}, TokensError, "pairs must be a PromptPairs, got"),
    ({"pairs": torch.zeros(2, 3, dtype=torch.int64)}, TokensError, "pairs must be a PromptPairs"),
    ({"engine": "fast"}, UnknownNameError, "fast"),
    ({"engine": None}, PatchingError, "engine"),
    ({"memory_budget": "plenty"}, MemoryBudgetError, "plenty"),
    ({"memory_budget": 10}, MemoryBudgetError, "memory_budget is 10 B"),
    ({"checkpoint": 3}, PatchingError, "a file is named by a string or a path, got 3"),
    ({"random_labels": "no"}, PatchingError, "random_labels"),
    ({"random_model": None}, PatchingError, "random_model"),
    ({"progress": "yes"}, PatchingError, "progress"),
    ({"api": "Nobody"}, PatchingError, "Nobody"),
]


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    REFUSED,
    ids=[f"{next(iter(each[0]))}{n}" for n, each in enumerate(REFUSED)],
)
def test_refused_before_anything_runs(
    given: dict[str, Any], kind: type[PatchingError], told: str
) -> None:
    model, ran = tiny_model("llama"), list[int]()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    before = torch.random.get_rng_state()
    options = {"site": last(), "pairs": some_pairs(), **given}
    with pytest.raises(kind, match=f"(?s){told}") as caught:
        train_subspace(
            model,
            options.pop("api", None),
            options.pop("site"),
            options.pop("pairs"),
            **{"progress": False, **options},
        )
    assert kind is PatchingError or caught.type is kind
    assert str(caught.value).isprintable()
    assert not ran
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_pairs(count: int) -> None:
    with pytest.raises(SubspaceError, match=f"^{count} pairs that tell something are too few"):
        learned(tiny_model("llama"), some_pairs(count))


def test_as_few_pairs_as_will_do() -> None:
    found = learned(tiny_model("llama"), some_pairs(3))
    assert (len(found.seen), len(found.held_out_pairs)) == (2, 1)


def test_pairs_of_which_all_are_one() -> None:
    same = as_pairs(taught_pairs([5]) * 6)
    with pytest.raises(SubspaceError, match="pairs of the same prompts stay together"):
        learned(tiny_model("llama"), same)


def test_no_pair_that_tells_anything() -> None:
    import attrs

    pairs = some_pairs(4)
    same = attrs.evolve(pairs, target_answer_index=pairs.source_answer_index)
    with (
        pytest.warns(match="4 of 4 pairs are left out"),
        pytest.raises(SubspaceError, match="no pair is left"),
    ):
        learned(tiny_model("llama"), same)


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.PromptWarning")
def test_no_pair_has_a_token_at_the_site() -> None:
    from tests.helpers.learning_oracle import Pair

    long, short = random_pairs([6, 2], 3)
    pairs = [
        Pair(long.source, short.target, long.answer, long.other),
        Pair(short.source, long.target, short.answer, short.other),
    ]
    site = Site.get_site(API, "resid", 1, seq_pos=[-5])
    with pytest.raises(PatchingError, match=r"no token|padding"):
        learned(tiny_model("llama"), as_pairs(pairs), site)


def test_a_model_that_gives_nan() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    error = pytest.raises(SubspaceError, match=r"the loss is nan in epoch 0.*not finite")
    with error:
        learned(model, engine="full")
    with error, pytest.warns(EngineWarning, match="off by nan"):
        learned(model)


def test_a_model_that_gives_nan_for_pairs_held_out() -> None:
    """Those are not learned from; nobody would see it."""
    model, pairs = tiny_model("llama"), taught_pairs([5] * 8)
    only = 59
    pairs[3] = pairs[3]._replace(target=(only, *pairs[3].target[1:]))
    assert all(only not in (*p.source, *p.target) for n, p in enumerate(pairs) if n != 3)
    with torch.no_grad():
        model.model.embed_tokens.weight[only] = torch.nan
    with pytest.raises(SubspaceError, match="the loss is nan in epoch 0"):
        learned(model, as_pairs(pairs), held_out=[3], engine="full")


def test_a_loss_that_overflows() -> None:
    with pytest.raises(SubspaceError, match=r"the loss is inf in epoch 0.*not finite"):
        learned(tiny_model("llama"), kl=1e300)


def test_an_engine_that_cannot() -> None:
    family = FAMILIES["bloom"]
    site = Site.get_site(family.api, "resid", 1, seq_pos=[-1])
    with pytest.raises(EngineError, match="cannot run from the middle"):
        learned(family.model(), site=site, api=family.api, engine="cone")
    found = learned(family.model(), site=site, api=family.api)
    assert found.evaluation.engine == "full"


def test_a_random_model_that_cannot_be_made() -> None:
    model = tiny_model("llama")

    class Own(type(model)):
        def __init__(self, config: Any, more: int) -> None:
            super().__init__(config)

    model.__class__ = Own
    with pytest.raises(SubspaceError, match=r"no Own with random weights can be made.*leave out"):
        learned(model, random_model=True)
    assert learned(model).accuracy.count
