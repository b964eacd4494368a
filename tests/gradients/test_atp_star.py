"""AtP*: the QK fix and GradDrop, against the oracle and where the plain estimate fails."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from nnpatch_core import (
    DecoderAPI,
    Fused,
    Outcome,
    Site,
    Sites,
    attribution_patching,
    decoder_components,
)
from nnpatch_core.adapters import fused_projections
from nnpatch_core.errors import GradientError, MetricError, PositionError
from nnpatch_core.testing import tiny_model
from tests.helpers.attribution import (
    EXPECTED,
    LAYERS,
    METHODS,
    METRICS,
    Runs,
    check,
    check_laid,
    metric_of,
    runs_of,
)
from tests.helpers.attribution_oracle import AttributionOracle
from tests.helpers.oracle import COMPONENTS, Place
from tests.helpers.pairs import VARIANTS, Pairs
from tests.helpers.strategies import ablations, grids, pairs_of

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

REPAIRS = ("QK fix", "GradDrop", "AtP*")


# Against the oracle.


@pytest.mark.parametrize("method", REPAIRS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_component_head_and_position(variant: str, method: str) -> None:
    runs = runs_of(variant, (7, 6, 4), (7, 5, 6))
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = runs.estimate(sites, **METHODS[method])
    assert out.kind == f"attribution ({method})"
    assert out.magnitude == (method != "QK fix")
    effects = check(out, runs, sites, EXPECTED[method])
    assert (effects.abs() > 1e-4).double().mean() > 0.3
    assert effects.abs().max() > 0.3


@st.composite
def single_sites(draw: st.DrawFn, pairs: Pairs) -> Any:
    """Queries and keys above all, a head or all of them, at one or several positions."""
    cells = []
    for _ in range(draw(st.integers(1, 6))):
        component = draw(st.sampled_from(["q", "k", "q", "k", *COMPONENTS]))
        head = draw(st.none() | st.sampled_from(pairs.oracle.heads(component)))
        numbers = st.integers(-pairs.width, -1)
        positions = draw(st.none() | st.lists(numbers, min_size=1, max_size=3, unique=True))
        layer = draw(st.integers(0, LAYERS - 1))
        cells.append(Site.get_site(pairs.api, component, layer, head, positions))
    return Sites.from_sites(cells)


# Sites are drawn, of values alone too.
@pytest.mark.filterwarnings("ignore:qk_fix=True changes nothing")
@given(st.data(), pairs_of(), st.sampled_from(METRICS), st.sampled_from(REPAIRS))
@settings(max_examples=50)
def test_any_estimate_is_that_of_the_oracle(
    data: st.DataObject, pairs: Pairs, metric: str, method: str
) -> None:
    sites = data.draw(grids(pairs) | single_sites(pairs))
    runs = Runs(pairs)
    try:
        out = runs.estimate(sites, metric, **METHODS[method])
    except (MetricError, PositionError):
        # Runs that do not differ, or positions that are padding in every prompt.
        reject()
    check(out, runs, sites, EXPECTED[method], metric)


@pytest.mark.filterwarnings("ignore:qk_fix=True changes nothing")
@given(st.data(), ablations(), st.sampled_from(METRICS[:-1]), st.sampled_from(REPAIRS))
@settings(max_examples=35)
def test_any_ablation_is_that_of_the_oracle(
    data: st.DataObject, runs: Runs, metric: str, method: str
) -> None:
    sites = data.draw(grids(runs.pairs) | single_sites(runs.pairs))
    try:
        out = runs.estimate(sites, metric, **METHODS[method])
    except PositionError:
        reject()
    assert out.kind == f"attribution ({runs.ablation}, {method})"
    check(out, runs, sites, EXPECTED[method], metric)


def test_sizes_can_be_laid_on_those_of_the_exact_sweep() -> None:
    runs = runs_of("gemma2", (6, 4), (5, 5))
    sites = Sites(["resid", "k", "mlp"], seq_pos_type="each")
    exact = runs.patch(sites).magnitudes()
    found = runs.estimate(sites, qk_fix=True, grad_drop=True)
    check_laid(found, exact)
    assert min(found[name].min() for name in found) >= 0
    assert found.agreement(exact).magnitude


def test_a_key_group_is_fixed_as_one() -> None:
    """Two keys move one softmax: their effect together is not that of each, added up."""
    runs = runs_of("llama", (6,), (6,))
    together = Sites("k", None, "custom_constant", [-1, -2])
    each = Sites("k", None, "custom", [-1, -2])
    gaps = {}
    for method in ("plain", "QK fix"):
        whole = runs.estimate(together, **METHODS[method])["k"]
        parts = runs.estimate(each, **METHODS[method])["k"].sum(1)
        gaps[method] = float((whole - parts).abs().max())
    assert gaps["plain"] < 1e-6
    assert gaps["QK fix"] > 1e-4


# One projection for all three.

_FUSED = {
    name: fused_projections("self_attn.qkv_proj", "self_attn.o_proj", Fused)[name]
    for name in ("q", "k", "v", "o")
}
FUSED = DecoderAPI("Fused", ("phi3",), decoder_components(heads=_FUSED))


@functools.cache
def fused() -> Any:
    """The llama of `runs_of`, with one module for queries, keys and values."""
    plain = tiny_model("llama").double()
    model = tiny_model("phi3", sliding_window=None).double()
    model.set_attn_implementation("eager")
    model.model.embed_tokens, model.lm_head = plain.model.embed_tokens, plain.lm_head
    model.model.norm = plain.model.norm
    for mine, other in zip(model.model.layers, plain.model.layers, strict=True):
        mine.input_layernorm = other.input_layernorm
        mine.post_attention_layernorm = other.post_attention_layernorm
        mine.mlp = other.mlp
        attention = other.self_attn
        weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        mine.self_attn.qkv_proj.weight = nn.Parameter(torch.cat(weights))
        mine.self_attn.o_proj = attention.o_proj
    return model


@pytest.mark.parametrize("ablation", [None, "zero"])
@pytest.mark.parametrize("method", METHODS)
def test_columns_of_one_projection_are_as_projections_of_their_own(
    method: str, ablation: str | None
) -> None:
    runs = runs_of("llama", (6, 4), (5, 5), ablation=ablation)
    for sites in (
        Sites(COMPONENTS, seq_pos_type="each"),
        Sites(["k", "v"], [0, 1], "custom_constant", [-1, -3]),
    ):
        found = runs.estimate(sites, model=fused(), api=FUSED, **METHODS[method])
        expected = runs.estimate(sites, **METHODS[method])
        for name in expected:
            torch.testing.assert_close(
                found.patched(name), expected.patched(name), rtol=1e-9, atol=1e-11, equal_nan=True
            )
            assert torch.equal(found.exact(name), expected.exact(name))


# Where a tangent says nothing: softmax is flat.


@functools.cache
def saturated(tail: float | None) -> Any:
    """Each head of the last layer looks at one token.

    What follows is linear, or, given `tail`, nearly so, as heads move little by that.
    """
    model = tiny_model("llama").double()
    model.set_attn_implementation("eager")
    last = model.model.layers[LAYERS - 1]
    with torch.no_grad():
        last.self_attn.q_proj.weight.mul_(1e5)
        if tail is None:
            last.mlp.down_proj.weight.zero_()
            model.model.norm = nn.Identity()
        else:
            last.self_attn.o_proj.weight.mul_(tail)
    return model


def effects(out: Outcome) -> torch.Tensor:
    """Of every cell, in the metric's unit."""
    moved = [(out.patched(name) - out.baseline.target).flatten() for name in out]
    return torch.cat(moved).nan_to_num()


