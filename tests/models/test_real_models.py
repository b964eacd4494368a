"""Real weights: every component against plain hooks, one adapter against the other, known facts.

The quick tests do the same, and more of it, on tiny random models. Here activations are as large
and as different from each other as training makes them, layers are many, and prompts are text.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from nnsight import NNsight

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.plugins import find_adapter
from tests.helpers.attribution_oracle import AttributionOracle
from tests.helpers.oracle import COMPONENTS, Place, Prompt
from tests.models.real import Real, as_mistral, gemma3_270m, smollm2_135m

#: On logit differences of up to 20. At most 3e-5 was measured in float32, where a padded batch adds
#: up the same sums in another way, and none in float64.
ATOL = 1e-4

#: Padding is what some of these test, so that what it mixes needs no word.
pytestmark = pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning")

MODELS = {"SmolLM2": smollm2_135m, "Gemma 3": gemma3_270m}
#: Both models answer it with a capital.
KNOWN = "Sweden's capital is Stockholm, and {}'s capital is"
#: Prompts of three lengths, so that two of them are padded; the country is always at -3.
MIXED = (
    "The capital city of {} is called",
    "As everybody knows, the capital of {} is called",
    "Paul Smith was born in the capital city of {}, called",
)
SOURCE = [("France", " Paris"), ("Portugal", " Lisbon"), ("Egypt", " Cairo")]
TARGET = [("Japan", " Tokyo"), ("Greece", " Athens"), ("Austria", " Vienna")]
LAST, MIDDLE = -1, -3


@pytest.fixture(scope="module", params=MODELS)
def known(request: pytest.FixtureRequest) -> Iterator[Real]:
    """One model after the other, so that they are not in memory together."""
    yield MODELS[request.param]()
    gc.collect()


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("known", [name], indirect=True)


class Pairs:
    """Prompt pairs, as nnpatch lays them out and as the oracle wants them."""

    def __init__(
        self,
        tokenizer: Any,
        source: list[str],
        target: list[str],
        source_answers: list[str],
        target_answers: list[str],
    ) -> None:
        pairs = PromptPairs.from_texts(source, target, source_answers, target_answers, tokenizer)
        self.arguments = {**pairs.arguments(), "progress": False}
        self.source = [self.tokens(tokenizer, text) for text in source]
        self.target = [self.tokens(tokenizer, text) for text in target]
        self.answers = [
            [self.tokens(tokenizer, text, add_special_tokens=False) for text in column]
            for column in (source_answers, target_answers)
        ]
        assert all(len(answer) == 1 for column in self.answers for answer in column)

    @staticmethod
    def tokens(tokenizer: Any, text: str, **options: Any) -> Prompt:
        return tuple(tokenizer(text, **options).input_ids)

    @property
    def different(self) -> int:
        """How far from the end the only token is in which each source differs from its target."""
        (back,) = {
            len(source) - place
            for source, target in zip(self.source, self.target, strict=True)
            for place, (one, other) in enumerate(zip(source, target, strict=True))
            if one != other
        }
        return back

    def differences(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """The logit difference of each prompt, `[batch]`, of logits `[vocab]` each."""
        rows = zip(logits, *self.answers, strict=True)
        return torch.stack([row[source] - row[target] for row, (source,), (target,) in rows])

    def expected(self, known: Real, place: Place) -> torch.Tensor:
        """What plain hooks give for a cell, `[batch]`: one prompt at a time, unpadded."""
        oracle = known.oracle
        return self.differences(
            [
                oracle.replaced(target, [place], oracle.of_prompt(source))
                for source, target in zip(self.source, self.target, strict=True)
            ]
        )


def unpatched(known: Real, pairs: Pairs) -> torch.Tensor:
    """The target prompts' logit differences; of long prompts no activations are kept."""
    oracle = known.oracle
    return pairs.differences([oracle.replaced(each, [], oracle.zeros) for each in pairs.target])


def pairs_of(known: Real, templates: tuple[str, ...]) -> Pairs:
    return Pairs(
        known.tokenizer,
        [text.format(country) for text, (country, _) in zip(templates, SOURCE, strict=True)],
        [text.format(country) for text, (country, _) in zip(templates, TARGET, strict=True)],
        [answer for _, answer in SOURCE],
        [answer for _, answer in TARGET],
    )


