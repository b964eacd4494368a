"""What attribution does to a model; its numbers' types; metrics; cells that cannot matter."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nnpatch_core import MultiSite, Outcome, Site, Sites, attribution_patching, reads_tokens
from nnpatch_core.errors import MetricError
from nnpatch_core.testing import tiny_api, tiny_model
from tests.helpers.attribution import METHODS, bent
from tests.helpers.oracle import COMPONENTS, Prompt, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

ANSWERS = torch.tensor([7, 8, 9]), torch.tensor([50, 49, 48])
LAST = 2
SITES = Sites(COMPONENTS, seq_pos_type="each")


def prompts(lengths: tuple[int, ...] = (7, 6, 4), same: int = 0) -> tuple[list[Prompt], list[Any]]:
    """Source and target prompts; they begin alike with some tokens."""
    source, target = random_prompts(lengths, seed=1), random_prompts(lengths, seed=2)
    return source, [one[:same] + other[same:] for one, other in zip(source, target, strict=True)]


def estimate(model: Any, sites: Any = SITES, same: int = 0, **options: Any) -> Outcome:
    source, target = prompts(same=same)
    tokens, mask = lay_out(source, "left", seed=3)
    return attribution_patching(
        model,
        options.pop("api", None),
        sites,
        tokens,
        lay_out(target, "left", seed=3)[0],
        *ANSWERS,
        attention_mask=mask,
        progress=False,
        **{"metric": bent, **options},
    )


def effects(out: Outcome) -> Tensor:
    """Of every cell and prompt, in the metric's unit."""
    found = [(out.patched(name) - out.baseline.target).flatten() for name in out]
    return torch.cat(found).nan_to_num()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def expected(model: Any) -> Any:
    """By each method."""
    return {method: estimate(model, **options) for method, options in METHODS.items()}


# Types of numbers.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_narrow_model_is_estimated_as_its_wide_copy(kind: torch.dtype, method: str) -> None:
    narrow = tiny_model().to(kind)
    found = estimate(narrow, **METHODS[method])
    wide = estimate(copy.deepcopy(narrow).float(), **METHODS[method])
    # Each is off by what a forward and a backward in few digits are.
    share = {torch.bfloat16: 0.06, torch.float16: 0.01}[kind]
    gap = (effects(found) - effects(wide)).abs().max()
    assert gap < share * effects(wide).abs().max()
    assert gap > 0
    assert {each.dtype for names in found.raw.values() for each in names.values()} == {
        torch.float64
    }
    assert found["q"].dtype == torch.float32
    assert {weight.dtype for weight in narrow.parameters()} == {kind}


@pytest.mark.parametrize("method", ["plain", "steps"])
def test_parts_of_a_narrow_model_add_up_in_wide_numbers(method: str) -> None:
    """In bfloat16 a sum of products has three digits; here it has those of float32."""
    narrow = tiny_model().to(torch.bfloat16)
    each = estimate(narrow, **METHODS[method])
    get = functools.partial(Site.get_site, tiny_api())
    whole = estimate(
        narrow,
        Sites.from_sites(get(name, layer) for name in COMPONENTS for layer in range(LAST + 1)),
        api=tiny_api(),
        **METHODS[method],
    )
    for name in COMPONENTS:
        parts = (each.patched(name) - each.baseline.target).nan_to_num().flatten(1, -2).sum(1)
        moved = whole.patched(name) - whole.baseline.target
        torch.testing.assert_close(parts, moved, rtol=1e-5, atol=1e-5)


# What is left of it.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("asking", ["none", "all", "some"])
def test_weights_need_not_ask_for_gradients(expected: Any, asking: str, method: str) -> None:
    model = tiny_model()
    for number, weight in enumerate(model.parameters()):
        weight.requires_grad_(asking == "all" or (asking == "some" and number % 3 == 0))
    flags = [weight.requires_grad for weight in model.parameters()]
    found = estimate(model, **METHODS[method])
    for name in COMPONENTS:
        assert torch.equal(found[name], expected[method][name])
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_no_grad_around_it_changes_nothing(model: Any, expected: Any, method: str) -> None:
    with torch.no_grad():
        found = estimate(model, **METHODS[method])
        assert not torch.is_grad_enabled()
    for name in COMPONENTS:
        assert torch.equal(found[name], expected[method][name])
        assert not found.patched(name).requires_grad
    assert torch.is_grad_enabled()


def breaks(logits: Tensor) -> Tensor:
    """Not before it is differentiated."""
    return logits.argmax(-1).float() if logits.requires_grad else logits[:, 3]


def raises(logits: Tensor) -> Tensor:
    if logits.requires_grad:
        raise ZeroDivisionError
    return logits[:, 3]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("metric", [bent, breaks, raises])