@pytest.mark.parametrize("component", ["q", "k"])
@pytest.mark.parametrize(("tail", "share"), [(None, 1e-9), (1e-2, 0.05)])
def test_in_a_saturated_softmax_the_fix_sees_what_a_tangent_does_not(
    tail: float | None, share: float, component: str
) -> None:
    runs = runs_of("llama", (7, 7, 7), (7, 7, 7), layout="unpadded")
    model = saturated(tail)
    groups = ("each", None), ("custom_constant", [-1, -2, -4])
    for kind, positions in groups:
        sites = Sites(component, [LAYERS - 1], kind, positions)
        exact, plain, repaired = (
            effects(each)
            for each in (
                runs.patch(sites, "logit_difference", model=model),
                runs.estimate(sites, "logit_difference", model=model),
                runs.estimate(sites, "logit_difference", model=model, qk_fix=True),
            )
        )
        large = exact.abs() > exact.abs().max() / 10
        assert large.sum() >= 3
        assert exact.abs().max() > (0.5 if tail is None else 1e-3)
        assert (plain[large].abs() < 0.01 * exact[large].abs()).all()
        # Where a key was and is not looked at, neither moves anything.
        torch.testing.assert_close(
            repaired, exact, rtol=share, atol=share * float(exact.abs().max())
        )


# Where two paths cancel.


