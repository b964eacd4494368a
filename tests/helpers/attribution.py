"""Attribution as nnpatch estimates it, and as its oracle does, of the same prompts."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core import Outcome, attribution_patching
from nnpatch_core.errors import EstimateWarning
from nnpatch_core.testing import tiny_model
from tests.helpers.attribution_oracle import AttributionOracle, Wide
from tests.helpers.oracle import Donor, Place, Prompt, lay_out, part_spanned, random_prompts
from tests.helpers.pairs import VARIANTS, Pairs

#: In float64 the oracle is met to 1e-13; most effects lie between 1e-3 and 10.
ATOL, RTOL = 1e-11, 1e-9
LAYERS = 3


@contextmanager
def wide() -> Iterator[None]:
    """Whatever a model in float64 does is done in float64, nnpatch's own numbers included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def told(sites: Any, options: dict[str, Any]) -> Iterator[None]:
    """The QK fix alone says it where no site is a query or a key, and only there."""
    of = [site for cell in getattr(sites, "sites", ()) for site in cell.sites]
    names = {site.component for site in of} if of else {*sites.site_names}
    alone = options.get("qk_fix") is True and not options.get("grad_drop")
    if not alone or names & {"q", "k"}:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Where the sweep is refused before that, the error is what there is to tell.
        yield
    own = [each for each in caught if each.category is EstimateWarning]
    assert any("qk_fix=True changes nothing without q or k" in str(each.message) for each in own)
    for each in caught:
        if each.category is not EstimateWarning:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@functools.cache
def model_and_oracle(variant: str, layers: int = LAYERS) -> tuple[Any, AttributionOracle]:
    """A tiny model in float64, with the attention of the oracle."""
    _, family, key_value, config = VARIANTS[variant]
    sizes = {"num_key_value_heads": key_value, "num_hidden_layers": layers}
    model = tiny_model(family, **sizes, **dict(config))
    oracle = AttributionOracle(model, family)
    model.double().set_attn_implementation("eager")
    return model, oracle


# Metrics, as nnpatch takes them and as the oracle does.


def bent(logits: Tensor, context: Any) -> Tensor:
    """Neither linear nor blind to any logit."""
    numbers = torch.arange(len(logits))
    first = logits.log_softmax(-1)[numbers, context.source_answer_index]
    return first - logits[numbers, context.target_answer_index] ** 2 / 8


@functools.cache
def scalar(name: str, answer: int, other: int, compared: tuple[float, ...]) -> Callable:
    """The metric of one prompt; `compared` are the logits of the run to compare with."""
    there = torch.tensor(compared, dtype=torch.float64)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "bent": lambda logits: logits.log_softmax(-1)[answer] - logits[other] ** 2 / 8,
        "logit_difference": lambda logits: logits[answer] - logits[other],
        "answer_probability": lambda logits: logits.exp()[answer] / logits.exp().sum(),
        "answer_log_probability": lambda logits: logits[answer] - logits.logsumexp(0),
        "kl_divergence": lambda logits: (
            there.softmax(0) * (there.log_softmax(0) - logits.log_softmax(0))
        ).sum(),
    }
    return kinds[name]


METRICS = (
    "bent",
    "logit_difference",
    "answer_probability",
    "answer_log_probability",
    "kl_divergence",
)


def metric_of(name: str) -> Any:
    """What nnpatch is given."""
    return bent if name == "bent" else name