def test_a_model_is_left_as_it_was(metric: Any, method: str) -> None:
    """After an error too: flags of weights and modules, gradients, hooks, and no graph."""
    model = tiny_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].train(False)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    kept = model.lm_head.weight
    kept.grad = torch.ones_like(kept)
    flags = [module.training for module in model.modules()]
    seen: list[weakref.ref] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(weakref.ref(output))

    hooks = [layer.mlp.register_forward_hook(watch) for layer in model.model.layers]
    if metric is bent:
        out = estimate(model, metric=metric, **METHODS[method])
        assert out.prompts
    else:
        with pytest.raises((MetricError, ZeroDivisionError)):
            estimate(model, metric=metric, **METHODS[method])
    gc.collect()
    assert seen
    assert not any(each() is not None for each in seen)
    for hook in hooks:
        hook.remove()
    assert [module.training for module in model.modules()] == flags
    assert not frozen.requires_grad
    asking = [weight for weight in model.parameters() if weight is not frozen]
    assert all(weight.requires_grad for weight in asking)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(weight.grad is None for weight in asking if weight is not kept)
    assert torch.is_grad_enabled()


def test_a_model_still_trains() -> None:
    model, other = tiny_model(), tiny_model()
    estimate(model, qk_fix=True, grad_drop=True)
    tokens = torch.tensor([[5, 6, 7, 8]])
    for each in (model, other):
        each(tokens, labels=tokens).loss.backward()
    for mine, fresh in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, fresh.grad)
    before = estimate(model)
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert (effects(before) - effects(estimate(model))).abs().max() > 1e-3


def test_dropout_is_off(expected: Any) -> None:
    model = tiny_model(attention_dropout=0.5)
    model.train()
    found = estimate(model, qk_fix=True, grad_drop=True)
    assert torch.equal(found["q"], expected["AtP*"]["q"])


class InPlace(nn.Module):
    """A layer that adds to what its parts gave, and to what it was given, in place."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, child in layer.named_children():
            setattr(self, name, child)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        added = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        added += hidden_states
        hidden_states = self.mlp(self.post_attention_layernorm(added))
        hidden_states += added
        return hidden_states


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_work_in_place(expected: Any, method: str) -> None:
    """What was at a site is read before something is added to it."""
    model = tiny_model()
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = InPlace(layer)
    found = estimate(model, **METHODS[method])
    for name in COMPONENTS:
        torch.testing.assert_close(found[name], expected[method][name], rtol=1e-4, atol=1e-5)


# Metrics.


def centred_in_place(logits: Tensor, context: Any) -> Tensor:
    logits.sub_(logits.mean(-1, keepdim=True)).mul_(2)
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


def centred(logits: Tensor, context: Any) -> Tensor:
    moved = 2 * (logits - logits.mean(-1, keepdim=True))
    return moved.gather(1, context.source_answer_index[:, None])[:, 0]


def towards_the_source(logits: Tensor, context: Any) -> Tensor:
    """Of everything that a metric may look at."""
    far = (logits - context.source_logits).square().mean(-1)
    near = (logits * context.target_logits).mean(-1)
    answers = context.source_answer_index + context.target_answer_index
    return near - far + logits.gather(1, answers[:, None] % 64)[:, 0]


@reads_tokens(lambda context: context.source_answer_index[:, None])
def declared(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0] ** 2


class Weighted:
    """A callable that is no function, with a weight that asks for a gradient."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64))

    def __call__(self, logits: Tensor) -> Tensor:
        return logits @ self.weight


@pytest.mark.parametrize("method", METHODS)
def test_several_metrics_are_each_as_it_is_alone(model: Any, method: str) -> None:
    weighted = Weighted()
    several = {
        "bent": bent,
        "in place": centred_in_place,
        "out of place": centred,
        "context": towards_the_source,
        "declared": declared,
        "object": weighted,
        "named": "answer_log_probability",
    }
    out = estimate(model, metric=several, **METHODS[method])
    assert out.metrics == tuple(several)
    for name, metric in several.items():
        alone = estimate(model, metric={name: metric}, **METHODS[method])
        for component in COMPONENTS:
            torch.testing.assert_close(
                out.for_metric(name)[component], alone[component], rtol=1e-5, atol=1e-6
            )
        assert effects(alone).abs().max() > 1e-3
    first, second = (effects(out.for_metric(name)) for name in ("in place", "out of place"))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert weighted.weight.grad is None
    assert weighted.weight.requires_grad


def test_a_metric_of_the_context_is_differentiated_by_logits_alone(model: Any) -> None:
    """What it compares with is given, not computed again."""

    def squared(logits: Tensor, context: Any) -> Tensor:
        assert not context.source_logits.requires_grad
        assert not context.target_logits.requires_grad
        return (logits * context.target_logits).sum(-1)

    def halved(logits: Tensor, context: Any) -> Tensor:
        return logits.square().sum(-1) / 2

    # At the target the two have one gradient, and twice the one the values of the other.
    found, other = (effects(estimate(model, metric=each)) for each in (squared, halved))
    torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


# Cells that cannot matter.