@functools.cache
def cancelling(by: str, component: str) -> tuple[Any, AttributionOracle, float]:
    """What a component of layer 0 adds goes straight on, and against that through layer 1.

    Its weights are such that at the target the two are of one size. Layer 2 adds nothing, and no
    norm follows. Given with it is the size.
    """
    model = tiny_model("llama").double()
    model.set_attn_implementation("eager")
    model.model.norm = nn.Identity()
    _, second, third = model.model.layers
    ends = {"mlp": second.mlp.down_proj.weight, "attn": second.self_attn.o_proj.weight}
    with torch.no_grad():
        for weight in (third.mlp.down_proj.weight, third.self_attn.o_proj.weight):
            weight.zero_()
        ends["attn" if by == "mlp" else "mlp"].zero_()
    runs = runs_of("llama", (6,), (6,))
    (target,), (source,), (metric,) = (
        runs.pairs.target,
        runs.pairs.source,
        runs.metrics("logit_difference"),
    )
    oracle, place = AttributionOracle(model, "llama"), Place(component, 0, None, (1,))
    direct = oracle.first_order(target, source, place, metric, held=1)
    both = oracle.first_order(target, source, place, metric)
    with torch.no_grad():
        ends[by].mul_(-direct / (both - direct))
    return model, AttributionOracle(model, "llama"), abs(direct)


@pytest.mark.parametrize("component", ["mlp", "resid", "attn"])
@pytest.mark.parametrize("by", ["mlp", "attn"])
def test_paths_that_cancel_are_seen_where_one_is_held(by: str, component: str) -> None:
    model, _, direct = cancelling(by, component)
    runs = runs_of("llama", (6,), (6,))
    sites = Sites(component, [0], "last")
    exact = effects(runs.patch(sites, "logit_difference", model=model)).abs().max()
    found = {
        method: effects(runs.estimate(sites, "logit_difference", model=model, **options))
        .abs()
        .max()
        for method, options in METHODS.items()
        if method != "steps"
    }
    assert direct > 0.05
    assert exact > direct / 20
    assert found["plain"] < 1e-9 * direct
    # Holding layer 2 changes nothing; a cell inside of layer 0 does not count that one.
    layers = 3 if component == "resid" else 2
    for method in ("GradDrop", "AtP*"):
        assert float(found[method]) == pytest.approx(direct / layers, rel=1e-9)


def test_of_several_metrics_each_is_repaired() -> None:
    """What is held for one backward is let go before the next."""
    runs = runs_of("mistral", (6, 4), (5, 5))
    sites = Sites(COMPONENTS, seq_pos_type="each")
    several = {name: metric_of(name) for name in METRICS}
    for method in REPAIRS:
        out = runs.estimate(sites, several, **METHODS[method])
        assert out.metrics == METRICS
        for name in METRICS:
            check(out.for_metric(name), runs, sites, EXPECTED[method], name)


def test_repairs_leave_other_components_alone() -> None:
    runs = runs_of("gemma3", (6, 4), (5, 5))
    sites = Sites(COMPONENTS, seq_pos_type="each")
    plain, repaired = runs.estimate(sites), runs.estimate(sites, qk_fix=True)
    for name in COMPONENTS:
        same = torch.allclose(plain[name], repaired[name], rtol=1e-6, atol=1e-7)
        assert same == (name not in ("q", "k"))
    model = copy.deepcopy(runs.model)
    again = runs.estimate(sites, model=model, qk_fix=True)
    assert all(torch.equal(again[name], repaired[name]) for name in COMPONENTS)


def flat_positions() -> Any:
    """A model whose layers hand their attention one row of cosines a token, for all prompts."""
    model = tiny_model()

    class Rotary(type(model.model.rotary_emb)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return tuple(table[0] for table in super().forward(*args, **kwargs))

    class Attention(type(model.model.layers[0].self_attn)):
        def forward(self, *args: Any, position_embeddings: Any, **kwargs: Any) -> Any:
            tables = tuple(table[None] for table in position_embeddings)
            return super().forward(*args, position_embeddings=tables, **kwargs)

    model.model.rotary_emb.__class__ = Rotary
    for layer in model.model.layers:
        layer.self_attn.__class__ = Attention
    return model


def test_a_row_for_each_token_is_not_taken_for_one_for_each_prompt() -> None:
    """As many prompts as tokens cannot be told apart, and are refused instead of mixed up."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(5, 50, (4, 4), generator=generator) for _ in range(2))
    answers = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])

    def fixed(model: Any, count: int) -> Any:
        runs = (source[:count], target[:count], *(index[:count] for index in answers))
        sites = Sites(["q", "k"], seq_pos_type="each")
        return attribution_patching(model, None, sites, *runs, qk_fix=True, progress=False)

    expected, out = fixed(tiny_model(), 3), fixed(flat_positions(), 3)
    for name in expected:
        torch.testing.assert_close(out[name], expected[name])
        assert expected[name].abs().max() > 1e-3
    with pytest.raises(GradientError, match="other values than in the model"):
        fixed(flat_positions(), 4)
