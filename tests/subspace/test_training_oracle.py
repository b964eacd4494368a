"""A step of learning: its loss, its accuracy and its gradient are those of plain hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from nnpatch_core import Site, Sites
from nnpatch_core.engine.cone.replay import ConeReplay
from nnpatch_core.errors import EngineError, EngineWarning
from nnpatch_core.subspace.basis import Basis
from nnpatch_core.subspace.interchange import open_interchange
from nnpatch_core.subspace.learning import Learner
from nnpatch_core.subspace.options import Split, Training
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.attribution import wide
from tests.helpers.families import FAMILIES
from tests.helpers.family_oracle import LAYOUTS
from tests.helpers.learning_oracle import (
    LearningOracle,
    Moves,
    Pair,
    Where,
    directions,
    reflected,
)
from tests.helpers.lessons import as_pairs, random_pairs

#: Prompts differ in length, and what is padding in one batch is not as long in the other.
pytestmark = pytest.mark.filterwarnings("ignore:.*prompts:nnpatch_core.errors.PromptWarning")

ONE_LENGTH = tuple(random_pairs([5, 5, 5]))
LENGTHS = tuple(random_pairs([4, 6, 5, 2], seed=2))
#: Where a target prompt has a token, some of their sources have none.
SHORTER = tuple(random_pairs([6, 4, 5], seed=6, apart=-2))
#: The first three tokens of both are the same, and four in the second pair.
BEGUN_ALIKE = tuple(
    pair._replace(source=(*pair.target[:same], *pair.source[same:]))
    for pair, same in zip(random_pairs([6, 6, 6], seed=9), (3, 4, 3), strict=True)
)
SHIFTED = tuple(random_pairs([4, 6, 5], seed=3, apart=2))
#: In float64 from end to end.
CLOSE: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}
TRAINING = Training(2, 1, 32, 0.01, 0.0, 0.0, 0.0, None, 0)


@functools.cache
def models(family: str) -> tuple[Any, LearningOracle]:
    """A tiny model in float64, and the same with hooks."""
    model = tiny_model("llama") if family == "llama" else FAMILIES[family].model()
    layout = LAYOUTS["gemma" if family == "llama" else family]
    if family == "mixtral":
        # The usual one is not to be had in float64.
        model.set_experts_implementation("eager")
    return model.double(), LearningOracle(model, layout)


@attrs.frozen
class Case:
    """A site as nnpatch knows it, and as the oracle does."""

    site: Any
    where: Where
    moves: Moves
    pairs: Sequence[Pair] = ONE_LENGTH
    family: str = "llama"
    #: What a user says of the pairs besides.
    spans: Any = None


def case(
    component: str,
    layer: int = 1,
    head: int | None = None,
    seq_pos: Any = (-1,),
    pairs: Sequence[Pair] = ONE_LENGTH,
    family: str = "llama",
    moves: Moves | None = None,
    **more: Any,
) -> Case:
    api = tiny_api() if family == "llama" else FAMILIES[family].api
    site = Site.get_site(api, component, layer, head, seq_pos, **more)
    if moves is None:
        shortest = [min(len(pair.source), len(pair.target)) for pair in pairs]
        rows = (
            [range(1, length + 1) for length in shortest]
            if seq_pos is None
            else [[-at for at in seq_pos]] * len(pairs)
        )
        moves = [
            [(back, back) for back in row if back <= length]
            for row, length in zip(rows, shortest, strict=True)
        ]
    return Case(site, Where(component, layer, head), moves, pairs, family)


@contextlib.contextmanager
def exactly(family: str) -> Iterator[None]:
    """GPT-2 does nothing in float32 by itself; in the others what does is made wider."""
    if family == "gpt2":
        yield
        return
    with wide():
        yield


@contextlib.contextmanager
def opened(it: Case, **options: Any) -> Iterator[tuple[Learner, LearningOracle]]:
    """What learns at the site, and the oracle beside it."""
    model, oracle = models(it.family)
    training = attrs.evolve(TRAINING, kl=options.pop("kl", 0.0))
    with exactly(it.family):
        interchange = open_interchange(
            model, None if it.family == "llama" else it.site.api, it.site,
            as_pairs(it.pairs, it.spans), unpatched=training.kl > 0, **options,
        )  # fmt: skip
        answers = interchange.runs.source_answers
        everyone = torch.arange(len(it.pairs))
        split = Split(everyone, everyone)
        yield Learner(interchange, answers, split, training, lambda *_: None), oracle


def check(it: Case, kl: float = 0.0, **options: Any) -> Tensor:
    """Loss, accuracy and gradient are the oracle's; gives the gradient."""
    with opened(it, kl=kl, **options) as (learner, oracle):
        width = learner.interchange.width
        rank = min(2, width)
        initial, basis = directions(width, rank, 5), Basis(directions(width, rank, 5))
        draw = torch.Generator().manual_seed(3)
        raw = 0.3 * torch.randn(width, rank, generator=draw, dtype=torch.float64)
        with torch.no_grad():
            basis.parameter.copy_(raw)
        pairs = torch.arange(len(it.pairs))
        loss, gradient, right = learner.gradient(basis, pairs)
        assert loss.dtype == gradient.dtype == torch.float64
        own = raw.clone().requires_grad_()
        expected, tops = oracle.loss(it.pairs, it.where, it.moves, reflected(initial, own), kl)
        (wanted,) = torch.autograd.grad(expected, [own])
        assert wanted.abs().max() > 1e-5
        torch.testing.assert_close(loss, expected.detach(), **CLOSE)
        torch.testing.assert_close(gradient, wanted, **CLOSE)
        losses, found = learner.measure(basis.now(), pairs)
        assert found.tolist() == tops
        torch.testing.assert_close(losses.mean(), expected.detach(), **CLOSE)
        assert right == sum(top == pair.answer for top, pair in zip(tops, it.pairs, strict=True))
        assert basis.parameter.grad is None
        return gradient


