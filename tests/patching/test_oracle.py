"""Every sweep against the oracle: plain hooks, one unpadded prompt and one cell at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch.nn.functional import kl_div

from nnpatch_core import (
    MultiSite,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    cache_average,
    execution_order,
)
from nnpatch_core.testing import tiny_model
from nnpatch_gemma import Gemma, Gemma2, Gemma3
from nnpatch_llama import Llama3
from nnpatch_mistral import Mistral
from tests.helpers.oracle import COMPONENTS, Donor, Oracle, Place, Prompt, lay_out, random_prompts

#: Padding is what is tested here, so that what it mixes needs no word.
pytestmark = [
    pytest.mark.filterwarnings("ignore:prompts have:nnpatch_core.errors.PromptWarning"),
    pytest.mark.newest,
]

FAMILIES = {"llama": Llama3, "mistral": Mistral, "gemma2": Gemma2}
#: Gemma is laid out like Llama, and Gemma 3 like Gemma 2: a part of the tests is enough.
ALIKE = {"gemma": Gemma, "gemma3_text": Gemma3}
ADAPTERS = {**FAMILIES, **ALIKE}
PADDING = ("unpadded", "left", "right", "mixed", "holes")
WIDTH = 7
ATOL = 1e-4

#: The arguments of `Sites`, and the groups of positions they mean in a batch of width 7.
STRATEGIES: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "all": ({}, [(0, 1, 2, 3, 4, 5, 6)]),
    "each": ({"seq_pos_type": "each"}, [(0,), (1,), (2,), (3,), (4,), (5,), (6,)]),
    "last": ({"seq_pos_type": "last"}, [(6,)]),
    "lastk": ({"seq_pos_type": "lastk", "seq_pos": 3}, [(4,), (5,), (6,)]),
    "custom": ({"seq_pos_type": "custom", "seq_pos": [-1, 2, -4]}, [(2,), (3,), (6,)]),
    "custom_constant": (
        {"seq_pos_type": "custom_constant", "seq_pos": [-2, 0, -4]},
        [(0, 3, 5)],
    ),
}
ONE_BY_ONE = ("each", "lastk", "custom")

EVERY_SWEEP = [*product(FAMILIES, STRATEGIES, PADDING)]
EVERY_SWEEP += product(ALIKE, ("each",), ("left", "holes"))

SAME_LENGTHS = {how: (7, 7, 7) if how == "unpadded" else (7, 5, 4) for how in PADDING}


@functools.cache
def model_and_oracle(family: str) -> tuple[Any, Oracle]:
    model = tiny_model(family)
    # The oracle's copy is taken before nnsight ever sees the model.
    return model, Oracle(model, family)


class Pairs:
    """Source and target prompts, laid out in two batches."""

    def __init__(
        self,
        oracle: Oracle,
        source_lengths: tuple[int, ...],
        target_lengths: tuple[int, ...],
        how: str,
        target_how: str | None = None,
    ) -> None:
        self.source = random_prompts(source_lengths, seed=1)
        self.target = random_prompts(target_lengths, seed=2)
        # One layout for both runs where lengths agree, so that one mask is right for both.
        self.source_tokens, self.source_mask = lay_out(self.source, how, WIDTH, seed=3)
        self.target_tokens, self.target_mask = lay_out(
            self.target, target_how or how, WIDTH, seed=3
        )
        # The two tokens between which the runs differ most, so that no effect is a small one.
        self.source_logits = torch.stack([oracle.logits(prompt) for prompt in self.source])
        self.target_logits = torch.stack([oracle.logits(prompt) for prompt in self.target])
        self.source_answers = (self.source_logits - self.target_logits).argmax(-1)
        self.target_answers = (self.source_logits - self.target_logits).argmin(-1)

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        if bool(self.source_mask.all()) and bool(self.target_mask.all()):
            return {}
        if torch.equal(self.source_mask, self.target_mask):
            return {"attention_mask": self.source_mask}
        return {
            "source_attention_mask": self.source_mask,
            "target_attention_mask": self.target_mask,
        }

    def difference(self, logits: torch.Tensor) -> torch.Tensor:
        """The logit difference `[..., batch]` of logits `[..., batch, vocab]`."""
        rows = torch.arange(len(self.source))
        return logits[..., rows, self.source_answers] - logits[..., rows, self.target_answers]

    @property
    def arguments(self) -> dict[str, Any]:
        return {
            "source_tokens": self.source_tokens,
            "target_tokens": self.target_tokens,
            "source_answer_index": self.source_answers,
            "target_answer_index": self.target_answers,
            "progress": False,
            **self.masks,
        }


def per_prompt(
    oracle: Oracle, pairs: Pairs, component: str, layer: int, head: int | None, group: tuple
) -> torch.Tensor:
    """The oracle's logit difference of each prompt of a cell, `[batch]`."""
    place = Place(component, layer, head, tuple(WIDTH - position for position in group))
    rows = zip(pairs.source, pairs.target, strict=True)
    return pairs.difference(torch.stack([oracle.patched(t, s, place) for s, t in rows]))


