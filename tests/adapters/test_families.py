"""Adapters of many families, as a third party would write them: the kit, and plain hooks.

None of them needs a change of nnpatch_core: each is a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import chain, product
from typing import Any

import pytest
import torch
from nnsight import NNsight

from nnpatch_core import DecoderAPI, MultiSite, Site, Sites, activation_patching
from nnpatch_core.errors import AdapterError, HeadError, LayerError
from nnpatch_core.testing import parametrize_with_checks, tiny_model
from tests.helpers.families import (
    FAMILIES,
    LAID_OUT_AS,
    SEEDS,
    Counted,
    Lfm2,
    Listed,
    MixedOrder,
    model_of,
    more_heads_in_one_layer,
)
from tests.helpers.family_oracle import LAYOUTS, FamilyOracle, Spot
from tests.helpers.oracle import lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

#: At most 5e-6 was measured, and the smallest of the largest effects is 2e-3.
ATOL = 1e-5
#: Two lengths, so that one prompt is padded, but at neither of the positions, as counted from the
#: end.
LENGTHS = (6, 4)
LAST, MIDDLE = 1, 3


#: Whose layers differ, so that the kit is to see them all.
DIFFERENT = (
    *("gemma2", "gemma3_text", "lfm2", "olmo_hybrid", "qwen3_next"),
    *("llama, MLP first in one layer", "llama, more heads in one layer"),
)


def kit(name: str) -> list[Any]:
    """The kit on a model of a family, with one layer where all layers are alike.

    A check looks at one layer after the other, each by the same table. What a patch does in later
    layers, in either engine, is what sweeps of two layers are held to by plain hooks, below.
    """
    one = functools.partial(FAMILIES[name].model, num_hidden_layers=1)
    made = {name: functools.partial(model_of, name) if name in DIFFERENT else one}
    return parametrize_with_checks(FAMILIES[name].api, made).args[1]


@pytest.mark.parametrize("check", [case for name in FAMILIES for case in kit(name)])
def test_the_kit(check: Callable[[], None]) -> None:
    check()


# Plain hooks.


class Hooks:
    """Two pairs of prompts of a family, and what plain hooks say of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.oracle = FamilyOracle(model_of(name), LAYOUTS[LAID_OUT_AS.get(name, name)])
        seed = SEEDS.get(name, 1)
        self.source = random_prompts(LENGTHS, seed=seed)
        self.target = random_prompts(LENGTHS, seed=seed + 1)
        self.source_tokens, self.mask = lay_out(self.source, "left", seed=3)
        self.target_tokens, _ = lay_out(self.target, "left", seed=4)
        source = torch.stack([self.oracle.logits(prompt) for prompt in self.source])
        target = torch.stack([self.oracle.logits(prompt) for prompt in self.target])
        # The two tokens between which the runs differ most, so that no effect is a small one.
        self.answers = (source - target).argmax(-1), (source - target).argmin(-1)
        self.unpatched = self.difference(target)

    def difference(self, logits: torch.Tensor) -> torch.Tensor:
        """The logit difference of each prompt, `[batch]`."""
        rows = torch.arange(len(LENGTHS))
        return logits[rows, self.answers[0]] - logits[rows, self.answers[1]]

    def patched(self, *spots: Spot) -> torch.Tensor:
        """The logit difference of each prompt, `[batch]`, with all of the spots patched."""
        pairs = zip(self.target, self.source, strict=True)
        return self.difference(
            torch.stack([self.oracle.patched(target, source, spots) for target, source in pairs])
        )

    def sweep(self, sites: Any, api: Any = None) -> Any:
        return activation_patching(
            model_of(self.name),
            FAMILIES[self.name].api if api is None else api,
            sites,
            self.source_tokens,
            self.target_tokens,
            *self.answers,
            attention_mask=self.mask,
            progress=False,
        )


hooks = functools.cache(Hooks)


def spots(oracle: FamilyOracle, component: str) -> Iterator[Spot]:
    """A component in the first two layers, as far as they have it: some heads and positions."""
    for layer, back in product((0, 1), (LAST, MIDDLE)):
        if component in oracle.layout.table(layer):
            heads = oracle.heads(component, layer)
            for head in dict.fromkeys((heads[0], heads[-1])):
                yield component, layer, head, back


def site(api: DecoderAPI, spot: Spot) -> Site:
    component, layer, head, back = spot
    return Site.get_site(api, component, layer, head, [-back])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sweep_equals_plain_hooks(name: str) -> None:
    known, api = hooks(name), FAMILIES[name].api
    components = list(dict.fromkeys(chain(*known.oracle.layout.tables)))
    wanted = {component: list(spots(known.oracle, component)) for component in components}
    out = known.sweep(Sites.from_sites(site(api, spot) for spot in chain(*wanted.values())))
    assert out.info["engine"] == ("cone" if api.cone else "full")
    declared = {*api.components, *chain(*api.kinds.values())}
    assert set(out) == set(components) == declared
    for component, cells in wanted.items():
        expected = torch.stack([known.patched(spot) for spot in cells])
        torch.testing.assert_close(out.patched(component), expected, atol=ATOL, rtol=0)
        # Something moves, and by far more than the tolerance.
        assert (expected - known.unpatched).abs().max() > 100 * ATOL, component


