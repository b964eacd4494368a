"""What attribution must be of itself: exact in linear models, complete, the same by any cut."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nnpatch_core import MultiSite, Outcome, Site, Sites
from nnpatch_core.errors import MemoryBudgetError, MetricError, PositionError
from nnpatch_core.gradients import attention
from nnpatch_core.testing import tiny_model, traces
from tests.helpers.attribution import (
    EXPECTED,
    LAYERS,
    METHODS,
    METRICS,
    Runs,
    check,
    model_and_oracle,
    runs_of,
)
from tests.helpers.oracle import COMPONENTS
from tests.helpers.pairs import Pairs
from tests.helpers.strategies import lists_of_sites, pairs_of

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

# Linear models, where the first order is all there is.


class LinearAttention(nn.Module):
    """Fixed shares of what queries, keys and values add up to; padding is left out."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        projections = self.q_proj, self.k_proj, self.v_proj
        query, *others = (
            each(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2) for each in projections
        )
        key, value = (each.repeat_interleave(2, 1) for each in others)
        numbers = torch.arange(hidden_states.shape[1])
        back = numbers[:, None] - numbers
        shares = torch.where(back >= 0, 0.6**back, 0.0).to(hidden_states.dtype)
        if attention_mask is not None:
            shares = torch.where(attention_mask > -1, shares, 0.0)
        heads = query / 2 + shares @ (key - value)
        return self.o_proj(heads.transpose(1, 2).flatten(2)), None


class LinearMLP(nn.Module):
    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(hidden_states))


@functools.cache
def linear() -> Any:
    """A llama by its shape, in float64, that is linear from end to end."""
    model = tiny_model("llama").double()
    model.set_attn_implementation("eager")
    model.model.norm = nn.Identity()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.self_attn, layer.mlp = LinearAttention(layer.self_attn), LinearMLP(layer.mlp)
    # So that no run grows from layer to layer.
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.2)
            layer.mlp.down_proj.weight.mul_(0.2)
    return model