def present(pairs: Pairs, group: tuple[int, ...]) -> list[bool]:
    """Which prompts have a token, in both runs, at some position of the group."""
    lengths = [min(len(s), len(t)) for s, t in zip(pairs.source, pairs.target, strict=True)]
    return [any(WIDTH - position <= length for position in group) for length in lengths]


def expected_grid(
    oracle: Oracle, pairs: Pairs, component: str, strategy: str
) -> dict[tuple[int, ...], torch.Tensor]:
    """Place in the outcome to the oracle's values, for every cell of a sweep of everything.

    A group that is padding in every prompt is no cell: nothing could be patched there.
    """
    found = {}
    for layer in range(oracle.n_layers):
        for group in STRATEGIES[strategy][1]:
            if not any(present(pairs, group)):
                continue
            for head in oracle.heads(component):
                position = (group[0],) if strategy in ONE_BY_ONE else ()
                index = (layer, *position, *(() if head is None else (head,)))
                found[index] = per_prompt(oracle, pairs, component, layer, head, group)
    return found


def full_shape(oracle: Oracle, component: str, strategy: str) -> tuple[int, ...]:
    heads = oracle.heads(component)
    positions = (WIDTH,) if strategy in ONE_BY_ONE else ()
    return (oracle.n_layers, *positions, *(() if heads == [None] else (len(heads),)))


def check_sweep(out: Any, oracle: Oracle, pairs: Pairs, strategy: str) -> torch.Tensor:
    """Compare every cell of every component; gives how far each swept cell moved."""
    source = pairs.difference(pairs.source_logits)
    target = pairs.difference(pairs.target_logits)
    torch.testing.assert_close(out.baseline.source, source, atol=ATOL, rtol=0)
    torch.testing.assert_close(out.baseline.target, target, atol=ATOL, rtol=0)
    scale = source.mean() - target.mean()
    assert scale > 0.5, "the value of a cell would be mostly rounding"
    moved = []
    for component in COMPONENTS:
        grid = expected_grid(oracle, pairs, component, strategy)
        shape = full_shape(oracle, component, strategy)
        assert out[component].shape == shape
        patched = torch.full((*shape, len(target)), float("nan"))
        value = torch.zeros(shape)
        for index, values in grid.items():
            patched[index] = values
            value[index] = (values.mean() - target.mean()) / scale
            moved.append((values - target).abs())
        torch.testing.assert_close(
            out.patched(component), patched, atol=ATOL, rtol=0, equal_nan=True
        )
        torch.testing.assert_close(out[component], value, atol=ATOL / scale, rtol=0)
        assert torch.equal(out.swept(component), ~patched.isnan().any(-1))
    return torch.stack(moved)