# Layers that differ.


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("qwen3_next", "q k v o"), ("olmo_hybrid", "q k v o"), ("lfm2", "q k v o attn")],
)
def test_a_sweep_of_every_layer_is_of_those_that_have_the_component(
    name: str, lacking: str
) -> None:
    known = hooks(name)
    out = known.sweep(Sites([*lacking.split(), "mlp"], seq_pos_type="last"))
    assert out["mlp"].shape == (3,)
    assert out.swept("mlp").all()
    frame = out.to_dataframe()
    for component in lacking.split():
        heads = known.oracle.heads(component, 1)
        assert out[component].shape == (3, *([] if heads == [None] else [len(heads)]))
        assert out.swept(component)[1].all()
        assert not out.swept(component)[[0, 2]].any()
        assert torch.equal(out[component][[0, 2]], torch.zeros_like(out[component][[0, 2]]))
        assert out.patched(component)[[0, 2]].isnan().all()
        for head in heads:
            index = (1,) if head is None else (1, head)
            expected = known.patched((component, 1, head, LAST))
            torch.testing.assert_close(out.patched(component)[index], expected, atol=ATOL, rtol=0)
        rows = frame[frame["site"] == component]
        assert len(rows) == 3 * len(heads)
        assert rows["layer"][rows["value"].notna()].tolist() == [1] * len(heads)
        assert out.to_xarray()[component].notnull().any(..., keep_attrs=True)


@pytest.mark.parametrize("name", ["qwen3_next", "olmo_hybrid", "lfm2"])
def test_a_layer_without_the_component_is_refused(name: str) -> None:
    known, api = hooks(name), FAMILIES[name].api
    refusal = r"layer 0 has no '[oz]'; the layers \[1\] have one"
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites("o", layers=[0, 1]))
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites(["mlp", "z"], layers=[0]))
    with pytest.raises(LayerError, match=refusal):
        known.sweep(Sites.from_sites([Site.get_site(api, "o", 0)]))
    assert list(known.sweep(Sites("o", layers=[1]))) == ["o"]


def test_a_component_that_no_layer_of_this_model_has_is_refused() -> None:
    model = tiny_model("lfm2", layer_types=["conv"] * 3)
    tokens, answers = torch.tensor([[5, 6, 7]]), torch.tensor([5])
    for names in ("q", ["resid", "q"]):
        with pytest.raises(LayerError, match="no layer of this model has"):
            activation_patching(
                model, Lfm2, Sites(names), tokens, tokens + 1, answers, answers + 1, progress=False
            )


@pytest.mark.parametrize("api", [Listed, Counted], ids=lambda api: api.name)
def test_layers_with_other_numbers_of_heads(api: DecoderAPI) -> None:
    """The axis of heads is as long as the layer with most of them needs."""
    known = hooks("llama, more heads in one layer")
    out = known.sweep(Sites(["k", "v", "q"], seq_pos_type="last"), api)
    assert out["q"].shape == (3, 4)
    assert out.swept("q").all()
    for component in ("k", "v"):
        has = [[True, True, False, False], [True] * 4, [True, True, False, False]]
        assert out.swept(component).tolist() == has
        assert out[component].shape == (3, 4)
        for layer, head in out.swept(component).nonzero().tolist():
            expected = known.patched((component, layer, head, LAST))
            found = out.patched(component)[layer, head]
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
        rows = out.to_dataframe()
        rows = rows[(rows["site"] == component) & rows["value"].isna()]
        assert rows[["layer", "head"]].values.tolist() == [[0, 2], [0, 3], [2, 2], [2, 3]]
    with pytest.raises(HeadError, match="head 3 of 'k' is out of range"):
        known.sweep(Sites("k", layers=[0], heads=[3]), api)
    assert known.sweep(Sites("k", layers=[1], heads=[3]), api).swept("k").sum() == 1


def test_a_list_of_heads_that_is_too_short() -> None:
    model = more_heads_in_one_layer()
    model.config.key_value_heads_of_layers = [2, 4]
    with pytest.raises(AdapterError, match="key_value_heads_of_layers"):
        Sites("k").get_sites_dict(model, Listed, torch.tensor([[5, 6]]))


#: In this order a forward reaches neither the first layer's nor the second layer's.
SEVERAL: list[Spot] = [
    ("attn", 1, None, LAST),
    ("q", 1, 2, MIDDLE),
    ("mlp", 1, None, MIDDLE),
    ("mlp", 0, None, LAST),
    ("k", 0, 1, MIDDLE),
]


def test_several_sites_of_layers_that_run_in_another_order() -> None:
    known = hooks("llama, MLP first in one layer")
    both = MultiSite([site(MixedOrder, spot) for spot in SEVERAL], name="both")
    reached = [
        (each.layer, each.component) for each in both.in_order(NNsight(model_of(known.name)))
    ]
    assert reached == [(0, "k"), (0, "mlp"), (1, "mlp"), (1, "q"), (1, "attn")]
    out = known.sweep(Sites.from_sites([both]))
    expected = known.patched(*SEVERAL)
    torch.testing.assert_close(out.patched("both")[0], expected, atol=ATOL, rtol=0)
    assert (expected - known.unpatched).abs().min() > 100 * ATOL


def test_several_sites_in_ones_own_traces() -> None:
    """Prompts of one length, as the user's own trace has no mask."""
    known = hooks("llama, MLP first in one layer")
    nnmodel = NNsight(model_of(known.name))
    both = MultiSite([site(MixedOrder, spot) for spot in SEVERAL])
    source, target = known.source[0], known.target[0]
    with torch.no_grad(), nnmodel.trace(torch.tensor([source])):
        both.cache(nnmodel)
    with torch.no_grad(), nnmodel.trace(torch.tensor([target])):
        both.patch(nnmodel)
        logits = nnmodel.output.logits[0, -1].save()
    expected = known.oracle.patched(target, source, SEVERAL)
    torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)