def check_equal(found: Outcome, exact: Outcome) -> None:
    """The estimate is the sweep itself, prompt by prompt."""
    for name in exact:
        torch.testing.assert_close(
            found.patched(name), exact.patched(name), rtol=1e-9, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize("options", [{}, {"steps": 1}, {"qk_fix": True}], ids=str)
def test_in_a_linear_model_every_estimate_is_exact(options: dict[str, Any]) -> None:
    runs = runs_of("llama", (7, 6, 4), (7, 5, 6))
    for sites in (
        Sites(COMPONENTS, seq_pos_type="each"),
        Sites(COMPONENTS),
        Sites(COMPONENTS, seq_pos_type="custom_constant", seq_pos=[-1, 2, 4]),
    ):
        found = runs.estimate(sites, "logit_difference", model=linear(), **options)
        exact = runs.patch(sites, "logit_difference", model=linear())
        check_equal(found, exact)
        assert min(exact[name].abs().max() for name in exact) > 0.02


@given(st.data(), pairs_of())
@settings(max_examples=40)
def test_in_a_linear_model_sites_patched_together_are_exact(
    data: st.DataObject, pairs: Pairs
) -> None:
    """Whether they are parts of one activation, or one of them is reached by another."""
    runs = Runs(attrs.evolve(pairs, variant="llama"))
    sites = data.draw(lists_of_sites(runs.pairs))
    try:
        found = runs.estimate(sites, "logit_difference", model=linear())
    except (MetricError, PositionError):
        reject()
    check_equal(found, runs.patch(sites, "logit_difference", model=linear()))


def test_what_only_linear_pieces_follow_is_exact() -> None:
    """In a model that is not linear: the last layer's sums, where no norm comes after them."""
    model = copy.deepcopy(model_and_oracle("llama")[0])
    model.model.norm = nn.Identity()
    runs = runs_of("llama", (7, 6, 4), (7, 5, 6))
    ends = Sites(["mlp", "resid"], layers=[LAYERS - 1], seq_pos_type="each")
    found = runs.estimate(ends, "logit_difference", model=model)
    exact = runs.patch(ends, "logit_difference", model=model)
    check_equal(found, exact)
    before = Sites("attn", layers=[LAYERS - 1], seq_pos_type="last")
    estimate = runs.estimate(before, "logit_difference", model=model)["attn"]
    measured = runs.patch(before, "logit_difference", model=model)["attn"]
    assert (estimate - measured).abs().max() > 1e-3


# Integrated gradients are complete.


@pytest.mark.parametrize("metric", ["bent", "kl_divergence"])
@pytest.mark.parametrize(
    ("variant", "layers"), [("llama", [0, 1, 2]), ("mistral", [0, 2]), ("gemma3", [2])]
)
def test_the_parts_of_a_component_add_up_to_patching_all_of_it(
    variant: str, layers: list[int], metric: str
) -> None:
    runs = runs_of(variant, (5, 4), (4, 5))
    whole = Sites.from_sites(
        Site.get_site(runs.pairs.api, name, layer) for name in COMPONENTS for layer in layers
    )
    exact = runs.patch(whole, metric)
    effects = {name: exact.patched(name) - exact.baseline.target for name in exact}
    largest = max(effect.abs().max() for effect in effects.values())
    assert all(effect.abs().max() > largest / 100 for effect in effects.values())
    errors = []
    for steps in (2, 8, 32):
        sites = Sites(COMPONENTS, layers, seq_pos_type="each")
        out = runs.estimate(sites, metric, steps=steps)
        gaps = []
        for name in out:
            moved = (out.patched(name) - out.baseline.target)[layers].nan_to_num()
            gaps.append((moved.flatten(1, -2).sum(1) - effects[name]).abs().max() / largest)
        errors.append(float(max(gaps)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 3e-3
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("metric", METRICS)
def test_the_residual_stream_of_a_layer_adds_up_to_one(metric: str) -> None:
    """Prompts of one length: what is patched is all there is."""
    runs = runs_of("llama", (6, 6), (6, 6), layout="unpadded")
    errors = []
    for steps in (1, 4, 16, 64):
        out = runs.estimate(Sites(["resid_pre", "resid"], seq_pos_type="each"), metric, steps=steps)
        sums = torch.cat([out[name].double().sum(1) for name in out])
        errors.append(float((sums - 1).abs().max()))
    assert errors[0] > 1e-2
    assert all(after <= before for before, after in pairwise(errors[:-1]))
    # The values are in float32.
    assert errors[-1] < 1e-5


# The same by any cut.


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """The rows of each forward, and of each call of an attention by itself."""
    found: list[int] = []
    real = attention.call

    def seen(nnmodel: Any, path: str, args: Any, kwargs: Any, visit: Any) -> None:
        found.append(len(kwargs["hidden_states"]))
        real(nnmodel, path, args, kwargs, visit)

    with traces(model) as forwards, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "call", seen)
        yield found
        found += [trace.rows for trace in forwards]


def least_memory(runs: Runs, sites: Any, **options: Any) -> int:
    """The bytes that a refusal names, which it rounds to a tenth."""
    with pytest.raises(MemoryBudgetError) as caught:
        runs.estimate(sites, memory_budget=1, **options)
    found = re.search(r"needs ([\d.]+) (KiB|MiB),", str(caught.value))
    assert found, str(caught.value)
    return int((float(found[1]) + 0.06) * {"KiB": 2**10, "MiB": 2**20}[found[2]])


def smallest(runs: Runs, sites: Any, **options: Any) -> int:
    """About the least budget that one prompt is attributed in."""
    budget = least_memory(runs, sites, **options)
    for _ in range(60):
        try:
            runs.estimate(sites, memory_budget=budget, **options)
        except MemoryBudgetError:
            budget = int(budget * 1.1)
        else:
            return budget
    raise AssertionError(budget)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_prompts_and_steps_can_be_cut(variant: str, method: str) -> None:
    runs = runs_of(variant, (6, 4, 5), (5, 5, 6))
    sites = Sites(COMPONENTS, layers=[0, 2], seq_pos_type="each")
    options = METHODS[method]
    budget = smallest(runs, sites, **options)
    with passes(runs.model) as rows:
        whole = runs.estimate(sites, **options)
    largest = max(rows)
    for cut in ({"batch_size": 1}, {"batch_size": 2}, {"memory_budget": budget}):
        with passes(runs.model) as rows:
            found = runs.estimate(sites, **options, **cut)
        # As one prompt after the other, or by two; and a small budget cuts more than prompts.
        assert 0 < max(rows) < largest
        for name in COMPONENTS:
            torch.testing.assert_close(
                found.patched(name), whole.patched(name), rtol=1e-10, atol=1e-12, equal_nan=True
            )
            for other, mine in ((whole.exact(name), found.exact(name)),):
                assert torch.equal(mine, other)


@pytest.mark.parametrize("metric", ["bent", "kl_divergence"])
def test_the_points_of_a_path_can_be_cut(metric: str) -> None:
    """Each has a weight of its own, wherever its turn comes."""
    runs = runs_of("llama", (6,), (6,))
    sites = Sites("mlp", layers=[0], seq_pos_type="each")
    whole = runs.estimate(sites, metric, steps=7)
    budget = smallest(runs, sites, steps=7)
    with passes(runs.model) as rows:
        found = runs.estimate(sites, metric, steps=7, memory_budget=budget)
    assert max(rows) < 7
    assert sum(rows) >= 7
    torch.testing.assert_close(found["mlp"], whole["mlp"], rtol=1e-6, atol=1e-8)
    assert whole["mlp"].abs().max() > 0.02


@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_ablations_and_joint_sites_can_be_cut(ablation: str) -> None:
    runs = runs_of("llama", (6, 4, 5), (6, 4, 5), ablation=ablation)
    get = functools.partial(Site.get_site, runs.pairs.api)
    both = MultiSite([get("resid", 0), get("mlp", 2, None, [-1])])
    sites = Sites.from_sites([get("k", 1, 1, [-1, -2]), both])
    whole = runs.estimate(sites)
    for size in (1, 2):
        found = runs.estimate(sites, batch_size=size)
        for name in whole:
            torch.testing.assert_close(
                found.patched(name), whole.patched(name), rtol=1e-10, atol=1e-12
            )


def hinge(logits: Tensor, context: Any) -> Tensor:
    """Flat for prompts that are answered well enough."""
    numbers = torch.arange(len(logits))
    first, second = context.source_answer_index, context.target_answer_index
    return (logits[numbers, first] - logits[numbers, second]).clamp(min=1)


@pytest.mark.parametrize("method", METHODS)
def test_prompts_whose_metric_is_flat_can_be_cut_off(method: str) -> None:
    """A metric may have no gradient for some prompts, alone or in company."""
    runs = runs_of("llama", (6, 6, 6, 6, 6), (6, 6, 6, 6, 6))
    sites = Sites(["resid", "q", "k"], seq_pos_type="last")
    whole = runs.estimate(sites, hinge, **METHODS[method])
    still = whole.baseline.target == 1
    assert still.any()
    assert not still.all()
    found = runs.estimate(sites, hinge, batch_size=1, **METHODS[method])
    for name in whole:
        torch.testing.assert_close(found.patched(name), whole.patched(name), rtol=1e-10, atol=1e-12)


# Parts and their sum.


@pytest.mark.parametrize("method", ["plain", "steps"])
def test_cells_add_up_to_those_that_hold_them(method: str) -> None:
    """Of heads, and of positions."""
    runs = runs_of("gemma2", (6, 4), (5, 5))
    each = runs.estimate(Sites(COMPONENTS, seq_pos_type="each"), **METHODS[method])
    at_once = runs.estimate(Sites(COMPONENTS), **METHODS[method])
    get = functools.partial(Site.get_site, runs.pairs.api)
    whole = runs.estimate(
        Sites.from_sites(get(name, layer) for name in COMPONENTS for layer in range(LAYERS)),
        **METHODS[method],
    )
    for name in COMPONENTS:
        parts, groups, all_of_it = (
            (out.patched(name) - out.baseline.target).nan_to_num() for out in (each, at_once, whole)
        )
        torch.testing.assert_close(parts.sum(1), groups, rtol=1e-9, atol=1e-12)
        heads = groups.sum(1) if groups.ndim == 3 else groups
        torch.testing.assert_close(heads, all_of_it, rtol=1e-9, atol=1e-12)


def test_parts_of_one_activation_patched_together_add_up() -> None:
    """No forward of their own is needed for them; parts that overlap count once."""
    runs = runs_of("llama", (6, 4), (5, 5))
    get = functools.partial(Site.get_site, runs.pairs.api, "v", 1)
    first, second, both = get(0, [-1, -2]), get(1, [-3]), get(0, [-2, -3])
    cells = [first, second, both, get(0, [-1]), MultiSite([first, second], name="apart")]
    out = runs.estimate(Sites.from_sites([*cells, MultiSite([first, both], name="overlap")]))
    single = out.patched("v") - out.baseline.target
    apart, overlap = (out.patched(each)[0] - out.baseline.target for each in ("apart", "overlap"))
    torch.testing.assert_close(apart, single[0] + single[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(overlap, single[2] + single[3], rtol=1e-9, atol=1e-12)
    assert (overlap - single[0] - single[2]).abs().max() > 1e-3


# Corners.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers(layers: int, method: str) -> None:
    """Down to one, where GradDrop has nothing to hold for what is inside of it."""
    runs = runs_of("llama", (5, 3), (5, 4), layers=layers)
    sites = Sites(COMPONENTS, seq_pos_type="each")
    out = runs.estimate(sites, **METHODS[method])
    assert check(out, runs, sites, EXPECTED[method]).abs().max() > 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_prompts_of_one_token(variant: str, method: str) -> None:
    """Alone in their batch, and beside a longer one. Nothing depends on queries and keys."""
    sites = Sites(COMPONENTS, seq_pos_type="each")
    for target, source in (((1,), (1,)), ((1, 3), (2, 1))):
        runs = runs_of(variant, target, source)
        out = runs.estimate(sites, **METHODS[method])
        check(out, runs, sites, EXPECTED[method])
    one = runs_of(variant, (1,), (1,)).estimate(sites, **METHODS[method])
    for name in ("q", "k"):
        assert one[name].abs().max() < 1e-9
    assert one["v"].abs().min() > 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sites",
    [
        Sites(["q", "o", "resid"], [LAYERS - 1], "each"),
        Sites(["resid_pre", "k"], [0], "last"),
        Sites(["k", "v"], [1], "custom_constant", [-1, -3], [1]),
        Sites("mlp", [0, 2], "lastk", 2),
        Sites("q", None, "custom", [-2, 3], [0, 3]),
        Sites("k", None, "custom", [-2, 3]),
        Sites("resid_pre", [2], "last"),
        Sites("attn", [0]),
    ],
    ids=str,
)
def test_narrow_sweeps(sites: Any, method: str) -> None:
    runs = runs_of("gemma2", (6, 4), (5, 5))
    out = runs.estimate(sites, **METHODS[method])
    assert check(out, runs, sites, EXPECTED[method]).abs().max() > 1e-4
    for name in out:
        swept = out.swept(name)
        assert not out[name][~swept].any()
        assert out.patched(name)[~swept].isnan().all()
        # Only what was swept is marked.
        for mark in (out.exact(name), out.elided(name), out.flat(name)):
            assert not mark[~swept].any()