def check_not_vacuous(moved: torch.Tensor) -> None:
    """Most effects are far larger than the tolerance, so that a wrong one would be seen.

    Some can be nothing: in the last layer only keys and values of earlier tokens matter, a sliding
    window sees only so far, and where a prompt has no token nothing is patched.
    """
    any_effect = moved[moved > 0]
    assert len(any_effect) > 0.4 * moved.numel()
    assert (any_effect > 10 * ATOL).float().mean() > 0.9
    assert any_effect.median() > 200 * ATOL


@pytest.mark.parametrize(("family", "strategy", "padding"), EVERY_SWEEP)
def test_every_component_equals_plain_hooks(family: str, strategy: str, padding: str) -> None:
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, SAME_LENGTHS[padding], SAME_LENGTHS[padding], padding)
    sites = Sites(COMPONENTS, **STRATEGIES[strategy][0])
    out = activation_patching(model, ADAPTERS[family], sites, **pairs.arguments)
    moved = check_sweep(out, oracle, pairs, strategy)
    check_not_vacuous(moved)


@pytest.mark.parametrize(
    ("how", "target_how"),
    [("left", "left"), ("right", "right"), ("left", "right"), ("mixed", "holes")],
)
@pytest.mark.parametrize("strategy", ["all", "each", "custom_constant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_pair_may_differ_in_length(
    family: str, strategy: str, how: str, target_how: str
) -> None:
    """Aligned on the right; where either prompt has no token, that row is not patched."""
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 4, 5), (5, 7, 5), how, target_how)
    sites = Sites(COMPONENTS, **STRATEGIES[strategy][0])
    out = activation_patching(model, None, sites, **pairs.arguments)
    check_not_vacuous(check_sweep(out, oracle, pairs, strategy))
    if strategy == "each":
        for component in COMPONENTS:
            # Row 0 has no target token at positions 0 and 1, rows 1 and 2 no source token.
            assert not bool(out.swept(component)[:, :2].any())
            for position in range(WIDTH):
                absent = ~torch.tensor(present(pairs, (position,)))
                own = out.per_prompt(component)[:, position].isnan()
                assert torch.equal(own, absent.expand_as(own))


@pytest.mark.parametrize("component", COMPONENTS)
def test_layers_and_heads_narrow_a_sweep(component: str) -> None:
    """What was left out is 0 in the mapping and nan in the per-prompt values."""
    model, oracle = model_and_oracle("mistral")
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "mixed")
    heads = None if oracle.heads(component) == [None] else [1]
    sites = Sites(component, layers=[2, 0], heads=heads, seq_pos_type="custom", seq_pos=[-2, -1])
    out = activation_patching(model, None, sites, **pairs.arguments)
    swept = {(layer, position) for layer in (0, 2) for position in (5, 6)}
    target = pairs.difference(pairs.target_logits)
    scale = (pairs.difference(pairs.source_logits) - target).mean()
    assert out[component].shape == full_shape(oracle, component, "custom")
    for index, patched in expected_grid(oracle, pairs, component, "each").items():
        if index[:2] in swept and index[2:] in ((), (1,)):
            torch.testing.assert_close(out.patched(component)[index], patched, atol=ATOL, rtol=0)
            value = (patched.mean() - target.mean()) / scale
            torch.testing.assert_close(out[component][index], value, atol=ATOL, rtol=0)
        else:
            assert out[component][index] == 0
            assert bool(out.patched(component)[index].isnan().all())


class Pairwise:
    """A strategy of somebody else's: every two neighbours, in a cell at the first of them."""

    one_by_one = True

    def expand(self, seq_len: int) -> list[tuple[int, ...]]:
        return [(position, position + 1) for position in range(seq_len - 1)]


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_strategy_of_ones_own(component: str) -> None:
    model, oracle = model_and_oracle("gemma2")
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "right")
    sites = Sites(component, seq_pos_type=Pairwise())
    out = activation_patching(model, None, sites, **pairs.arguments)
    assert bool(out.patched(component)[:, -1].isnan().all())
    for layer in range(oracle.n_layers):
        for position in range(WIDTH - 1):
            for head in oracle.heads(component):
                group = (position, position + 1)
                index = (layer, position, *(() if head is None else (head,)))
                expected = per_prompt(oracle, pairs, component, layer, head, group)
                found = out.patched(component)[index]
                torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


