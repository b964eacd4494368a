"""Sites that are none get their own clear error, before a forward is wasted on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from nnsight import NNsight

from nnpatch_core import (
    AllPositions,
    Component,
    Custom,
    CustomConstant,
    DecoderAPI,
    Each,
    Last,
    LastK,
    MultiSite,
    Site,
    Sites,
    cache_average,
)
from nnpatch_core.errors import (
    HeadError,
    LayerError,
    PatchingError,
    PositionError,
    TokensError,
    UnknownNameError,
)
from nnpatch_core.testing import tiny_model
from tests.helpers.refusals import COMPONENTS, ONES, SOURCE, Counted, cases, last, raises, site


@pytest.fixture(scope="module")
def counted() -> Counted:
    return Counted(tiny_model())


# Components -------------------------------------------------------------------------------------


@cases(
    ("make", "parts"),
    [
        (lambda: Sites("residual"), ["'residual'", COMPONENTS]),
        (lambda: Sites(["resid", "head"]), ["'head'", COMPONENTS]),
        (lambda: Sites("RESID"), ["'RESID'", COMPONENTS]),
        (lambda: Sites([]), ["site_names is empty"]),
        (lambda: Sites([3]), ["3", "string"]),
        (lambda: Sites(3), ["3"]),
        (lambda: Sites(None), ["None"]),
        (lambda: Sites(["mlp", "resid", "mlp"]), ["'mlp' more than once"]),
        (lambda: Sites(["z", "o"]), ["'o' more than once", "'z'"]),
        (lambda: site("residual", 0), ["'residual'", COMPONENTS]),
        (lambda: site(None, 0), ["None", "string"]),
    ],
)
def test_unknown_component(counted: Counted, make: Callable[..., Any], parts: list[str]) -> None:
    with counted.rejects(UnknownNameError, *parts):
        counted.activation(make)


@cases(
    ("make", "parts"),
    [
        (lambda: "resid", ["'resid'", "Sites("]),
        (lambda: None, ["None", "Sites("]),
        (lambda: Sites, ["Sites(", "class"]),
        (lambda: [site("mlp", 0)], ["mlp", "from_sites"]),
    ],
)
@pytest.mark.parametrize("sweep", [Counted.activation, Counted.ablation])
def test_sites_that_are_none(
    counted: Counted, sweep: Callable[..., Any], make: Callable[..., Any], parts: list[str]
) -> None:
    with counted.rejects(PatchingError, *parts):
        sweep(counted, make)


BARE = DecoderAPI("Bare", ("llama",), {"mlp": Component("mlp"), "resid": Component("")})


@pytest.mark.parametrize("name", ["q", "resid_pre", "o"])
@pytest.mark.parametrize("make", [Sites, lambda name: Site.get_site(BARE, name, 0)])
def test_component_that_the_adapter_lacks(
    counted: Counted, name: str, make: Callable[..., Any] | type[Sites]
) -> None:
    with counted.rejects(
        UnknownNameError, "adapter 'Bare' has no", f"component '{name}'", "mlp, resid"
    ):
        counted.activation(lambda: make(name), BARE)


# Strategies -------------------------------------------------------------------------------------


@cases(
    ("seq_pos_type", "parts"),
    [
        ("lastn", ["'lastn'", "all, custom, custom_constant, each, last, lastk"]),
        ("", ["''", "lastk"]),
        ("Each", ["'Each'", "each"]),
        (3, ["3", "strategy"]),
        (["last"], ["['last']", "strategy"]),
        (Each, ["Each", "strategy"]),
        (len, ["len", "strategy"]),
    ],
)
def test_unknown_strategy(
    counted: Counted, seq_pos_type: str | type[Each], parts: list[str]
) -> None:
    with counted.rejects(UnknownNameError, *parts):
        counted.activation(lambda: Sites("resid", seq_pos_type=seq_pos_type))


@pytest.mark.parametrize("seq_pos_type", ["lastk", "custom", "custom_constant"])
def test_seq_pos_missing(counted: Counted, seq_pos_type: str) -> None:
    with counted.rejects(PositionError, f"'{seq_pos_type}'", "needs seq_pos="):
        counted.activation(lambda: Sites("resid", seq_pos_type=seq_pos_type))


@pytest.mark.parametrize("seq_pos", [2, [0, 1], 0, []])
@pytest.mark.parametrize(
    "seq_pos_type",
    [
        *(None, "all", "each", "last"),
        *(AllPositions(), Each(), Last(), LastK(2), Custom([0]), CustomConstant([0])),
    ],
    ids=repr,
)
def test_seq_pos_where_it_means_nothing(
    counted: Counted, seq_pos_type: str | None, seq_pos: int | list[int]
) -> None:
    with counted.rejects(PositionError, f"seq_pos={seq_pos!r} means nothing"):
        counted.activation(lambda: Sites("resid", seq_pos_type=seq_pos_type, seq_pos=seq_pos))


class Strategy:
    """A third party's strategy, of fixed groups."""

    def __init__(self, *groups: Any, one_by_one: Any = True) -> None:
        self.groups = groups
        self.one_by_one = one_by_one

    def __repr__(self) -> str:
        return "Theirs()"

    def expand(self, seq_len: int) -> list[tuple[int, ...]]:
        return list(self.groups)