SITES = {
    "resid": case("resid"),
    "resid_pre": case("resid_pre", layer=2),
    "attn": case("attn"),
    "mlp": case("mlp"),
    "the first layer": case("resid_pre", layer=0),
    "the last layer": case("resid", layer=2),
    **{f"{name}, a head": case(name, head=1) for name in "qkvo"},
    **{f"{name}, all heads": case(name, layer=0, seq_pos=(-2,)) for name in "qkvo"},
    "several positions": case("resid", seq_pos=(-1, -3)),
    "all positions": case("mlp", layer=0, seq_pos=None),
    "padding": case("resid", pairs=LENGTHS),
    "padding, all positions": case("resid", layer=0, seq_pos=None, pairs=LENGTHS),
    "padding in the source alone": case("resid", layer=0, seq_pos=None, pairs=SHORTER),
    "padding, several": case("attn", seq_pos=(-1, -2), pairs=LENGTHS),
    "padding, a head": case("o", head=2, seq_pos=(-2,), pairs=LENGTHS),
    "begun alike": case("resid", layer=0, seq_pos=None, pairs=BEGUN_ALIKE),
    "begun alike, a head": case("k", head=1, seq_pos=None, pairs=BEGUN_ALIKE),
    "each its own": case(
        "resid",
        seq_pos=[[-1], [-3], [-2]],
        moves=[[(1, 1)], [(3, 3)], [(2, 2)]],
    ),
    "each its own, padded": case(
        "v",
        layer=2,
        seq_pos=[[-1], [-5], [-4], [-2]],
        pairs=LENGTHS,
        moves=[[(1, 1)], [(5, 5)], [(4, 4)], [(2, 2)]],
    ),
    "source apart": case(
        "resid",
        seq_pos=[-2],
        source_seq_pos=[-4],
        pairs=SHIFTED,
        moves=[[(2, 4)]] * 3,
    ),
    "source apart, each its own": case(
        "k",
        seq_pos=[[-2, -1], [-3, -1], [-4, -2]],
        source_seq_pos=[[-4, -1], [-6, -2], [-1, -3]],
        pairs=SHIFTED,
        moves=[[(2, 4), (1, 1)], [(3, 6), (1, 2)], [(4, 1), (2, 3)]],
    ),
}


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", SITES)
def test_a_step_is_the_oracles(name: str, engine: str) -> None:
    check(SITES[name], engine=engine)