# Ablation: one run, and what is put there comes from nowhere, a data set or another prompt.

ABLATED = {"seq_pos_type": "custom", "seq_pos": [-1, -4, 0]}
ABLATED_POSITIONS = (0, 3, 6)


def ablated_places(oracle: Oracle, component: str) -> Iterator[tuple[tuple[int, ...], Place]]:
    """Each cell's place in the outcome, and in the model."""
    for layer in range(oracle.n_layers):
        for position in ABLATED_POSITIONS:
            for head in oracle.heads(component):
                index = (layer, position, *(() if head is None else (head,)))
                yield index, Place(component, layer, head, (WIDTH - position,))


def check_ablation(out: Any, oracle: Oracle, pairs: Pairs, donor: Donor) -> None:
    base = pairs.difference(pairs.source_logits)
    torch.testing.assert_close(out.baseline.target, base, atol=ATOL, rtol=0)
    moved = []
    for component in COMPONENTS:
        cells = [
            (index, place)
            for index, place in ablated_places(oracle, component)
            if any(
                back <= len(prompt) and donor(place, back) is not None
                for prompt in pairs.source
                for back in place.from_end
            )
        ]
        assert int(out.swept(component).sum()) == len(cells)
        for index, place in cells:
            logits = [oracle.replaced(prompt, [place], donor) for prompt in pairs.source]
            expected = pairs.difference(torch.stack(logits))
            found = out.patched(component)[index]
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
            value = (expected - base).mean()
            torch.testing.assert_close(out[component][index], value, atol=ATOL, rtol=0)
            moved.append((expected - base).abs())
    check_not_vacuous(torch.stack(moved))


def ablate(model: Any, pairs: Pairs, sites: Sites | None = None, **options: Any) -> Any:
    return ablation_patching(
        model,
        None,
        sites or Sites(COMPONENTS, **ABLATED),
        pairs.source_tokens,
        pairs.source_answers,
        pairs.target_answers,
        attention_mask=pairs.source_mask,
        progress=False,
        **options,
    )


@pytest.mark.parametrize("padding", ["mixed", "holes"])
@pytest.mark.parametrize("family", ADAPTERS)
def test_zero_ablation(family: str, padding: str) -> None:
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), padding)
    check_ablation(ablate(model, pairs), oracle, pairs, oracle.zeros)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("family", ADAPTERS)
def test_mean_ablation_over_the_prompts_themselves(family: str, per_position: bool) -> None:
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "mixed")
    out = ablate(model, pairs, method="mean", per_position=per_position)
    mean = oracle.mean_per_position if per_position else oracle.mean
    check_ablation(out, oracle, pairs, mean(pairs.source))


LONG, SHORT = ((3, 9), (6, 2, 4)), ((3, 2), (4, 1))


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize(
    ("family", "lengths"), [(family, LONG) for family in FAMILIES] + [("mistral", SHORT)]
)
def test_mean_ablation_over_a_data_set(family: str, lengths: tuple, per_position: bool) -> None:
    """Batches of other sizes and widths; where no prompt of them reaches, nothing is patched."""
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 7, 5), (7, 7, 5), "right")
    first, second = random_prompts(lengths[0], seed=8), random_prompts(lengths[1], seed=9)
    tokens, mask = lay_out(second, "holes", seed=5)
    batches = [lay_out(first, "mixed"), {"input_ids": tokens, "attention_mask": mask}]
    out = ablate(model, pairs, method="mean", reference=iter(batches), per_position=per_position)
    mean = oracle.mean_per_position if per_position else oracle.mean
    check_ablation(out, oracle, pairs, mean(first + second))