@cases(
    ("strategy", "parts"),
    [
        (Strategy(), ["no positions", "4 tokens"]),
        (Strategy(()), ["[]", "4 tokens"]),
        (Strategy((0, 4)), ["[0, 4]", "4 tokens"]),
        (Strategy((-1,)), ["[-1]", "4 tokens"]),
        (Strategy((1, 1)), ["[1, 1]", "without duplicates"]),
        (Strategy((2, 1)), ["[2, 1]", "ascending"]),
        (Strategy((0, 1), (0, 2)), ["share a place", "[0, 2]"]),
        (Strategy((0,), (1,), one_by_one=False), ["share a place", "[[0], [1]]"]),
        (Strategy((True,)), ["True"]),
        (Strategy((1.0,)), ["1.0"]),
        (Strategy(3), ["3"]),
    ],
)
def test_strategy_that_breaks_a_law(counted: Counted, strategy: Strategy, parts: list[str]) -> None:
    with counted.rejects(PositionError, "Theirs()", *parts):
        counted.activation(lambda: Sites("resid", seq_pos_type=strategy))


# Positions --------------------------------------------------------------------------------------


MALFORMED_POSITIONS = [
    ([True], ["True", "(bool)"]),
    ([np.True_], ["True", "(bool"]),
    ([1.0], ["1.0", "(float)"]),
    (torch.tensor([0.0]), ["tensor(0.)", "integer"]),
    (np.array([0.5]), ["0.5", "float"]),
    (["1"], ["'1'", "integer"]),
    ([None], ["None", "integer"]),
    ([1, 1], ["1 more than once"]),
    ([], ["empty"]),
    (3, ["3", "list"]),
    ("12", ["'12'", "list"]),
]


@cases(("seq_pos", "parts"), MALFORMED_POSITIONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda seq_pos: Sites("resid", None, "custom", seq_pos),
        lambda seq_pos: Sites("resid", None, "custom_constant", seq_pos),
        lambda seq_pos: Sites("resid", None, Custom(seq_pos)),
        lambda seq_pos: Sites("resid", None, CustomConstant(seq_pos)),
        lambda seq_pos: site("resid", 0, None, seq_pos),
    ],
    ids=["custom", "custom_constant", "Custom", "CustomConstant", "get_site"],
)
def test_malformed_positions(
    counted: Counted, make: Callable[..., Any], seq_pos: Any, parts: list[str]
) -> None:
    with counted.rejects(PositionError, *parts):
        counted.activation(lambda: make(seq_pos))


@cases(
    ("seq_pos", "parts"),
    [
        ([4], ["position 4 ", "4 tokens", "-4 to 3"]),
        ([0, 99], ["position 99 ", "-4 to 3"]),
        ([-5], ["position -5 ", "-4 to 3"]),
        ([3, -1], ["3 and -1 are the same", "4 tokens"]),
        ([-4, 1, 0], ["-4 and 0 are the same"]),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda seq_pos: Sites("q", None, "custom", seq_pos),
        lambda seq_pos: Sites("q", None, CustomConstant(seq_pos)),
        lambda seq_pos: Sites.from_sites([site("q", 0, 1, seq_pos)]),
        lambda seq_pos: Sites.from_sites([MultiSite([site("q", 0), site("q", 1, 1, seq_pos)])]),
    ],
    ids=["custom", "CustomConstant", "from_sites", "MultiSite"],
)
def test_positions_that_the_prompt_does_not_have(
    counted: Counted, make: Callable[..., Any], seq_pos: list[int], parts: list[str]
) -> None:
    with counted.rejects(PositionError, *parts):
        counted.activation(lambda: make(seq_pos))
    with counted.rejects(PositionError, *parts):
        counted.ablation(lambda: make(seq_pos))