@pytest.mark.parametrize("method", METHODS)
def test_cells_that_cannot_matter_are_exactly_nothing(expected: Any, method: str) -> None:
    out = expected[method]
    for name in COMPONENTS:
        exact, values = out.exact(name), out[name]
        at_end = torch.zeros_like(exact)
        if name in ("q", "o", "attn", "mlp", "resid"):
            at_end[LAST, :-1] = True
        assert torch.equal(exact, at_end)
        assert not values[exact].any()
        assert torch.equal(out.unread(name), at_end)
        assert not out.elided(name).any()
        unpatched = out.baseline.target.double()
        raw = out.patched(name)[exact]
        assert torch.equal(raw, unpatched.expand_as(raw))
        # The first query of a prompt sees one key, and says nothing.
        assert not out.flat(name)[:, 1 if name == "q" else 0 :].any()


@pytest.mark.parametrize("method", METHODS)
def test_what_is_there_already_is_exactly_nothing(model: Any, method: str) -> None:
    """Prompts begin alike: nothing left of the first token that differs does."""
    out = estimate(model, same=2, **METHODS[method])
    source, target = prompts(same=2)
    alike = torch.ones(7, len(source), dtype=torch.bool)
    for row, (one, other) in enumerate(zip(source, target, strict=True)):
        first = next(at for at in range(len(one)) if one[at] != other[at])
        alike[7 - len(one) + first :, row] = False
    assert not alike[-1].any()
    for name in COMPONENTS:
        cells, exact = out.cells[name], out.exact(name)
        elided, unread = cells.place(cells.elided, False), cells.place(cells.unread, False)
        if elided.ndim == 4:
            for mask in (elided, unread):
                assert torch.equal(mask.all(2), mask.any(2))
            elided, unread, exact = elided[:, :, 0], unread[:, :, 0], exact[:, :, 0]
        for layer in range(LAST + 1):
            away = torch.zeros_like(alike)
            if layer == LAST and name in ("q", "o", "attn", "mlp", "resid"):
                away[:-1] = out.prompts.target_mask[:, :-1].bool().T
            assert torch.equal(elided[layer], alike)
            assert torch.equal(unread[layer], away)
            assert torch.equal(exact[layer], (alike | away).all(1))
        assert not out[name][out.exact(name)].any()


def test_a_site_list_marks_what_it_knows(model: Any) -> None:
    get = functools.partial(Site.get_site, tiny_api())
    late, early, key = (get(*at, None, [-2]) for at in (("resid", LAST), ("mlp", 0), ("k", LAST)))
    both = MultiSite([late, early], name="both")
    ends = MultiSite([late, get("q", LAST, 1, [-3])], name="ends")
    cells = [late, early, key, get("resid", LAST), get("resid", LAST, None, [-1]), both, ends]
    out = estimate(model, Sites.from_sites(cells), api=tiny_api())
    assert out.exact("resid").tolist() == [True, False, False]
    assert not any(bool(out.exact(name)) for name in ("mlp", "k", "both"))
    assert bool(out.exact("ends"))
    assert out["ends"].tolist() == [0]
    # What is known to be nothing adds nothing.
    torch.testing.assert_close(out["both"], out["mlp"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out["resid"][1], out["resid"][2], rtol=1e-5, atol=1e-6)
    assert out["both"].abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_beyond_a_window_cells_are_flat_and_no_others(method: str) -> None:
    """The last token of the last layer sees three keys: those of others are estimates of 0."""
    model = tiny_model("mistral", sliding_window=3)
    out = estimate(model, **METHODS[method])
    for name in COMPONENTS:
        flat = out.flat(name)
        unseen = torch.zeros_like(flat)
        # What leaves a token is read by the keys and values of the layers above.
        if name in ("resid_pre", "k", "v"):
            unseen[LAST, :-3] = unseen[LAST - 1, :-5] = True
        else:
            unseen[LAST - 1, :-3] = unseen[0, :-5] = True
        if "grad_drop" in METHODS[method]:
            # One layer more is held, of all but what is inside of layer 0 already.
            if name in ("q", "o", "attn", "mlp"):
                unseen[0, :-3] = True
            elif name != "resid":
                unseen[0, :-5] = True
        if name == "q":
            flat, unseen = flat[:, 1:], unseen[:, 1:]
        assert torch.equal(flat, unseen & ~out.exact(name)[:, -flat.shape[1] :]), name
        assert not out[name][out.flat(name)].any()


def test_flat_is_of_the_metric_that_is_shown(model: Any) -> None:
    """A saturated metric is not a saturated model."""

    def of_the_first(logits: Tensor, context: Any) -> Tensor:
        kept = torch.zeros(len(logits), 1)
        kept[0] = 1
        return (logits * kept)[:, 5] + logits[:, 6] * 0

    sites = Sites("resid", seq_pos_type="each")
    out = estimate(model, sites, metric=[of_the_first, bent])
    # The first prompt is the longest, so that each cell is one of its own.
    assert not any(out.flat(name).any() for name in out)
    only = {"first": of_the_first, "none": lambda logits: logits[:, 5] * 0 + logits[:, 6].detach()}
    with pytest.raises(MetricError, match="'none' has the gradient 0"):
        estimate(model, metric=only)
    out = estimate(model, metric=only, steps=1).for_metric("none")
    assert all(torch.equal(out.flat(name), ~out.exact(name)) for name in out)