DONATED = ("resid", "k", "o")


def drawn(out: Any, oracle: Oracle, pairs: Pairs, candidates: list[Prompt]) -> list[list[int]]:
    """For each prompt the candidates whose activations explain every cell."""
    fitting = []
    for row, prompt in enumerate(pairs.source):
        fits = []
        for number, candidate in enumerate(candidates):
            errors = []
            for component in DONATED:
                for index, place in ablated_places(oracle, component):
                    logits = oracle.patched(prompt, candidate, place)
                    source, target = pairs.source_answers[row], pairs.target_answers[row]
                    expected = logits[source] - logits[target]
                    found = out.baseline.target[row]
                    # Where every donor is too short, there is no cell, and the run as it was.
                    if out.swept(component)[index]:
                        found = out.patched(component)[index][row]
                    errors.append((found - expected).abs())
            if max(errors) < ATOL:
                fits.append(number)
        fitting.append(fits)
    return fitting


@pytest.mark.parametrize("family", FAMILIES)
def test_resample_ablation_takes_another_prompt_of_the_batch(family: str) -> None:
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "mixed")
    sites = Sites(DONATED, **ABLATED)
    draws = set()
    for seed in range(4):
        out = ablate(model, pairs, sites, method="resample", seed=seed)
        partners = drawn(out, oracle, pairs, pairs.source)
        assert [len(fits) for fits in partners] == [1, 1, 1]
        assert all(fits != [row] for row, fits in enumerate(partners))
        again = ablate(model, pairs, sites, method="resample", seed=seed, batch_size=2)
        torch.testing.assert_close(again["resid"], out["resid"], atol=ATOL, rtol=0)
        draws.add(tuple(fits[0] for fits in partners))
    assert draws == {(1, 2, 0), (2, 0, 1)}, "both ways of taking another one turn up"


def test_resample_ablation_takes_a_prompt_of_the_data_set() -> None:
    model, oracle = model_and_oracle("mistral")
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "right")
    reference = random_prompts((5, 8, 2, 3), seed=8)
    sites = Sites(DONATED, **ABLATED)
    out = ablate(model, pairs, sites, method="resample", reference=[lay_out(reference, "holes")])
    assert [len(fits) for fits in drawn(out, oracle, pairs, reference)] == [1, 1, 1]


# Sites of the user's own.


def test_sites_of_ones_own_and_several_at_once() -> None:
    """Every site of a `MultiSite` is patched in one forward, in whatever order they were named."""
    for family, api in ADAPTERS.items():
        model, oracle = model_and_oracle(family)
        pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "mixed")
        cells = [
            [Place("resid", 1, None, (1, 2))],
            [Place("o", 2, 3, (1,))],
            [Place("q", 1, None, (1, 3))],
            # One component twice: two heads, and two positions.
            [Place("q", 1, 0, (1,)), Place("q", 1, 3, (1, 2)), Place("v", 1, 1, (4, 2))],
            [Place("mlp", 2, None, (1,)), Place("attn", 0, None, (4,)), Place("k", 1, 0, (2,))],
            # One tensor under two names.
            [Place("resid_pre", 1, None, (3,)), Place("resid", 0, None, (2,))],
            [Place("resid", 0, None, (1,)), Place("resid", 2, None, (4,)), Place("o", 1, 1, (1,))],
        ]
        sites = []
        for places in cells:
            parts = [
                Site.get_site(api, component, layer, head, [-back for back in from_end])
                for component, layer, head, from_end, _ in places
            ]
            sites.append(parts[0] if len(parts) == 1 else MultiSite(parts, name="several"))
        out = activation_patching(model, None, Sites.from_sites(sites), **pairs.arguments)
        assert {name: list(values.shape) for name, values in out.items()} == {
            "resid": [1],
            "o": [1],
            "q": [1],
            "several": [4],
        }
        found = torch.cat([out.patched(name) for name in ("resid", "o", "q", "several")])
        moved = []
        for places, patched in zip(cells, found, strict=True):
            rows = zip(pairs.source, pairs.target, strict=True)
            logits = torch.stack([oracle.patched(t, s, *places) for s, t in rows])
            expected = pairs.difference(logits)
            torch.testing.assert_close(patched, expected, atol=ATOL, rtol=0)
            moved.append((expected - pairs.difference(pairs.target_logits)).abs())
        check_not_vacuous(torch.stack(moved))