@cases(
    ("k", "parts"),
    [
        (5, ["last 5 ", "4 tokens"]),
        (0, ["at least 1", "0"]),
        (-1, ["at least 1", "-1"]),
        (True, ["True", "(bool)"]),
        (2.0, ["2.0", "(float)"]),
        ("2", ["'2'", "integer"]),
        ([2], ["[2]", "integer"]),
    ],
)
@pytest.mark.parametrize(
    "make", [lambda k: Sites("resid", None, "lastk", k), lambda k: Sites("resid", None, LastK(k))]
)
def test_lastk(counted: Counted, make: Callable[..., Any], k: int | str, parts: list[str]) -> None:
    with counted.rejects(PositionError, *parts):
        counted.activation(lambda: make(k))


# Layers and heads -------------------------------------------------------------------------------


MALFORMED_LAYERS = [
    (True, ["True", "(bool)"]),
    (np.False_, ["False", "(bool"]),
    (1.0, ["1.0", "(float)"]),
    (np.float32(1), ["1.0", "(float32)"]),
    ("1", ["'1'", "integer"]),
    (None, ["None", "integer"]),
]


@cases(("layer", "parts"), MALFORMED_LAYERS)
def test_malformed_layer(counted: Counted, layer: Any, parts: list[str]) -> None:
    with counted.rejects(LayerError, *parts):
        counted.activation(lambda: Sites("resid", layers=[0, layer]))
    with raises(LayerError, *parts):
        site("resid", layer)


@cases(
    ("layers", "parts"),
    [
        ([3], ["layer 3 ", "0 to 2"]),
        ([0, 1, 99], ["layer 99 ", "0 to 2"]),
        ([-1], ["layer -1 ", "0 to 2"]),
        ([1, 1], ["1 more than once"]),
        ([], ["layers is empty"]),
        (1, ["1", "list"]),
        ("12", ["'12'", "list"]),
    ],
)
def test_layers_that_the_model_does_not_have(
    counted: Counted, layers: int | list[int], parts: list[str]
) -> None:
    with counted.rejects(LayerError, *parts):
        counted.activation(lambda: last(layers))
    with counted.rejects(LayerError, *parts):
        counted.ablation(lambda: last(layers))


def test_layer_of_a_site(counted: Counted) -> None:
    with raises(LayerError, "layer -1 ", "from 0"):
        site("resid", -1)
    for make in (site, lambda *place: MultiSite([site("mlp", 0), site(*place)])):
        with counted.rejects(LayerError, "layer 3 ", "0 to 2"):
            counted.activation(lambda make=make: Sites.from_sites([make("resid", 3)]))


@cases(
    ("head", "parts"),
    [
        (True, ["True", "(bool)"]),
        (1.0, ["1.0", "(float)"]),
        (np.float64(1), ["1.0", "(float64)"]),
        ("1", ["'1'", "integer"]),
    ],
)
def test_malformed_head(counted: Counted, head: Any, parts: list[str]) -> None:
    with counted.rejects(HeadError, *parts):
        counted.activation(lambda: Sites("q", heads=[0, head]))
    with raises(HeadError, *parts):
        site("q", 0, head)


@cases(
    ("name", "heads", "parts"),
    [
        ("q", [4], ["head 4 ", "'q'", "query", "0 to 3"]),
        ("o", [0, 99], ["head 99 ", "'o'", "0 to 3"]),
        ("k", [2], ["head 2 ", "'k'", "key/value", "0 to 1"]),
        ("v", [3], ["head 3 ", "'v'", "0 to 1"]),
        (["q", "k"], [3], ["head 3 ", "'k'", "0 to 1"]),
        ("q", [-1], ["head -1 ", "'q'", "0 to 3"]),
        ("q", [1, 1], ["1 more than once"]),
        ("q", [], ["heads is empty"]),
        ("q", 1, ["1", "list"]),
    ],
)
def test_heads_that_the_component_does_not_have(
    counted: Counted, name: str, heads: list[int], parts: list[str]
) -> None:
    with counted.rejects(HeadError, *parts):
        counted.activation(lambda: Sites(name, heads=heads))


@pytest.mark.parametrize("name", ["resid_pre", "attn", "mlp", "resid"])
def test_head_of_a_component_without_heads(counted: Counted, name: str) -> None:
    with counted.rejects(HeadError, f"'{name}' has no heads", "0"):
        counted.activation(lambda: Sites(name, heads=[0]))
    with raises(HeadError, f"'{name}' has no heads", "head 0 "):
        site(name, 0, 0)


def test_heads_of_several_components_none_of_which_has_any(counted: Counted) -> None:
    with counted.rejects(HeadError, "heads=[1]", "'attn'", "'mlp'", "no heads"):
        counted.activation(lambda: Sites(["attn", "mlp"], heads=[1]))