def test_estimates_are_those_of_plain_autograd(known: Real) -> None:
    """First order, with the QK fix, and AtP*, in a layer in the middle, in which heads matter."""
    pairs = Pairs(
        known.tokenizer, [KNOWN.format("France")], [KNOWN.format("Japan")], [" Paris"], [" Tokyo"]
    )
    oracle = AttributionOracle(known.model, known.model.config.model_type)
    (source,), (target,) = pairs.source, pairs.target
    ((answer,),), ((other,),) = pairs.answers

    def difference(logits: torch.Tensor) -> torch.Tensor:
        return logits[answer] - logits[other]

    layer = known.layers[-2]
    sites = Sites(list(COMPONENTS), layers=[layer], heads=[0], seq_pos_type="lastk", seq_pos=6)
    repairs: dict[str, dict[str, bool]] = {
        "first_order": {},
        "qk_fixed": {"qk_fix": True},
        "star": {"qk_fix": True, "grad_drop": True},
    }
    for name, asked in repairs.items():
        out = attribution_patching(known.model, None, sites, **pairs.arguments, **asked)
        for component in ("q", "k") if name == "qk_fixed" else COMPONENTS:
            moved = out.patched(component)[layer].double() - out.baseline.target.double()
            moved = moved if oracle.heads(component) == [None] else moved[:, 0]
            head = oracle.heads(component)[0]
            expected = [
                getattr(oracle, name)(
                    target, source, Place(component, layer, head, (back,)), difference
                )
                for back in range(6, 0, -1)
            ]
            found, wanted = moved[-6:, 0], torch.tensor(expected, dtype=torch.float64)
            assert wanted.abs().max() > 1e-3
            # In float32 the model rounds, and the oracle is in float64.
            torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


def some_heads(known: Real, component: str) -> list[int] | None:
    """The first head and the last one, of a component that has heads."""
    heads = known.oracle.heads(component)
    return None if heads == [None] else sorted({heads[0], heads[-1]})


def sweep(known: Real, component: str, pairs: Pairs) -> Outcome:
    sites = Sites(
        component,
        layers=known.layers,
        heads=some_heads(known, component),
        seq_pos_type="custom",
        seq_pos=[LAST, MIDDLE],
    )
    return activation_patching(known.model, None, sites, **pairs.arguments)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_equals_plain_hooks(known: Real, component: str) -> None:
    pairs = pairs_of(known, MIXED)
    lengths = set(map(len, pairs.source))
    assert len(lengths) == 3
    assert pairs.different == -MIDDLE
    out = sweep(known, component, pairs)
    base = unpatched(known, pairs)
    torch.testing.assert_close(out.baseline.target, base, atol=ATOL, rtol=0)
    moved = []
    for layer in known.layers:
        for position in (LAST, MIDDLE):
            for head in some_heads(known, component) or [None]:
                index = (layer, max(lengths) + position, *(() if head is None else (head,)))
                expected = pairs.expected(known, Place(component, layer, head, (-position,)))
                found = out.patched(component)[index]
                torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
                moved.append((expected - base).abs())
    assert int(out.swept(component).sum()) == len(moved)
    # An effect as small as the tolerance would prove nothing. Some cells can have none: in the last
    # layer a middle token but by its key and value, in the first the projections of "called".
    effects = torch.stack(moved)
    assert effects.max() > 1000 * ATOL
    assert (effects > 10 * ATOL).float().mean() > 0.4


@pytest.mark.parametrize("component", ["attn", "mlp"])
def test_mean_ablation_equals_plain_hooks(known: Real, component: str) -> None:
    """Copies look the same before a norm and after it, means do not: this sees a norm left out."""
    pairs = pairs_of(known, MIXED)
    sites = Sites(component, layers=known.layers, seq_pos_type="last")
    out = ablation_patching(
        known.model,
        None,
        sites,
        pairs.arguments["target_tokens"],
        pairs.arguments["source_answer_index"],
        pairs.arguments["target_answer_index"],
        method="mean",
        attention_mask=pairs.arguments["target_attention_mask"],
        progress=False,
    )
    oracle, base = known.oracle, unpatched(known, pairs)
    for layer in known.layers:
        place = [Place(component, layer, None, (-LAST,))]
        logits = [oracle.replaced(each, place, oracle.mean(pairs.target)) for each in pairs.target]
        expected = pairs.differences(logits)
        torch.testing.assert_close(out.patched(component)[layer], expected, atol=ATOL, rtol=0)
        assert (expected - base).abs().max() > 1000 * ATOL