def test_zero_ablation_of_several_sites() -> None:
    model, oracle = model_and_oracle("llama")
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "left")
    places = [Place("attn", 1, None, (1, 2)), Place("mlp", 0, None, (3,))]
    parts = [
        Site.get_site(Llama3, component, layer, head, [-back for back in from_end])
        for component, layer, head, from_end, _ in places
    ]
    out = ablate(model, pairs, Sites.from_sites([MultiSite(parts)]))
    logits = [oracle.replaced(prompt, places, oracle.zeros) for prompt in pairs.source]
    expected = pairs.difference(torch.stack(logits))
    torch.testing.assert_close(out.patched("mlp+attn")[0], expected, atol=ATOL, rtol=0)


EVERYWHERE = tuple(range(1, WIDTH + 1))
#: Arguments of `Site.get_site` beside the component, and the positions from the end they mean.
OWN_SITES = [
    ({"layer": 1}, EVERYWHERE),
    ({"layer": 1, "seq_pos": [-1]}, (1,)),
    ({"layer": 0, "seq_pos": [2, -2, 0]}, (2, 5, 7)),
    ({"layer": 2, "seq_pos": [-1], "head": 1}, (1,)),
    ({"layer": 1, "head": 0}, EVERYWHERE),
]


def own_sites(family: str, component: str) -> list[tuple[Site, Place]]:
    found = []
    for arguments, from_end in OWN_SITES:
        head = arguments.get("head")
        if head is None or component in ("q", "k", "v", "o"):
            site = Site.get_site(ADAPTERS[family], component, **arguments)
            found.append((site, Place(component, arguments["layer"], head, from_end)))
    return found


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("family", ADAPTERS)
def test_cache_and_patch_in_ones_own_traces(family: str, component: str) -> None:
    model, oracle = model_and_oracle(family)
    nnmodel = NNsight(model)
    pairs = Pairs(oracle, (7, 7, 7), (7, 7, 7), "unpadded")
    sites = own_sites(family, component)
    with torch.no_grad(), nnmodel.trace(pairs.source_tokens):
        for site in execution_order(site for site, _ in sites):
            site.cache(nnmodel)
    for site, place in sites:
        width = oracle.activation(pairs.source[0], component, place.layer).shape[-1]
        assert site.value.flatten(2).shape[:2] == (3, len(place.from_end))
        assert site.head is not None or site.value.flatten(2).shape[2] == width
        with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
            site.patch(nnmodel)
            patched = nnmodel.output.logits[:, -1].save()
        with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
            # Zeros although something is cached: the two are easily swapped.
            site.patch(nnmodel, zero=True)
            zeroed = nnmodel.output.logits[:, -1].save()
        for row, (source, target) in enumerate(zip(pairs.source, pairs.target, strict=True)):
            cached = oracle.patched(target, source, place)
            torch.testing.assert_close(patched[row], cached, atol=ATOL, rtol=0)
            zeros = oracle.replaced(target, [place], oracle.zeros)
            torch.testing.assert_close(zeroed[row], zeros, atol=ATOL, rtol=0)
            assert (zeros - cached).abs().max() > 10 * ATOL