@attrs.frozen
class Runs:
    """Prompts, and what is estimated of them: by nnpatch, and by the oracle."""

    pairs: Pairs
    layers: int = LAYERS
    #: Of an ablation, or None for a source run.
    ablation: str | None = None
    reference: tuple[Prompt, ...] = ()
    per_position: bool = False

    @property
    def model(self) -> Any:
        return model_and_oracle(self.pairs.variant, self.layers)[0]

    @property
    def oracle(self) -> AttributionOracle:
        return model_and_oracle(self.pairs.variant, self.layers)[1]

    @property
    def given(self) -> dict[str, Any]:
        """What stands where, for attribution."""
        pairs = self.pairs
        target, target_mask = lay_out(pairs.target, pairs.layout, pairs.width, seed=4)
        if self.ablation is not None:
            found: dict[str, Any] = {
                "source_tokens": None,
                "target_tokens": target,
                "target_attention_mask": target_mask,
                "ablation": self.ablation,
            }
            if self.ablation == "mean":
                found["per_position"] = self.per_position
                if self.reference:
                    found["reference"] = [lay_out(self.reference, "mixed")]
            return found
        source, source_mask = lay_out(pairs.source, pairs.layout, pairs.width, seed=3)
        return {
            "source_tokens": source,
            "target_tokens": target,
            "source_attention_mask": source_mask,
            "target_attention_mask": target_mask,
        }

    @property
    def sources(self) -> list[Any]:
        """What the oracle takes for each prompt."""
        prompts = list(self.reference or self.pairs.target)
        if self.ablation is None:
            return list(self.pairs.source)
        donor: Donor = self.oracle.zeros
        if self.ablation != "zero" and self.per_position:
            donor = self.oracle.mean_per_position(prompts)
        elif self.ablation != "zero":
            donor = self.oracle.mean(prompts)
        return [donor] * len(self.pairs.target)

    def estimate(self, sites: Any, metric: Any = "bent", **options: Any) -> Outcome:
        # Weights that are drawn in float64 are others.
        model = options.pop("model", None) or self.model
        with wide(), told(sites, options):
            return attribution_patching(
                model,
                options.pop("api", self.pairs.api),
                sites,
                source_answer_index=self.pairs.answers[0],
                target_answer_index=self.pairs.answers[1],
                metric=metric_of(metric) if isinstance(metric, str) else metric,
                progress=False,
                **{**self.given, **options},
            )

    def patch(self, sites: Any, metric: Any = "bent", **options: Any) -> Outcome:
        """The exact sweep."""
        model = options.pop("model", None) or self.model
        with wide():
            return self.pairs.sweep(sites, "full", model, metric=metric_of(metric), **options)

    def metrics(self, name: str) -> list[Callable[[Tensor], Tensor]]:
        """Of each prompt."""
        found = []
        answers = (each.tolist() for each in self.pairs.answers)
        compared = self.pairs.target if self.ablation else self.pairs.source
        for answer, other, prompt in zip(*answers, compared, strict=True):
            logits = tuple(self.oracle.logits(prompt).tolist()) if name == "kl_divergence" else ()
            found.append(scalar(name, answer, other, logits))
        return found

    def length(self, row: int) -> int:
        """How many tokens of a prompt can be patched, from its end."""
        own = len(self.pairs.target[row])
        if self.ablation is None:
            return min(own, len(self.pairs.source[row]))
        if self.ablation == "mean" and self.per_position:
            return min(own, max(map(len, self.reference or self.pairs.target)))
        return own

    def cells(self, out: Outcome, sites: Any) -> Iterator[tuple[str, int, list[Place]]]:
        """Each cell's name, number and places; those that are padding everywhere are left out."""
        width = self.pairs.width
        lengths = [self.length(row) for row in range(len(self.pairs.target))]
        for name, grid in sites.grids(self.model, self.pairs.api, width).items():
            numbers = {
                tuple(index): row for row, index in enumerate(out.cells[name].index.tolist())
            }
            for index, cell in zip(map(tuple, grid.index.tolist()), grid.sites, strict=True):
                groups = [(site, site.group(width)) for site in cell.sites]
                seen = any(width - at <= max(lengths) for _, group in groups for at in group)
                assert (index in numbers) == seen
                if seen:
                    places = [
                        Place(
                            each.component,
                            each.layer,
                            each.head,
                            tuple(width - at for at in on),
                            part_spanned(each.subspace),
                        )
                        for each, on in groups
                    ]
                    yield name, numbers[index], places


#: Of an oracle, for a prompt, what is put there, the places of a cell, and a metric.
Expected = Callable[[AttributionOracle, Prompt, Any, list[Place], Any], float]


def plain(
    oracle: AttributionOracle, target: Prompt, source: Any, places: list[Place], metric: Any
) -> float:
    if len(places) > 1:
        return oracle.joint(target, source, places, metric)
    return oracle.first_order(target, source, places[0], metric)


def along(steps: int) -> Expected:
    return lambda oracle, target, source, places, metric: oracle.integrated(
        target, source, places[0], metric, steps
    )


def fixed(
    oracle: AttributionOracle, target: Prompt, source: Any, places: list[Place], metric: Any
) -> float:
    (place,) = places
    estimate = oracle.qk_fixed if place.component in ("q", "k") else oracle.first_order
    return estimate(target, source, place, metric)


