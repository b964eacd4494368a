"""The field's other names of components are taken everywhere, and an outcome keeps them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnpatch_core import (
    MultiSite,
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.components import COMPONENT_NAMES, SYNONYMS, canonical_name
from nnpatch_core.errors import NotSweptError, UnknownNameError
from nnpatch_core.testing import tiny_api, tiny_model

SOURCE, TARGET = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
ANSWERS = torch.tensor([20]), torch.tensor([30])


def swept(sites: Any, **options: Any) -> Outcome:
    return activation_patching(
        tiny_model("llama"), tiny_api(), sites, SOURCE, TARGET, *ANSWERS, progress=False, **options
    )


def test_each_stands_for_a_component() -> None:
    assert set(SYNONYMS.values()) <= set(COMPONENT_NAMES)
    assert not set(SYNONYMS) & set(COMPONENT_NAMES)
    assert {"resid_post", "attn_out", "mlp_out", "z"} <= set(SYNONYMS)


@pytest.mark.parametrize("screen", [{}, {"screen": "attribution", "top_k": 2}])
@pytest.mark.parametrize("name", SYNONYMS)
def test_an_outcome_keeps_the_name_that_was_asked_for(name: str, screen: dict[str, Any]) -> None:
    component = canonical_name(name)
    asked, plain = (swept(Sites(each, seq_pos_type="each"), **screen) for each in (name, component))
    assert (list(asked), list(plain)) == ([name], [component])
    # Each finds the other, too.
    assert torch.equal(asked[name], plain[component])
    assert torch.equal(asked[component], plain[name])
    assert name in asked
    assert component in asked
    assert {row["site"] for row in asked.strongest(2)} == {name}
    assert set(asked.to_dataframe()["site"]) == {name}
    with pytest.raises(NotSweptError):
        asked["resid_pre"]


@pytest.mark.parametrize("name", SYNONYMS)
def test_lists_of_sites(name: str) -> None:
    api = tiny_api()
    site = Site.get_site(api, name, 1, None, [-1])
    assert (site.name, site.component) == (name, canonical_name(name))
    assert site.label.startswith(f"{name} L1")
    assert site == Site.get_site(api, canonical_name(name), 1, None, [-1])
    both = MultiSite([site, Site.get_site(api, "resid_pre", 1, None, [-1])])
    assert both.name == f"resid_pre+{name}"
    out = swept(Sites.from_sites([site, both]))
    assert list(out) == [name, both.name]
    assert out.axes(name)[0].labels == (site.label,)


@pytest.mark.parametrize("name", SYNONYMS)
def test_other_entry_points_and_their_agreement(name: str) -> None:
    model, api, component = tiny_model("llama"), tiny_api(), canonical_name(name)
    sites = [Sites(each, layers=[0, 1], seq_pos_type="each") for each in (name, component)]
    given = {"progress": False}
    ablated = [ablation_patching(model, api, each, SOURCE, *ANSWERS, **given) for each in sites]
    assert list(ablated[0]) == [name]
    assert torch.equal(ablated[0][name], ablated[1][component])
    pair = (SOURCE, TARGET, *ANSWERS)
    estimate = attribution_patching(model, api, sites[0], *pair, **given)
    exact = activation_patching(model, api, sites[1], *pair, **given)
    assert list(estimate) == [name]
    agreement = estimate.agreement(exact)
    assert agreement.cells == estimate.agreement(swept(sites[0])).cells > 0


def test_one_component_under_two_names_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'attn' more than once: \['attn', 'attn_out'\]"):
        Sites(["attn", "attn_out"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("hook_resid_post", "resid_post"),
        ("blocks.3.hook_resid_pre", "resid_pre"),
        ("blocks.0.attn.hook_q", "q"),
        ("attn.hook_z", "z"),
        ("hook_mlp_out", "mlp_out"),
        ("hook_attn_out", "attn_out"),
        ("resid_posts", "resid_post"),
        ("MLP", "mlp"),
        ("attn_output", "attn_out"),
    ],
)
def test_did_you_mean(name: str, meant: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"unknown component .*did you mean [^)]*{meant}"):
        swept(Sites(name))
    with pytest.raises(UnknownNameError, match=rf"did you mean [^)]*{meant}"):
        Site.get_site(tiny_api(), name, 1)


@pytest.mark.parametrize("name", ["hook_pattern", "blocks.2.hook_resid_mid", "hook_embed", "wte"])
def test_what_there_is_is_told(name: str) -> None:
    with pytest.raises(UnknownNameError, match="has resid_pre, q, k, v, o, attn, mlp, resid"):
        swept(Sites(name))