def test_zeros_need_no_cache_and_several_sites_patch_together() -> None:
    model, oracle = model_and_oracle("gemma2")
    nnmodel = NNsight(model)
    pairs = Pairs(oracle, (7, 7, 7), (7, 7, 7), "unpadded")
    places = [Place("mlp", 1, None, (1,)), Place("v", 0, 1, (2, 1)), Place("attn", 1, None, (3,))]
    both = MultiSite(
        Site.get_site(Gemma2, component, layer, head, [-back for back in from_end])
        for component, layer, head, from_end, _ in places
    )
    with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
        both.patch(nnmodel, zero=True)
        zeroed = nnmodel.output.logits[:, -1].save()
    with torch.no_grad(), nnmodel.trace(pairs.source_tokens):
        both.cache(nnmodel)
    with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
        both.patch(nnmodel)
        patched = nnmodel.output.logits[:, -1].save()
    for row, (source, target) in enumerate(zip(pairs.source, pairs.target, strict=True)):
        zeros = oracle.replaced(target, places, oracle.zeros)
        torch.testing.assert_close(zeroed[row], zeros, atol=ATOL, rtol=0)
        cached = oracle.patched(target, source, *places)
        torch.testing.assert_close(patched[row], cached, atol=ATOL, rtol=0)


def test_two_sites_of_one_place_have_caches_of_their_own() -> None:
    model, oracle = model_and_oracle("llama")
    nnmodel = NNsight(model)
    pairs = Pairs(oracle, (7, 7, 7), (7, 7, 7), "unpadded")
    one, other = (Site.get_site(Llama3, "resid", 1, seq_pos=[-1]) for _ in range(2))
    with torch.no_grad(), nnmodel.trace(pairs.source_tokens):
        one.cache(nnmodel)
    with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
        other.cache(nnmodel)
    for site, prompts in ((one, pairs.source), (other, pairs.target)):
        expected = [oracle.activation(prompt, "resid", 1)[-1:] for prompt in prompts]
        torch.testing.assert_close(site.value, torch.stack(expected), atol=ATOL, rtol=0)
    # What was cached outlives a patch of it: the model's own tensors are not shared.
    before = one.value.clone()
    with torch.no_grad(), nnmodel.trace(pairs.target_tokens):
        one.patch(nnmodel)
    assert torch.equal(one.value, before)


@pytest.mark.parametrize("component", COMPONENTS)
def test_average_over_ones_own_traces(component: str) -> None:
    model, oracle = model_and_oracle("mistral")
    nnmodel = NNsight(model)
    prompts = random_prompts((7, 7, 7, 7, 7), seed=6)
    target = random_prompts((7, 7), seed=7)
    for site, place in own_sites("mistral", component):
        for batch in (prompts[:3], prompts[3:]):
            with torch.no_grad(), nnmodel.trace(torch.tensor(batch)):
                site.cache(nnmodel, average=True)
        with torch.no_grad(), nnmodel.trace(torch.tensor(target)):
            site.patch(nnmodel)
            patched = nnmodel.output.logits[:, -1].save()
        mean = oracle.mean_per_position(prompts)
        expected = [oracle.replaced(prompt, [place], mean) for prompt in target]
        torch.testing.assert_close(patched, torch.stack(expected), atol=ATOL, rtol=0)


@pytest.mark.parametrize("component", COMPONENTS)
def test_average_over_a_data_set(component: str) -> None:
    """Batches of other widths, padded: positions from the end are each prompt's own."""
    model, oracle = model_and_oracle("gemma2")
    nnmodel = NNsight(model)
    first, second = random_prompts((5, 9), seed=6), random_prompts((6, 4, 3), seed=7)
    target = random_prompts((7, 7), seed=8)
    heads = [None] if oracle.heads(component) == [None] else [None, 1]
    places = [Place(component, layer, head, (1, 3)) for layer in (0, 2) for head in heads]
    sites = [Site.get_site(Gemma2, *place[:3], seq_pos=[-1, -3]) for place in places]
    batches = (lay_out(prompts, "mixed") for prompts in (first, second))
    # Backwards: it is for `cache_average` to put them in order.
    cache_average(model, sites[::-1], batches)
    for site, place in zip(sites, places, strict=True):
        with torch.no_grad(), nnmodel.trace(torch.tensor(target)):
            site.patch(nnmodel)
            patched = nnmodel.output.logits[:, -1].save()
        mean = oracle.mean_per_position(first + second)
        expected = [oracle.replaced(prompt, [place], mean) for prompt in target]
        torch.testing.assert_close(patched, torch.stack(expected), atol=ATOL, rtol=0)