def test_blocks_add_up_to_what_their_layer_gives(known: Real) -> None:
    """So `attn` and `mlp` are what a block adds to the residual stream: after its norm, if any."""
    names = ("resid_pre", "attn", "mlp", "resid")
    sites = [Site.get_site(known.api, name, layer) for layer in known.layers for name in names]
    nnmodel = NNsight(known.model)
    with torch.no_grad(), nnmodel.trace(torch.tensor([pairs_of(known, MIXED).source[0]])):
        for site in sites:
            site.cache(nnmodel)
    for start in range(0, len(sites), len(names)):
        before, attn, mlp, after = (site.value for site in sites[start : start + len(names)])
        assert torch.equal(before + attn + mlp, after)


def test_discovery(known: Real) -> None:
    assert find_adapter(None, known.model) is known.api
    assert sweep(known, "resid", pairs_of(known, MIXED)).info["adapter"] == known.api.name


def test_what_the_model_knows(known: Real) -> None:
    """The stream carries the country in the first layer, and the answer in the last."""
    pairs = pairs_of(known, (KNOWN,) * len(SOURCE))
    for answers, prompts in zip(pairs.answers, (pairs.source, pairs.target), strict=True):
        assert [(int(known.oracle.logits(each).argmax()),) for each in prompts] == answers
    first, last, country = known.layers[0], known.layers[-1], -pairs.different
    out = activation_patching(
        known.model,
        None,
        Sites("resid", layers=[first, last], seq_pos_type="custom", seq_pos=[LAST, country]),
        **pairs.arguments,
        force_model_confidence=True,
    )
    resid = out["resid"]
    assert resid[last, LAST].item() == pytest.approx(1, abs=1e-5)
    assert resid[last, country].item() == pytest.approx(0, abs=1e-5)
    assert resid[first, country].item() == pytest.approx(1, abs=0.01)
    assert resid[first, LAST].item() == pytest.approx(0, abs=0.01)


@only("SmolLM2")
@pytest.mark.parametrize("component", COMPONENTS)
def test_both_adapters_agree_on_the_same_weights(known: Real, component: str) -> None:
    pairs = pairs_of(known, MIXED)
    one, other = sweep(known, component, pairs), sweep(as_mistral(known), component, pairs)
    assert (one.info["adapter"], other.info["adapter"]) == ("Llama3", "Mistral")
    torch.testing.assert_close(other[component], one[component], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        other.patched(component), one.patched(component), atol=1e-5, rtol=0, equal_nan=True
    )


WORDS = (" Victoria", " Neptune")
FILLING = " The sun was warm and the sea was calm. Day after day nothing happened." * 32
#: The word to repeat is as far from the end in both, and further than the window.
FAR = tuple(
    f"{start}The secret word is{{}}.{FILLING}\nThe secret word is"
    for start in ("", "Listen to me! ")
)


@only("Gemma 3")
def test_prompts_longer_than_the_sliding_window(
    known: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = list(WORDS), list(WORDS[::-1])
    pairs = Pairs(
        known.tokenizer,
        [text.format(word) for text, word in zip(FAR, source, strict=True)],
        [text.format(word) for text, word in zip(FAR, target, strict=True)],
        source,
        target,
    )
    config, back = known.oracle.model.config, pairs.different
    assert len(pairs.source[0]) < len(pairs.source[1])
    assert back > config.sliding_window
    assert [config.layer_types[layer][:4] for layer in (0, 5, 16)] == ["slid", "full", "slid"]
    places = [
        # Before the first layer that sees the word from the end.
        Place("resid", 4, None, (back,)),
        # In layers that see a window.
        Place("v", 0, 0, (back,)),
        Place("attn", 16, None, (1,)),
    ]
    sites = [
        Site.get_site(known.api, place.component, place.layer, place.head, [-place.from_end[0]])
        for place in places
    ]
    out = activation_patching(known.model, None, Sites.from_sites(sites), **pairs.arguments)
    base = unpatched(known, pairs)
    torch.testing.assert_close(out.baseline.target, base, atol=ATOL, rtol=0)
    for place in places:
        expected = pairs.expected(known, place)
        torch.testing.assert_close(out.patched(place.component)[0], expected, atol=ATOL, rtol=0)
        assert ((expected - base).abs() > 1000 * ATOL).all()
    assert out["resid"].item() > 0.9
    # Without a window the numbers would be others: it is there, and the prompts reach beyond it.
    monkeypatch.setattr(config, "sliding_window", 4096)
    assert ((unpatched(known, pairs) - base).abs() > 1000 * ATOL).all()
