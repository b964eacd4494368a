"""The oracle of attribution patching, against differences of forwards and formulas by hand."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from nnpatch_core.testing import tiny_model
from tests.helpers.attribution_oracle import ADDED, BETWEEN, AttributionOracle, Wide
from tests.helpers.oracle import COMPONENTS, Donor, Oracle, Place, Prompt, random_prompts

FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text")
LAYERS = 3
EVERYWHERE = tuple(range(1, 8))
#: Lengths of a target and its source.
PAIRS = ((7, 7), (7, 5), (5, 7))
RTOL = 1e-6
#: What rounding makes of a difference of two metrics over twice `eps`.
ATOL = 1e-9


def metric(logits: Tensor) -> Tensor:
    """Neither linear nor blind to any logit."""
    return logits.log_softmax(-1)[7] - logits[50] / 2


@functools.cache
def oracle_of(family: str, layers: int = LAYERS) -> AttributionOracle:
    return AttributionOracle(tiny_model(family, num_hidden_layers=layers), family)


def pair(target_length: int = 7, source_length: int = 7) -> tuple[Prompt, Prompt]:
    return random_prompts([target_length], seed=1)[0], random_prompts([source_length], seed=2)[0]


def places(
    oracle: AttributionOracle,
    backs: tuple[int, ...],
    components: tuple[str, ...] = COMPONENTS,
) -> list[Place]:
    """Every layer and head of the components, and all heads at once."""
    return [
        Place(component, layer, head, backs)
        for component, layer in product(components, range(oracle.n_layers))
        for head in dict.fromkeys([*oracle.heads(component), None])
    ]


def check(found: list[float], expected: list[float], some: float = 0.5) -> None:
    """Equal to many digits, and most of it is not 0.

    In the last layer only keys and values of earlier tokens matter.
    """
    first, second = (torch.tensor(each, dtype=torch.float64) for each in (found, expected))
    torch.testing.assert_close(first, second, rtol=RTOL, atol=ATOL)
    assert (second.abs() > 1e3 * ATOL).double().mean() > some


# The model.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_model_in_float64(family: str) -> None:
    model: Any = tiny_model(family)
    # In older releases of transformers the other kernel leaves out the cap on Gemma 2's scores.
    model.set_attn_implementation("eager")
    oracle, plain = AttributionOracle(model, family), Oracle(model, family)
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    assert oracle.model.config._attn_implementation == "eager"
    assert oracle.model.config is not model.config
    target, _ = pair()
    for component, layer in product(COMPONENTS, range(LAYERS)):
        found = oracle.activation(target, component, layer)
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            found.float(), plain.activation(target, component, layer), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(
        oracle.logits(target).float(), plain.logits(target), atol=1e-4, rtol=0
    )


def test_code_that_asks_for_float32_gets_float64() -> None:
    found = torch.rand(4, dtype=torch.float64)
    with Wide():
        several = [
            found.float(),
            found.to(torch.float32),
            found.to(dtype=torch.float),
            torch.nn.functional.softmax(found, dim=-1, dtype=torch.float32),
        ]
    assert all(each.dtype == torch.float64 for each in several)
    assert found.float().dtype == torch.float32


# First order.


@pytest.mark.parametrize(
    ("lengths", "backs"), [*zip(PAIRS, [(1,), (2, 4, 6), (1, 3, 7)], strict=True)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_is_the_slope_of_forwards(
    family: str, lengths: tuple[int, int], backs: tuple[int, ...]
) -> None:
    oracle = oracle_of(family)
    target, source = pair(*lengths)
    every = places(oracle, backs)
    check(
        [oracle.first_order(target, source, place, metric) for place in every],
        [oracle.finite_difference(target, source, [place], metric) for place in every],
    )


def test_what_moves_is_the_donor_less_the_target() -> None:
    """By rows that are counted here; all else takes it for given."""
    oracle = oracle_of("llama")
    target, source = pair(7, 5)
    found = oracle.moves(target, source, Place("v", 1, 1, (4, 2)))
    own, other = (oracle.activation(prompt, "v", 1)[:, 8:] for prompt in (target, source))
    assert sorted(found) == [3, 5]
    assert torch.equal(found[3], other[1] - own[3])
    assert torch.equal(found[5], other[3] - own[5])


def test_what_one_prompt_lacks_is_not_patched() -> None:
    oracle = oracle_of("llama")
    for lengths in ((7, 5), (5, 7)):
        target, source = pair(*lengths)
        for back in (6, 7):
            assert oracle.moves(target, source, Place("resid", 1, None, (back,))) == {}
            assert oracle.first_order(target, source, Place("k", 1, 0, (back,)), metric) == 0
        both = oracle.first_order(target, source, Place("resid", 0, None, (2, 7)), metric)
        assert both == oracle.first_order(target, source, Place("resid", 0, None, (2,)), metric)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_donor_need_not_be_a_prompt(family: str) -> None:
    oracle = oracle_of(family)
    target, source = pair(7, 5)
    of_prompts = [oracle.mean([target, source]), oracle.mean_per_position([source])]
    every = places(oracle, (2, 4), ("resid_pre", "k", "o", "mlp"))
    for donor in (oracle.zeros, *of_prompts):
        check(
            [oracle.first_order(target, donor, place, metric) for place in every],
            [oracle.finite_difference(target, donor, [place], metric) for place in every],
            # Past a norm the length of a key is nothing, and so is its slope towards zeros.
            some=0.3,
        )


#: Next to each other, in each other's way, and at the same time in one activation.
JOINT = (
    [Place("resid", 0, None, (1, 3)), Place("resid", 1, None, (1,))],
    [Place("v", 0, 1, (4,)), Place("o", 0, 2, (1, 2)), Place("mlp", 1, None, (3,))],
    [Place("q", 1, 0, (1,)), Place("q", 1, 3, (1, 2)), Place("k", 1, 1, (2, 3))],
    [Place("attn", 0, None, EVERYWHERE), Place("resid_pre", 2, None, (1,))],
)


@pytest.mark.parametrize("several", JOINT)
@pytest.mark.parametrize("family", FAMILIES)
def test_joint_places_are_written_over(family: str, several: list[Place]) -> None:
    oracle = oracle_of(family)
    for lengths in PAIRS:
        target, source = pair(*lengths)
        found = oracle.joint(target, source, several, metric)
        check([found], [oracle.finite_difference(target, source, several, metric)])


def test_joint_places_that_reach_each_other_are_not_the_sum_of_them() -> None:
    oracle = oracle_of("llama")
    target, source = pair()
    for several in (JOINT[0], JOINT[3]):
        alone = [oracle.first_order(target, source, place, metric) for place in several]
        assert abs(oracle.joint(target, source, several, metric) - sum(alone)) > 1e-3
    # The last position of the last layer is all that the metric sees.
    ends = [Place("resid", 0, None, EVERYWHERE), Place("resid", LAYERS - 1, None, (1,))]
    check(
        [oracle.joint(target, source, ends, metric)],
        [oracle.first_order(target, source, ends[1], metric)],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_place_is_the_same_jointly(family: str) -> None:
    """By another way: a leaf that is written there, not the activation itself."""
    oracle = oracle_of(family)
    target, source = pair(5, 7)
    every = places(oracle, (1, 3))
    check(
        [oracle.joint(target, source, [place], metric) for place in every],
        [oracle.first_order(target, source, place, metric) for place in every],
    )
    assert oracle.joint(target, source, [Place("mlp", 0, None, (6,))], metric) == 0


# Attention.


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_the_model(family: str) -> None:
    oracle = oracle_of(family)
    target, source = pair()
    for layer in range(LAYERS):
        found = {
            prompt: oracle.probabilities(
                prompt,
                layer,
                q=oracle.activation(prompt, "q", layer),
                k=oracle.activation(prompt, "k", layer),
            )
            for prompt in (target, source)
        }
        for prompt, probabilities in found.items():
            weights = oracle._attention(prompt)[layer].weights
            torch.testing.assert_close(probabilities, weights, atol=1e-12, rtol=0)
            assert probabilities.shape == (4, 7, 7)
            torch.testing.assert_close(
                probabilities.sum(-1), torch.ones(4, 7).double(), atol=1e-12, rtol=0
            )
            assert not bool(probabilities.triu(1).any())
        assert (found[target] - found[source]).abs().max() > 1e-2


@pytest.mark.parametrize("held", [None, 0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_probabilities_is_values_times_that_of_their_output(
    family: str, held: int | None
) -> None:
    oracle = oracle_of(family)
    target, _ = pair()
    for layer in range(LAYERS):
        if layer == held:
            continue
        found = oracle.probability_gradient(target, metric, layer, held)
        values = oracle.activation(target, "v", layer).view(7, 2, 8).repeat_interleave(2, 1)
        output = oracle.gradient(target, metric, "o", layer, held).view(7, 4, 8)
        expected = torch.einsum("shd,jhd->hsj", output, values)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def group_of(place: Place) -> list[int | None]:
    """The query heads that see a head of a place."""
    if place.head is None:
        return [None]
    return [place.head] if place.component == "q" else [2 * place.head, 2 * place.head + 1]


def written(oracle: AttributionOracle, target: Prompt, source: Prompt, place: Place) -> Donor:
    """What `o` of the layer is when the place is patched, in a forward of the model itself."""
    kept: dict[tuple[str, int], Tensor] = {}
    output = Place("o", place.layer)
    vectors = {
        row: oracle.part(oracle.activation(target, place.component, place.layer)[row], place) + move
        for row, move in oracle.moves(target, source, place).items()
    }
    oracle._forward(
        target,
        [
            oracle._hook(place, oracle._writer(place, vectors)),
            oracle._hook(output, oracle._reader(output, kept)),
        ],
    )
    found = kept["o", place.layer]
    return lambda at, back: oracle.part(found[len(target) - back], at)


@pytest.mark.parametrize(
    ("lengths", "held", "backs"),
    [*zip(PAIRS, [None, 0, 2], [(1, 2), (1, 3, 4), (7, 2, 3)], strict=True)],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_qk_fix_is_the_slope_towards_the_output_that_it_computes(
    family: str, lengths: tuple[int, int], held: int | None, backs: tuple[int, ...]
) -> None:
    """Values stay: what moves by the probabilities is `o`, and a forward shows whereto."""
    oracle = oracle_of(family)
    target, source = pair(*lengths)
    found, expected = [], []
    for place in places(oracle, backs, ("q", "k")):
        if place.layer == held:
            continue
        donor = written(oracle, target, source, place)
        outputs = [Place("o", place.layer, head, EVERYWHERE) for head in group_of(place)]
        found.append(oracle.qk_fixed(target, source, place, metric, held=held))
        expected.append(oracle.finite_difference(target, donor, outputs, metric, held=held))
    check(found, expected, some=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_the_target_the_qk_fix_is_first_order(family: str) -> None:
    oracle = oracle_of(family)
    target, source = pair()
    every = places(oracle, (1, 3), ("q", "k"))
    gaps = []
    for eps in (1.0, 1e-2, 1e-4, 1e-6):

        def near(place: Place, back: int, eps: float = eps) -> Tensor:
            own = oracle.activation(target, place.component, place.layer)[len(target) - back]
            other = oracle.activation(source, place.component, place.layer)[len(source) - back]
            return oracle.part(own + eps * (other - own), place)

        fixed = [oracle.qk_fixed(target, near, place, metric) for place in every]
        plain = [oracle.first_order(target, near, place, metric) for place in every]
        ratios = torch.tensor(fixed, dtype=torch.float64) / torch.tensor(plain, dtype=torch.float64)
        gaps.append(float((ratios - 1).abs().max()))
    assert gaps[0] > 0.3
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2] > 1000 * gaps[3]
    assert gaps[3] < 1e-3


def test_a_flat_softmax_is_what_the_fix_is_for() -> None:
    """Far from the target the probabilities do move, though their gradient is nothing."""
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
    oracle = AttributionOracle(model, "llama")
    target, source = pair()
    gaps = {"fixed": 0.0, "plain": 0.0}
    for head in range(4):
        place = Place("q", LAYERS - 1, head, (1,))
        effect = float(
            metric(oracle.patched(target, source, place)) - metric(oracle.logits(target))
        )
        gaps["fixed"] += abs(oracle.qk_fixed(target, source, place, metric) - effect)
        gaps["plain"] += abs(oracle.first_order(target, source, place, metric) - effect)
    assert gaps["fixed"] < 0.5 * gaps["plain"]


# Integrated gradients.


@pytest.mark.parametrize(
    ("family", "lengths", "layer", "atol"),
    [
        ("llama", (7, 5), 0, 1e-9),
        ("mistral", (5, 7), 0, 1e-9),
        # They bend more.
        ("gemma2", (7, 5), 2, 1e-2),
        ("gemma3_text", (5, 7), 2, 1e-5),
    ],
)
def test_integrated_gradients_add_up_to_the_effect_of_patching_all(
    family: str, lengths: tuple[int, int], layer: int, atol: float
) -> None:
    oracle = oracle_of(family)
    target, source = pair(*lengths)
    base = float(metric(oracle.logits(target)))
    for component in COMPONENTS:
        whole = Place(component, layer, None, EVERYWHERE)
        effect = float(metric(oracle.patched(target, source, whole))) - base
        found = oracle.integrated(target, source, whole, metric, 24)
        assert found == pytest.approx(effect, abs=atol)
        parts = [
            oracle.integrated(target, source, Place(component, layer, head, (back,)), metric, 24)
            for head in oracle.heads(component)
            for back in EVERYWHERE
        ]
        assert sum(parts) == pytest.approx(found, abs=1e-12)
        assert parts[5:7] == [0, 0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_more_steps_leave_less_of_the_difference_of_two_runs(family: str) -> None:
    oracle = oracle_of(family)
    target, source = pair()
    effect = float(metric(oracle.logits(source)) - metric(oracle.logits(target)))
    assert abs(effect) > 0.1
    whole = Place("resid", 1, None, EVERYWHERE)
    errors = [
        abs(oracle.integrated(target, source, whole, metric, steps) - effect)
        for steps in (2, 6, 18, 54)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


def test_one_step_is_the_gradient_half_way() -> None:
    oracle = oracle_of("gemma2")
    target, source = pair()
    for component, layer in product(("q", "mlp", "resid"), range(LAYERS)):
        whole = Place(component, layer, None, EVERYWHERE)

        def value(share: float, whole: Place = whole) -> float:
            own = oracle.activation(target, whole.component, whole.layer)
            other = oracle.activation(source, whole.component, whole.layer)
            line = own + share * (other - own)
            logits = oracle.replaced(target, [whole], lambda _, back: line[len(target) - back])
            return float(metric(logits))

        expected = (value(0.5 + 1e-5) - value(0.5 - 1e-5)) / 2e-5
        check([oracle.integrated(target, source, whole, metric, 1)], [expected])


# GradDrop.


@pytest.mark.parametrize(
    ("family", "held"), [*product(["llama"], range(LAYERS)), *product(FAMILIES[1:], [1])]
)
def test_a_layer_that_is_held_adds_what_it_did(family: str, held: int) -> None:
    oracle = oracle_of(family)
    target, source = pair(7, 5)
    every = [
        place
        for place in places(oracle, (1, 3))
        if place.component in BETWEEN or place.layer != held
    ]
    check(
        [oracle.first_order(target, source, place, metric, held=held) for place in every],
        [oracle.finite_difference(target, source, [place], metric, held=held) for place in every],
        some=0.4,
    )


def test_nothing_comes_out_of_a_layer_that_is_held() -> None:
    oracle = oracle_of("gemma2")
    target, source = pair()
    for component in ("q", "k", "v", "o"):
        with pytest.raises(KeyError):
            oracle.first_order(target, source, Place(component, 1, 0, (1,)), metric, held=1)


def by_hand(oracle: AttributionOracle, target: Prompt) -> Tensor:
    """The gradient of the metric at the end of the last layer, past its RMS norm and the head."""
    final = oracle.activation(target, "resid", oracle.n_layers - 1)[-1]
    logits = oracle.logits(target)
    outward = -logits.softmax(-1)
    outward[7] += 1
    outward[50] -= 0.5
    model = oracle.model
    scaled = (outward @ model.lm_head.weight * model.model.norm.weight).detach()
    root = (final.square().mean() + model.model.norm.variance_epsilon).sqrt()
    return scaled / root - final * (final @ scaled) / (len(final) * root**3)


@pytest.mark.parametrize("lengths", PAIRS)
def test_grad_drop_by_hand(lengths: tuple[int, int]) -> None:
    """With two layers there is one other, and past it only the norm and the head."""
    oracle = oracle_of("llama", 2)
    target, source = pair(*lengths)
    outward = by_hand(oracle, target)
    for component in ADDED:
        # What leaves the attention passes the MLP of the layer, which is not held.
        backs = (1, 2, 3) if component == "mlp" else (2, 3)
        place = Place(component, 0, None, backs)
        # Other positions matter, too, but only to what is held.
        move = oracle.moves(target, source, place).get(len(target) - 1)
        found = oracle.grad_drop(target, source, place, metric)
        if move is None:
            assert found == 0
        else:
            check([found], [abs(float(outward @ move))])
    for component, layer in (("resid", 0), ("resid_pre", 1)):
        place = Place(component, layer, None, (1, 4))
        move = oracle.moves(target, source, place)[len(target) - 1]
        plain = oracle.first_order(target, source, place, metric)
        found = oracle.grad_drop(target, source, place, metric)
        check([found], [(abs(plain) + abs(float(outward @ move))) / 2])


def test_grad_drop_is_the_mean_size_over_other_layers() -> None:
    oracle = oracle_of("gemma2")
    target, source = pair(7, 5)
    found, expected, fixed, expected_fixed = [], [], [], []
    for place in places(oracle, (1, 3)):
        others = [
            layer for layer in range(LAYERS) if place.component in BETWEEN or layer != place.layer
        ]
        sizes = [
            abs(oracle.finite_difference(target, source, [place], metric, held=layer))
            for layer in others
        ]
        found.append(oracle.grad_drop(target, source, place, metric))
        expected.append(sum(sizes) / (LAYERS if place.component in BETWEEN else LAYERS - 1))
        star = oracle.star(target, source, place, metric)
        if place.component in ("q", "k"):
            fixed.append(star)
            sizes = [
                abs(oracle.qk_fixed(target, source, place, metric, held=layer)) for layer in others
            ]
            expected_fixed.append(sum(sizes) / (LAYERS - 1))
        else:
            assert star == found[-1]
    check(found, expected)
    check(fixed, expected_fixed)


def test_of_one_layer_there_is_no_other() -> None:
    oracle = oracle_of("llama", 1)
    target, source = pair()
    outward = by_hand(oracle, target)
    for place in places(oracle, (1, 2)):
        found = oracle.grad_drop(target, source, place, metric)
        if place.component in BETWEEN:
            # The layer is held: what goes around it is left.
            move = oracle.moves(target, source, place)[len(target) - 1]
            check([found], [abs(float(outward @ move))])
        else:
            assert found == abs(oracle.first_order(target, source, place, metric))
        if place.component in ("q", "k"):
            star = oracle.star(target, source, place, metric)
            assert star == abs(oracle.qk_fixed(target, source, place, metric))