def test_spans() -> None:
    pairs = [
        Pair((10, 11, 12, 13), (10, 14, 12, 13), 5, 6),
        Pair((20, 21, 22, 23, 24), (25, 20, 26, 27, 24), 7, 8),
    ]
    names = {"who": [("w11", "w14"), ("w21", "w26")]}
    sites = Sites("resid", [1], "spans", ["who"])
    own = Case(sites, Where("resid", 1), [[(3, 3)], [(3, 4)]], pairs, spans=names)
    for engine in ("cone", "full"):
        check(own, engine=engine)


FAMILY_SITES = {
    "gemma2": ("attn", None, "gemma2"),
    "gpt2": ("q", 1, "gpt2"),
    "gpt_neox": ("k", 2, "gpt_neox"),
    "mixtral": ("mlp", None, "mixtral"),
    "falcon": ("v", 0, "falcon"),
    "falcon, by group": ("o", 3, "falcon, by group"),
    "phi3": ("v", None, "phi3"),
}


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", FAMILY_SITES)
def test_other_families(name: str, engine: str) -> None:
    component, head, family = FAMILY_SITES[name]
    for own in (component, "resid"):
        used = head if own == component else None
        check(case(own, 0, used, (-2,), LENGTHS, family), engine=engine)


@pytest.mark.parametrize("engine", ["cone", "full"])
@pytest.mark.parametrize("name", ["resid", "padding", "k, a head"])
def test_the_rest_of_the_distribution(name: str, engine: str) -> None:
    with_kl = check(SITES[name], kl=0.7, engine=engine)
    assert not torch.allclose(with_kl, check(SITES[name], engine=engine))


def test_nothing_is_rounded_on_the_way() -> None:
    """Without anything that widens what is asked for in float32."""
    for kl in (0.0, 0.7):
        for engine in ("cone", "full"):
            check(case("resid", 0, None, (-2,), LENGTHS, "gpt2"), kl=kl, engine=engine)


@pytest.mark.parametrize("rank", [1, 3, 32])
def test_finite_differences(rank: int) -> None:
    with opened(SITES["padding"]) as (learner, _):
        basis = Basis(directions(32, rank, 1))
        draw = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            basis.parameter.normal_(generator=draw)
        pairs = torch.arange(4)
        gradient = learner.gradient(basis, pairs)[1]
        for _ in range(3):
            step = torch.randn(32, rank, generator=draw, dtype=torch.float64)
            ends = []
            for sign in (1e-5, -1e-5):
                moved = Basis(directions(32, rank, 1))
                with torch.no_grad():
                    moved.parameter.copy_(basis.parameter + sign * step)
                ends.append(learner.measure(moved.now(), pairs)[0].mean())
            found = (gradient * step).sum()
            torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, found, rtol=1e-6, atol=1e-9)
            assert rank == 32 or found.abs() > 1e-4


def test_a_basis_along_an_axis_has_its_whole_gradient() -> None:
    """Where the activation is not moved at all, it would be if the basis were another."""
    with opened(SITES["resid"]) as (learner, oracle):
        axis = torch.eye(32, dtype=torch.float64)[:, :1]
        own = torch.zeros(32, 1, dtype=torch.float64).requires_grad_()
        it = SITES["resid"]
        expected = oracle.loss(it.pairs, it.where, it.moves, reflected(axis, own))[0]
        (wanted,) = torch.autograd.grad(expected, [own])
        found = learner.gradient(Basis(axis), torch.arange(3))[1]
        torch.testing.assert_close(found, wanted, **CLOSE)
        assert (wanted[1:].abs() > 1e-6).all()


@pytest.mark.parametrize("engine", ["cone", "full"])
def test_parts_of_a_step_have_the_gradient_of_the_whole(engine: str) -> None:
    it = attrs.evolve(SITES["padding"], pairs=LENGTHS)
    with opened(it, engine=engine) as (learner, _):
        basis, pairs = Basis(directions(32, 2, 5)), torch.arange(4)
        whole = learner.gradient(basis, pairs)
        for size in (1, 2, 3):
            learner._at_once = size
            parts = learner.gradient(basis, pairs)
            torch.testing.assert_close(parts[:2], whole[:2], **CLOSE)
            assert parts[2] == whole[2]