def dropped(
    oracle: AttributionOracle, target: Prompt, source: Any, places: list[Place], metric: Any
) -> float:
    return oracle.grad_drop(target, source, places[0], metric)


def star(
    oracle: AttributionOracle, target: Prompt, source: Any, places: list[Place], metric: Any
) -> float:
    return oracle.star(target, source, places[0], metric)


#: How each method is asked for, and what it must give.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"steps": 3},
    "QK fix": {"qk_fix": True},
    "GradDrop": {"grad_drop": True},
    "AtP*": {"qk_fix": True, "grad_drop": True},
}
EXPECTED: dict[str, Expected] = {
    "plain": plain,
    "steps": along(3),
    "QK fix": fixed,
    "GradDrop": dropped,
    "AtP*": star,
}


def check(out: Outcome, runs: Runs, sites: Any, expected: Expected, metric: str = "bent") -> Tensor:
    """Every prompt of every cell is what the oracle says; gives all of that."""
    metrics, oracle, sources = runs.metrics(metric), runs.oracle, runs.sources
    targets = runs.pairs.target
    before = torch.stack(
        [each(oracle.logits(prompt)) for each, prompt in zip(metrics, targets, strict=True)]
    )
    close = functools.partial(torch.testing.assert_close, rtol=RTOL, atol=ATOL)
    close(out.baseline.target, before)
    source = before
    if runs.ablation is None:
        pairs = zip(metrics, sources, strict=True)
        source = torch.stack([each(oracle.logits(prompt)) for each, prompt in pairs])
    close(out.baseline.source, source)
    scale = float((source - before).mean()) if runs.ablation is None else 1.0
    effects = []
    for name, number, places in runs.cells(out, sites):
        effect = torch.tensor(
            [
                expected(oracle, target, donor, places, each)
                for target, donor, each in zip(targets, sources, metrics, strict=True)
            ],
            dtype=torch.float64,
        )
        cells = out.cells[name]
        at = tuple(cells.index[number].tolist())
        close(out.patched(name)[at] - before, effect)
        here = [
            any(back <= runs.length(row) for place in places for back in place.from_end)
            for row in range(len(targets))
        ]
        assert cells.present[number].tolist() == here
        shown = effect.clone() if runs.ablation is not None else effect / (source - before)
        if out.magnitude:
            shown = shown.abs()
        shown[~torch.tensor(here)] = torch.nan
        own = out.per_prompt(name)[at]
        finite = (source != before) | (runs.ablation is not None)
        torch.testing.assert_close(own[finite], shown[finite], rtol=1e-7, atol=1e-9, equal_nan=True)
        moved = effect.abs().mean() / abs(scale) if out.magnitude else effect.mean() / scale
        # The values are in float32; how large they are is in the unit of the largest effect.
        atol = 1e-6 * max(1.0, float(effect.abs().max() / abs(scale)))
        torch.testing.assert_close(out[name][at].double(), moved, rtol=1e-6, atol=atol)
        effects.append(effect)
    return torch.stack(effects)


def runs_of(variant: str, target: tuple[int, ...], source: tuple[int, ...], **more: Any) -> Runs:
    """Random prompts of these lengths, with padding on both sides."""
    prompts = random_prompts(source, seed=1), random_prompts(target, seed=2)
    return Runs(Pairs(variant, *prompts, more.pop("layout", "mixed")), **more)


def check_laid(found: Outcome, exact: Outcome) -> None:
    """The same grid, labels, prompts and unpatched runs."""
    assert list(found) == list(exact)
    assert (found.scale, found.metrics) == (exact.scale, exact.metrics)
    for name in exact:
        assert found.axes(name) == exact.axes(name)
        assert torch.equal(found.cells[name].index, exact.cells[name].index)
        assert torch.equal(found.cells[name].present, exact.cells[name].present)
    for mine, other in zip(
        attrs.astuple(found.baseline), attrs.astuple(exact.baseline), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    assert found.tokens == exact.tokens
    assert torch.equal(found.prompts.source_mask, exact.prompts.source_mask)
    agreed = found.agreement(exact)
    assert list(agreed.sites) == list(exact)
    assert found.estimated
    assert not exact.estimated
