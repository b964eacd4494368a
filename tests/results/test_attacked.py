"""Numbers that were wrong and nobody was told: each test is a fault that was found by looking."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from nnpatch_core import Outcome, Sites, activation_patching
from nnpatch_core.errors import OutcomeError, StatisticsWarning
from nnpatch_core.results import means_of
from nnpatch_core.testing import tiny_model
from tests.helpers.made import made

RANDOM = np.random.default_rng(0)
PROMPTS = 20
WHOLE = 4 + RANDOM.normal(0, 0.5, PROMPTS)
ONE = RANDOM.normal(1, 1, (2, PROMPTS))
#: Of the same prompts: almost what the first has.
TWIN = ONE + RANDOM.normal(0, 0.1, (2, PROMPTS))
APART = RANDOM.normal(1, 1, (2, PROMPTS))
OTHERS = list(range(500, 500 + PROMPTS))


def widths(figured: Any) -> Any:
    return figured.interval("mlp").width.numpy()


def reordered(out: Outcome, order: list[int]) -> Outcome:
    """The same sweep, its prompts in another order."""
    rows = torch.tensor(order)
    tokens = ("source_tokens", "source_mask", "target_tokens", "target_mask")
    prompts = {name: getattr(out.prompts, name)[rows] for name in tokens}
    return attrs.evolve(
        out,
        raw={
            metric: {name: each[:, rows] for name, each in raw.items()}
            for metric, raw in out.raw.items()
        },
        baselines={
            metric: attrs.evolve(each, source=each.source[rows], target=each.target[rows])
            for metric, each in out.baselines.items()
        },
        prompts=attrs.evolve(out.prompts, **prompts),
    )


@functools.cache
def sweep(*names: str) -> Outcome:
    source = torch.tensor([[5, 6, last] for last in range(10, 18)])
    target = torch.tensor([[5, 9, last] for last in range(10, 18)])
    answers = torch.full((8,), 1), torch.full((8,), 2)
    sites = Sites(list(names), seq_pos_type="each")
    return activation_patching(
        *(tiny_model("llama"), None, sites, source, target, *answers), progress=False
    )


# Which prompts are drawn together ---------------------------------------------------------------


def test_of_three_terms_those_of_the_same_prompts_are_drawn_together() -> None:
    one, twin = made(ONE, WHOLE), made(TWIN, WHOLE)
    other = made(APART, WHOLE, tokens=OTHERS)
    # Drawn by themselves, the errors of two that are almost one would be taken to cancel.
    mixed = (one + twin) / 2 - other
    alone = np.hypot(widths((one + twin) / 2), widths(other))
    np.testing.assert_allclose(widths(mixed), alone, rtol=0.06)
    np.testing.assert_allclose(
        mixed.band("mlp").width.numpy(), (one - other).band("mlp").width.numpy(), rtol=0.06
    )
    little = one - twin + 1e-4 * other
    np.testing.assert_allclose(widths(little), widths(one - twin), rtol=0.06)
    assert not mixed.paired
    assert repr(mixed).endswith("; 2 sets of prompts)")


def test_padding_makes_no_other_prompts() -> None:
    one = made(ONE, WHOLE)
    padded = {
        name: torch.nn.functional.pad(getattr(one.prompts, name), (2, 0))
        for name in ("source_tokens", "source_mask", "target_tokens", "target_mask")
    }
    wider = attrs.evolve(one, prompts=attrs.evolve(one.prompts, **padded))
    assert (one - wider).paired
    assert (widths(one - wider) == 0).all()
    assert (widths(wider) == widths(one)).all()


@pytest.mark.parametrize("start", [[1, 0], [5, 1, 0, 2, 3, 4], [0, 1]])
def test_a_prompt_that_occurs_twice_is_paired_by_what_its_runs_have(start: list[int]) -> None:
    # One prompt with two answers.
    out = made(ONE, WHOLE, tokens=[1, 1, *range(2, PROMPTS)])
    other = reordered(out, [*start, *range(len(start), PROMPTS)])
    assert (out - other).paired
    assert (widths(out - other) == 0).all()


def test_a_number_of_numpy_may_stand_on_the_left() -> None:
    one = made(ONE, WHOLE)
    for each in (one, one - made(TWIN, WHOLE)):
        torch.testing.assert_close((np.float64(0.5) * each)["mlp"], 0.5 * each["mlp"])
        with pytest.raises(TypeError):
            np.float64(0.5) + each


def test_outcomes_that_share_some_prompts_say_so() -> None:
    out = made(ONE, WHOLE)
    groups = out.by_group(["a"] * 10 + ["b"] * 10)
    for mixed in (out - groups["a"], out + groups["b"]):
        with pytest.warns(StatisticsWarning, match="^10 prompts are in outcomes that do not have"):
            mixed.interval("mlp")
        assert any("10 prompts are in outcomes" in note for note in mixed.top(1).notes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (groups["a"] - groups["b"]).interval("mlp")
        (out - made(TWIN, WHOLE)).interval("mlp")


def test_one_prompt_is_not_stable() -> None:
    out = made(ONE[:, :1], WHOLE[:1])
    with pytest.warns(StatisticsWarning, match="there is one prompt, which says nothing"):
        out.stability(1)
    with pytest.warns(StatisticsWarning, match="^with 1 prompt, 2 cells"):
        out.pvalues("mlp")


def test_cells_without_a_number_are_told() -> None:
    broken = ONE.copy()
    broken[0, 3] = np.nan
    out = made(broken, WHOLE)
    for kind in ("heatmap", "lines", "bars"):
        words = out.plot(kind=kind).get_supxlabel()
        assert "1 cell has no number: some prompts gave nan or inf there" in words, kind
        assert "no number" not in made(ONE, WHOLE).plot(kind=kind).get_supxlabel()
    nothing = made(np.full((2, PROMPTS), np.nan), WHOLE)
    assert str(nothing.stability(2)).startswith("No cell has a value that is a number.")
    assert "There are no p-values: runs gave nan or inf." in nothing.top(1).notes


def test_means_alone_know_a_denominator_that_may_be_zero() -> None:
    whole = RANDOM.normal(0.1, 1, PROMPTS)
    for out, infinite in ((made(ONE, whole), True), (made(ONE, WHOLE), False)):
        means = means_of(out)
        assert {row["high"] == np.inf for row in means.top(2)} == {infinite}
        assert any("Beware" in note for note in means.top(1).notes) == infinite
        for each in (out, means):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                frame = each.to_dataframe()
                needed = each.prompts_needed("mlp", 0.1)
            assert (frame["low"] == -np.inf).all() == infinite
            assert bool(needed.isinf().all()) == infinite
            # A table has its ends to say so; a number of prompts has not.
            assert [one.category for one in told] == [StatisticsWarning] * infinite
    sizes = made(ONE, whole, scale="change")
    assert means_of(sizes).top(1)[0]["high"] < np.inf


# What is printed --------------------------------------------------------------------------------


def test_a_token_sends_nothing_to_the_terminal() -> None:
    out = sweep("attn")
    texts = {5: "a", 6: "\x1b[31m", 9: "\t\u202e", **dict.fromkeys(range(10, 18), "\u4e2d\u6587")}
    out = attrs.evolve(out, prompts=attrs.evolve(out.prompts, strings=texts))
    stable = out.stability(6, distinct=False, resamples=100)
    printed = [*str(stable).split("\n"), *str(out.top(6)).split("\n")]
    assert all(line.isprintable() for line in printed)
    assert "\u202e" not in stable._repr_html_()
    # A wide letter takes two places.
    lines = [line for line in str(stable).split("\n") if line.startswith("attn")]
    wide = [len(line) + line.count("\u4e2d") + line.count("\u6587") for line in lines]
    assert len(set(wide)) == 1, lines


def test_small_values_are_told_as_they_are() -> None:
    out = sweep("attn")
    raw = {"given": {"attn": 1e-6 * (out.raw[out.metric]["attn"] - out.baseline.target)}}
    nothing = torch.zeros(8)
    small = attrs.evolve(
        out,
        scale="change",
        raw=raw,
        baselines={"given": attrs.evolve(out.baseline, source=nothing, target=nothing)},
        metric="given",
    )
    assert 0 < small["attn"].abs().max().item() < 1e-3
    # Both the values and their ends.
    for told in (
        str(small.stability(2, resamples=100)),
        small._repr_html_(),
        *small.plot(interactive=True).data[0].customdata[0],
        *small.plot(kind="bars", interactive=True).data[0].customdata[:3],
    ):
        assert "0.000" not in told.replace("<br>0.000", "")
        assert "e-0" in told or "<br>0.000" in told


def test_a_metric_sends_nothing_to_the_terminal() -> None:
    out = sweep("attn")
    evil = "m\x1b[31m\n"
    named = attrs.evolve(
        out,
        raw={evil: out.raw[out.metric]},
        baselines={evil: out.baseline},
        metric=evil,
    )
    for told in (repr(named), repr(named - named), *str(named.top(1)).split("\n")):
        assert told.isprintable()


# Pictures ---------------------------------------------------------------------------------------


def labels_of_bars(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_bars_are_of_the_layers_and_positions_that_are_asked_for() -> None:
    out = sweep("attn", "mlp")
    for layers, positions in (([2], None), (None, [1]), ([0, 2], [2])):
        chosen = out.sel(layer=layers, position=positions)
        found = out.plot(kind="bars", layers=layers, positions=positions)
        assert labels_of_bars(found) == labels_of_bars(chosen.plot(kind="bars"))
        page = out.plot(kind="bars", layers=layers, positions=positions, interactive=True)
        assert len(page.data[0].x) == len(labels_of_bars(found))
    with pytest.raises(OutcomeError, match="nothing was swept in these layers and positions"):
        out.sel(position=2).plot(kind="bars", positions=[1])


def test_a_position_that_is_asked_for_is_the_one_that_is_drawn() -> None:
    heads = sweep("q").sel(position=2)
    (panel, *_) = heads.plot(positions=[1]).axes
    assert panel.get_title().startswith("q [1] ")
    assert np.isnan(np.ma.filled(panel.images[0].get_array(), np.nan)).all()


def test_an_empty_title_is_no_title() -> None:
    out = sweep("attn")
    assert out.plot(title="").get_suptitle() == ""
    assert out.plot(title="", interactive=True).layout.title.text == ""
    assert out.plot_beside(out, title="").get_suptitle() == ""


def test_colours_that_end_before_the_values_say_so() -> None:
    out = sweep("attn")
    largest = out["attn"].abs().max().item()
    assert largest > 0.1
    words = out.plot(limit=0.1).axes[-1].get_ylabel().replace("\n", " ")
    assert words.endswith(f"the largest is {largest:.3g}")


def test_a_token_is_no_template() -> None:
    out = sweep("attn")
    texts = {5: "%{y}", 6: "%{x}", 9: "%{z}", **dict.fromkeys(range(10, 18), "%{customdata}")}
    out = attrs.evolve(out, prompts=attrs.evolve(out.prompts, strings=texts))
    own = {"title": "%{z}", "labels": ("%{y}", "%{z}")}
    lines = out.plot(kind="lines", interactive=True)
    for page in (lines, out.plot(interactive=True), out.plot_beside(out, interactive=True, **own)):
        for trace in page.data:
            template = (trace.hovertemplate or "").replace("%{customdata}<extra>", "<extra>")
            assert "%{" not in template.replace("layer %{x}", "")
    assert any("&#37;{x}" in (trace.hovertemplate or "") for trace in lines.data)