def test_a_small_budget_makes_parts() -> None:
    it = SITES["padding"]
    with opened(it) as (learner, _):
        whole = learner.gradient(Basis(directions(32, 2, 5)), torch.arange(4))
        assert learner._at_once == 4
    with opened(it, memory_budget=250_000) as (learner, _):
        assert learner._at_once < 4
        parts = learner.gradient(Basis(directions(32, 2, 5)), torch.arange(4))
    torch.testing.assert_close(parts[:2], whole[:2], **CLOSE)


def test_rows_are_those_of_their_pairs() -> None:
    it = attrs.evolve(SITES["padding"])
    with opened(it) as (learner, oracle):
        basis = Basis(directions(32, 2, 5)).now()
        for order in ([2, 0], [3, 1, 0], [1]):
            losses, tops = learner.measure(basis, torch.tensor(order))
            for at, number in enumerate(order):
                expected, top = oracle.loss(
                    [it.pairs[number]], it.where, [it.moves[number]], basis.basis.detach()
                )
                torch.testing.assert_close(losses[at], expected, **CLOSE)
                assert [tops[at]] == top


def test_the_whole_component_is_plain_patching() -> None:
    for name in ("padding", "source apart", "q, a head"):
        it = SITES[name]
        with opened(it) as (learner, oracle):
            _, tops = learner.measure(None, torch.arange(len(it.pairs)))
            assert tops.tolist() == oracle.loss(it.pairs, it.where, it.moves, None)[1]


# An adapter that says no, and one that does not know.


def test_an_adapter_without_a_cone_falls_back_silently() -> None:
    api = attrs.evolve(tiny_api(), cone=False)
    site = attrs.evolve(SITES["resid"].site, api=api)
    with opened(attrs.evolve(SITES["resid"], site=site)) as (learner, _):
        assert learner.interchange.replay.name == "full"
    check(attrs.evolve(SITES["resid"], site=site))


def test_a_model_that_cannot_be_cut_falls_back_and_says_so() -> None:
    def failing(_: ConeReplay) -> None:
        raise EngineError("the model does not run from the middle of a prompt: no")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConeReplay, "check", failing)
        with (
            pytest.warns(EngineWarning, match="each step runs whole forwards.*from the middle"),
            opened(SITES["resid"]) as (learner, _),
        ):
            assert learner.interchange.replay.name == "full"
        with (
            pytest.raises(EngineError, match="from the middle"),
            opened(SITES["resid"], engine="cone"),
        ):
            pass


def test_the_logits_of_all_pairs_are_not_kept() -> None:
    with opened(SITES["padding"]) as (learner, _):
        replay = learner.interchange.replay
        assert isinstance(replay, ConeReplay)
        assert replay.target.logits.untyped_storage().nbytes() == 0
        assert learner.interchange.unpatched is None


@pytest.mark.parametrize("name", ["begun alike", "begun alike, a head"])
def test_what_both_prompts_begin_with_is_not_run(name: str) -> None:
    with opened(SITES[name]) as (learner, _):
        replay = learner.interchange.replay
        assert isinstance(replay, ConeReplay)
        assert replay.starts.tolist() == [3, 4, 3]


class Still:
    """A space of which nothing is ever patched."""

    width, rank = 32, 1

    def encode(self, x: Tensor) -> Tensor:
        return x[..., :1]

    def decode(self, c: Tensor) -> Tensor:
        return 0 * c.expand(*c.shape[:-1], self.width)

    def interchange(self, source: Tensor, target: Tensor) -> Tensor:
        return target

    def set(self, target: Tensor, values: Tensor) -> Tensor:
        return target


def test_a_space_in_which_nothing_changes_hides_no_other() -> None:
    it = SITES["begun alike"]
    site = attrs.evolve(it.site, subspace=Still())
    with opened(attrs.evolve(it, site=site)) as (learner, oracle):
        # The whole component is patched there as well, as a control.
        losses, _ = learner.measure(None, torch.arange(3))
        expected, _ = oracle.loss(it.pairs, it.where, it.moves, None)
        torch.testing.assert_close(losses.mean(), expected.detach(), **CLOSE)
