"""Sites of several kinds of positions, patched together: what plain hooks give, token by token."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nnpatch_core import CustomConstant, MultiSite, Outcome, Site, Sites, attribution_patching
from tests.helpers.oracle import Place, lay_out, random_prompts
from tests.helpers.pairs import LAYERS, Pairs

#: Sites at positions that all prompts share are what is tested here, so that it needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

RELAXED = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
ENGINES = st.sampled_from(["cone", "full"])
OPTIONS = st.sampled_from([{}, {"batch_size": 1}, {"batch_size": 2}])


@attrs.frozen
class Two:
    """Two prompts; two columns of each, in any order, and positions that both share."""

    pairs: Pairs
    columns: tuple[tuple[int, ...], ...]
    shared: tuple[int, ...]

    def seq_pos(self) -> list[list[int]]:
        return [[-back for back in row] for row in self.columns]


@st.composite
def twos(draw: st.DrawFn) -> Two:
    prompts = random_prompts([draw(st.integers(2, 6)) for _ in range(2)], seed=draw(st.integers(0)))
    layout = draw(st.sampled_from(["left", "right", "mixed"]))
    pairs = Pairs("llama", prompts, prompts, layout, draw(st.integers(0, 1)))
    columns = tuple(
        tuple(draw(st.permutations(range(1, len(prompt) + 1)))[:2]) for prompt in prompts
    )
    # Some of these are padding in one of the prompts.
    places = st.lists(st.integers(1, pairs.width), min_size=1, max_size=3, unique=True)
    return Two(pairs, columns, tuple(draw(places)))


def value(two: Two, kind: str, place: Place, prompt: int, back: int) -> Tensor | None:
    """What is put at a position, counted from the end: of a column at `resid`, or a shared one."""
    oracle, prompts = two.pairs.oracle, two.pairs.target
    if place.component == "resid":
        column = two.columns[prompt].index(back)
        there = [row[column] for row in two.columns]
    else:
        there = [back, back]
    found = [
        oracle.activation(each, place.component, place.layer)[len(each) - at]
        if at <= len(each)
        else None
        for each, at in zip(prompts, there, strict=True)
    ]
    if kind == "resample":
        return found[1 - prompt]
    return torch.stack([each for each in found if each is not None]).double().mean(0)


def change(two: Two, kind: str, *places: tuple[Place, bool]) -> float:
    """The change of the two prompts' mean; of each place whether it is at the columns."""
    oracle, prompts = two.pairs.oracle, two.pairs.target
    rows = []
    for prompt, tokens in enumerate(prompts):
        there = [
            place._replace(from_end=two.columns[prompt] if own else two.shared)
            for place, own in places
        ]
        rows.append(
            oracle.replaced(tokens, there, lambda at, back, p=prompt: value(two, kind, at, p, back))
        )
    ends = torch.stack([oracle.logits(each) for each in prompts])
    difference = two.pairs.difference(torch.stack(rows)) - two.pairs.difference(ends)
    return float(difference.mean())


def ablate(two: Two, kind: str, sites: Any, engine: str, **options: Any) -> Outcome:
    given = {"method": "resample"} if kind == "resample" else {"method": "mean"}
    if kind != "resample":
        options["per_position"] = True
    return two.pairs.ablate(sites, engine, **given, **options)


@pytest.mark.parametrize("kind", ["mean", "resample"])
@RELAXED
@given(two=twos(), engine=ENGINES, options=OPTIONS, layer=st.integers(0, LAYERS - 1))
def test_shared_positions_beside_those_of_each_prompt(
    kind: str, two: Two, engine: str, options: dict[str, Any], layer: int
) -> None:
    """Where one prompt has padding at a shared position, the others keep their own values."""
    api = two.pairs.api
    shared = Site.get_site(api, "mlp", layer, seq_pos=[-back for back in two.shared])
    own = Site.get_site(api, "resid", LAYERS - 1, seq_pos=two.seq_pos())
    sites = Sites.from_sites([MultiSite([shared, own], name="both")])
    out = ablate(two, kind, sites, engine, **options)
    expected = change(two, kind, (Place("mlp", layer), False), (Place("resid", LAYERS - 1), True))
    assert out["both"][0].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", ["mean", "resample"])
@RELAXED
@given(two=twos(), engine=ENGINES, options=OPTIONS)
def test_a_column_is_one_part_wherever_it_stands(
    kind: str, two: Two, engine: str, options: dict[str, Any]
) -> None:
    """Its mean, or its value of another prompt, is of the same column, and not of the same rank."""
    sites = Sites("resid", seq_pos_type=CustomConstant(two.seq_pos()))
    out = ablate(two, kind, sites, engine, **options)
    for layer in range(LAYERS):
        expected = change(two, kind, (Place("resid", layer), True))
        assert out["resid"][layer].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("how", ["cone", "full", "attribution"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_site_whose_source_is_padding_in_every_prompt(how: str, count: int) -> None:
    """It is not patched, and the others of its cell are."""
    source, target = random_prompts([3, 4], seed=1)[:count], random_prompts([5, 5], seed=2)[:count]
    pairs = Pairs("llama", source, target)
    lacking = Site.get_site(pairs.api, "mlp", 0, seq_pos=[0], source_seq_pos=[0])
    last = Site.get_site(pairs.api, "mlp", 1, seq_pos=[-1], source_seq_pos=[-2])

    def value(*sites: Site) -> Tensor:
        listed = Sites.from_sites([MultiSite(list(sites), name="mlp")])
        if how != "attribution":
            return pairs.sweep(listed, how)["mlp"]
        tokens, masks = zip(*(lay_out(each, "left", 5) for each in (source, target)), strict=True)
        return attribution_patching(
            pairs.model,
            pairs.api,
            listed,
            *tokens,
            *pairs.answers,
            source_attention_mask=masks[0],
            target_attention_mask=masks[1],
            progress=False,
        )["mlp"]

    assert value(lacking, last).abs().sum() > 0
    torch.testing.assert_close(value(lacking, last), value(last))