# Metrics.


def largest(logits: torch.Tensor) -> torch.Tensor:
    return logits.max(-1).values


def from_target(logits: torch.Tensor, context: Any) -> torch.Tensor:
    return (logits - context.target_logits).norm(dim=-1) + context.source_logits[:, 0]


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_several_metrics_in_one_sweep(family: str, batch_size: int | None) -> None:
    model, oracle = model_and_oracle(family)
    pairs = Pairs(oracle, (7, 5, 4), (7, 5, 4), "right")
    rows = torch.arange(3)
    source = pairs.source_logits

    def kl(logits: torch.Tensor) -> torch.Tensor:
        ours, theirs = logits.log_softmax(-1), source.log_softmax(-1).expand_as(logits)
        return kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)

    direct = {
        "logit_difference": pairs.difference,
        "answer_probability": lambda x: x.softmax(-1)[..., rows, pairs.source_answers],
        "answer_log_probability": lambda x: (
            x[..., rows, pairs.source_answers] - x.exp().sum(-1).log()
        ),
        "kl_divergence": kl,
        "largest": lambda x: x.max(-1).values,
        "from_target": lambda x: (x - pairs.target_logits).norm(dim=-1) + source[:, 0],
    }
    out = activation_patching(
        model,
        None,
        Sites(["resid", "k"], seq_pos_type="last"),
        metric=[*list(direct)[:4], largest, from_target],
        batch_size=batch_size,
        **pairs.arguments,
    )
    assert out.metrics == tuple(direct)
    for name, metric in direct.items():
        seen = out.for_metric(name)
        of_source, of_target = metric(source), metric(pairs.target_logits)
        torch.testing.assert_close(seen.baseline.source, of_source, atol=ATOL, rtol=0)
        torch.testing.assert_close(seen.baseline.target, of_target, atol=ATOL, rtol=0)
        moved = []
        for component in ("resid", "k"):
            for layer in range(oracle.n_layers):
                for head in oracle.heads(component):
                    place = Place(component, layer, head, (1,))
                    pairs_of = zip(pairs.source, pairs.target, strict=True)
                    logits = torch.stack([oracle.patched(t, s, place) for s, t in pairs_of])
                    index = (layer, *(() if head is None else (head,)))
                    found, expected = seen.patched(component)[index], metric(logits)
                    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
                    value = (expected.mean() - of_target.mean()) / (
                        of_source.mean() - of_target.mean()
                    )
                    torch.testing.assert_close(seen[component][index], value, atol=1e-3, rtol=1e-3)
                    moved.append((expected - of_target).abs().mean())
        assert max(moved) > 100 * ATOL


def test_a_metric_of_one_answer_needs_no_other() -> None:
    model, oracle = model_and_oracle("llama")
    prompts = random_prompts((7, 5), seed=4)
    tokens, mask = lay_out(prompts, "right")
    answers = torch.tensor([8, 33])
    out = ablation_patching(
        model,
        None,
        Sites("mlp", seq_pos_type="last"),
        tokens,
        answers,
        attention_mask=mask,
        metric="answer_log_probability",
        progress=False,
    )
    for layer in range(oracle.n_layers):
        place = Place("mlp", layer, None, (1,))
        logits = torch.stack([oracle.replaced(each, [place], oracle.zeros) for each in prompts])
        expected = logits.log_softmax(-1)[torch.arange(2), answers]
        torch.testing.assert_close(out.patched("mlp")[layer], expected, atol=ATOL, rtol=0)
