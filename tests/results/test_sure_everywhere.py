"""How sure values are, for every entry point, however its prompts were run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nnpatch_core import (
    Outcome,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.testing import tiny_model
from tests.helpers.statistics_oracle import residuals, standard_error, studentised

PROMPTS, DRAWS = 12, 400
SOURCE = torch.tensor([[5, 6, 7, last] for last in range(10, 10 + PROMPTS)])
TARGET = torch.tensor([[5, 9, 7, last] for last in range(10, 10 + PROMPTS)])
ANSWERS = torch.full((PROMPTS,), 1), torch.full((PROMPTS,), 2)
SITES = Sites(["mlp", "k", "resid"], seq_pos_type="each")
#: The same prompts, some of them shorter: the first token is padding.
MASK = torch.ones_like(SOURCE)
MASK[[2, 7], 0] = 0


def swept(kind: str, **options: Any) -> Outcome:
    model, own = tiny_model("llama"), {"progress": False, **options}
    if kind.startswith("ablation"):
        value = kind.partition(" ")[2]
        if value == "mean":
            own |= {"reference": SOURCE}
        if value == "resample":
            own |= {"seed": 3}
        return ablation_patching(
            model, None, SITES, TARGET, ANSWERS[1], ANSWERS[0], method=value, **own
        )
    if kind == "attribution":
        return attribution_patching(model, None, SITES, SOURCE, TARGET, *ANSWERS, **own)
    if kind == "screen":
        own |= {"screen": "attribution", "top_k": 4}
    return activation_patching(model, None, SITES, SOURCE, TARGET, *ANSWERS, **own)


KINDS = (
    "activation",
    "attribution",
    "screen",
    "ablation zero",
    "ablation mean",
    "ablation resample",
)


def figures(out: Any) -> dict[str, Any]:
    found = {
        "low": {name: ends.low for name, ends in out.interval(resamples=DRAWS).items()},
        "high": {name: ends.high for name, ends in out.interval(resamples=DRAWS).items()},
        "band": {name: ends.low for name, ends in out.band(flips=DRAWS).items()},
    }
    if not out.estimated or out.screening is not None:
        found["p"] = out.pvalues(flips=DRAWS)
    return found


@pytest.mark.filterwarnings("ignore::nnpatch_core.errors.PromptWarning")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_engines_change_nothing(kind: str, padded: bool) -> None:
    options: dict[str, Any] = {"attention_mask": MASK} if padded else {}
    first = swept(kind, **options)
    plain = figures(first)
    # The sign of what is rounding is another one each time.
    told = {name: first[name].abs() > 1e-5 for name in first}
    others = [{"batch_size": 5}, {"memory_budget": "1 MiB"}]
    if kind.startswith(("activation", "ablation")):
        others.append({"engine": "full"})
    for other in others:
        for figure, by_name in figures(swept(kind, **options, **other)).items():
            for name, values in by_name.items():
                rows = told[name]
                if "engine" not in other:
                    assert torch.equal(values.isnan(), plain[figure][name].isnan())
                torch.testing.assert_close(
                    values[rows], plain[figure][name][rows], rtol=1e-3, atol=5e-3, equal_nan=True
                )


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_of_the_numbers_of_each_prompt(kind: str) -> None:
    out = swept(kind)
    whole = out.baseline.source - out.baseline.target
    shares = None if out.scale == "change" else whole.double().tolist()
    low, high = out.band("mlp", flips=DRAWS)
    reaches = set()
    for place in out.swept("mlp").nonzero().tolist():
        cell = tuple(place)
        change = (out.patched("mlp")[cell] - out.baseline.target).double().tolist()
        if out.elided("mlp")[cell] or out.unread("mlp")[cell]:
            assert low[cell] == high[cell] == out["mlp"][cell]
            continue
        error = standard_error(change, shares)
        if max(map(abs, residuals(change, shares))) < 1e-5:
            continue
        assert out.standard_error("mlp")[cell].item() == pytest.approx(error, rel=1e-4)
        reaches.add(round(((high - low)[cell].item() / 2 / error), 3))
        # Of one cell alone the p-value is about its own statistic.
        if not out.estimated:
            p_value = out.pvalues("mlp", None, flips=DRAWS)[cell].item()
            random = np.random.default_rng(1)
            seen = abs(studentised(change, [1.0] * PROMPTS)) * (1 - 1e-9)
            flips = random.choice([-1.0, 1.0], (400, PROMPTS))
            share = np.mean([abs(studentised(change, list(each))) >= seen for each in flips])
            assert p_value == pytest.approx(share, abs=0.1)
    # Every cell's band reaches as many of its standard errors.
    assert len(reaches) == 1, reaches


@pytest.mark.parametrize("kind", ["activation", "attribution", "ablation zero"])
def test_groups_are_as_sure_as_their_prompts_swept_alone(kind: str) -> None:
    whole = swept(kind)
    group = whole.by_group(["a"] * 6 + ["b"] * 6)["b"]
    model = tiny_model("llama")
    rows = slice(6, None)
    pair = (SOURCE[rows], TARGET[rows], ANSWERS[0][rows], ANSWERS[1][rows])
    if kind == "activation":
        alone = activation_patching(model, None, SITES, *pair, progress=False)
    elif kind == "attribution":
        alone = attribution_patching(model, None, SITES, *pair, progress=False)
    else:
        alone = ablation_patching(
            model, None, SITES, pair[1], pair[3], pair[2], method="zero", progress=False
        )
    for name, ends in group.interval(resamples=DRAWS).items():
        others = alone.interval(name, resamples=DRAWS)
        torch.testing.assert_close(ends.low, others.low, rtol=1e-3, atol=1e-3, equal_nan=True)
        torch.testing.assert_close(ends.high, others.high, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_means_have_errors_and_no_draws() -> None:
    out = swept("activation", keep="means")
    plain = swept("activation")
    for ask in (out.interval, out.band, out.pvalues, out.stability):
        with pytest.raises(OutcomeError, match="keep='prompts'"):
            ask()
    for figure in (lambda o: o.standard_error("mlp"), lambda o: o.prompts_needed("mlp", 0.2)):
        one, other = figure(out), figure(plain)
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_one_prompt_says_nothing_and_says_so(kind: str) -> None:
    out = swept(kind).by_group([1] + [0] * 11)[1]
    for ask in (out.interval, out.band):
        with pytest.warns(StatisticsWarning, match="one prompt"):
            low, high = ask("mlp")
        there = out.swept("mlp")
        assert (low[there] == -torch.inf).all()
        assert (high[there] == torch.inf).all()


def test_p_values_are_of_what_was_measured() -> None:
    with pytest.raises(OutcomeError, match=r"no cell of .* was measured"):
        swept("attribution").pvalues()
    screened = swept("screen")
    for name, values in screened.pvalues(flips=DRAWS).items():
        measured = screened.exact(name) & ~screened.elided(name) & ~screened.unread(name)
        assert torch.equal(values.isfinite(), measured)
    with pytest.raises(OutcomeError, match="sizes have no p-values"):
        swept("activation").magnitudes().pvalues("mlp")
    sizes = swept("activation").magnitudes()
    low, high = sizes.interval("mlp", resamples=DRAWS)
    inside = (low <= sizes["mlp"]) & (sizes["mlp"] <= high)
    assert inside.float().mean() > 0.9