@pytest.mark.parametrize(
    ("name", "head", "allowed"), [("q", 4, "0 to 3"), ("o", 99, "0 to 3"), ("k", 2, "0 to 1")]
)
def test_head_of_a_site(counted: Counted, name: str, head: int, allowed: str) -> None:
    with raises(HeadError, "head -1 ", f"'{name}'", "0"):
        site(name, 0, -1)
    with counted.rejects(HeadError, f"head {head} ", f"'{name}'", allowed):
        counted.activation(lambda: Sites.from_sites([site(name, 0, head)]))


# Sites of one's own -----------------------------------------------------------------------------


@cases(
    ("make", "parts"),
    [
        (lambda: Sites.from_sites([]), ["empty"]),
        (lambda: Sites.from_sites(["resid"]), ["'resid'", "Site and MultiSite"]),
        (lambda: Sites.from_sites([site("q", 0), None]), ["None", "Site and MultiSite"]),
        (lambda: Sites.from_sites([last()]), ["Sites(", "Site and MultiSite"]),
        (lambda: Sites.from_sites("resid"), ["'r"]),
        (lambda: Sites.from_sites(None), ["None"]),
        (lambda: Sites.from_sites(site("mlp", 0)), ["mlp"]),
        (lambda: MultiSite([]), ["at least one"]),
        (lambda: MultiSite(["resid"]), ["'resid'", "Site"]),
        (lambda: MultiSite([site("q", 0), None]), ["None", "Site"]),
        (lambda: MultiSite(None), ["None"]),
        (lambda: MultiSite(site("mlp", 0)), ["mlp"]),
        (lambda: MultiSite([MultiSite([site("q", 0)])]), ["MultiSite"]),
    ],
)
def test_lists_of_sites(make: Callable[..., Any], parts: list[str]) -> None:
    with raises(PatchingError, *parts):
        make()


@cases(
    ("sites", "error", "parts"),
    [
        ([site("resid", 3)], LayerError, ["layer 3 ", "0 to 2"]),
        ([site("q", 0, 4)], HeadError, ["head 4 ", "0 to 3"]),
        ([site("q", 0, None, [4])], PositionError, ["position 4 ", "-4 to 3"]),
        ([MultiSite([site("q", 0), site("k", 0, 2)])], HeadError, ["head 2 ", "0 to 1"]),
        (["resid"], PatchingError, ["'resid'"]),
    ],
)
def test_sites_to_average(
    counted: Counted, sites: list[Site], error: type[Exception], parts: list[str]
) -> None:
    with counted.rejects(error, *parts):
        cache_average(counted.model, sites, SOURCE)


@cases(
    ("batches", "parts"),
    [
        ([], ["empty"]),
        (SOURCE + 60, ["72", "0 to 63"]),
        (SOURCE[0], ["[batch, seq]", "[4]"]),
        ([SOURCE.tolist()], ["list"]),
        ([["one text"]], ["list"]),
        ({"tokens": SOURCE}, ["input_ids"]),
        (5, ["5"]),
    ],
)
def test_data_set_to_average(
    counted: Counted, batches: torch.Tensor | dict[str, torch.Tensor] | list[Any], parts: list[str]
) -> None:
    with counted.rejects(TokensError, *parts):
        cache_average(counted.model, [site("mlp", 0)], batches)


def test_average_over_padding(counted: Counted) -> None:
    mask = ONES.clone()
    mask[1, 0] = 0
    with counted.rejects(TokensError, "mlp L0", "padding", "from the end"):
        cache_average(counted.model, [site("mlp", 0)], [(SOURCE, mask)])


@cases(
    ("tokens", "parts"),
    [
        (SOURCE.tolist(), ["tensor", "list"]),
        (SOURCE[0], ["[batch, seq]", "[4]"]),
        ({"input_ids": SOURCE[0]}, ["[batch, seq]", "[4]"]),
        ({"ids": SOURCE}, ["no 'input_ids'", "['ids']"]),
    ],
)
@pytest.mark.parametrize(
    "make", [last, lambda: Sites.from_sites([site("mlp", 0)])], ids=["Sites", "from_sites"]
)
def test_tokens_of_get_sites_dict(
    counted: Counted,
    make: Callable[..., Any],
    tokens: torch.Tensor | dict[str, torch.Tensor] | list[list[int]],
    parts: list[str],
) -> None:
    with counted.rejects(TokensError, "tokens", *parts):
        make().get_sites_dict(counted.model, None, tokens)


@pytest.mark.parametrize("make", [site, lambda *place: MultiSite([site(*place)])])
def test_patch_without_cache(counted: Counted, make: Callable[..., Any]) -> None:
    uncached = make("resid", 1)
    model = NNsight(counted.model)

    def patch() -> None:
        with model.trace(SOURCE):
            uncached.patch(model)

    with raises(PatchingError, "resid L1", "no cache", "zero=True"):
        patch()
