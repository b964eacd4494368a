"""Cells that cannot be told from 0 are washed out, and a picture says why it washes out none."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from nnpatch_core import Outcome
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import Moments
from nnpatch_core.results.pictures.colours import DIVERGING, washed
from nnpatch_core.sites import Axis
from tests.helpers.made_up import PLAIN, layer_axis, outcome, position_axis

BLOCKS = dict.fromkeys(("resid", "attn"), (layer_axis(), position_axis()))
BOTH = pytest.mark.parametrize("interactive", [False, True])


def note(figure: Any) -> str:
    if isinstance(figure, Figure):
        return figure.get_supxlabel()
    return " ".join(figure.layout.title.subtitle.text.split("<br>"))


def pale(figure: Any) -> list[Any]:
    """For each panel which of its cells are washed out, bool."""
    if isinstance(figure, Figure):
        return [
            ~np.ma.getmaskarray(axis.images[1].get_array())
            for axis in figure.axes
            if len(axis.images) > 1
        ]
    return [
        np.isfinite(np.array(each.z, dtype=float))
        for each in figure.data
        if each.type == "heatmap" and each.coloraxis == "coloraxis2"
    ]


@BOTH
@settings(deadline=None, max_examples=10)
@given(noise=st.floats(0.05, 1.0), seed=st.integers(0, 5))
def test_what_a_band_holds_is_washed_out(interactive: bool, noise: float, seed: int) -> None:
    out = outcome(BLOCKS, noise=noise, seed=seed, batch=12)
    figure = out.plot(interactive=interactive, crop=False)
    bands = out.band()
    for found, name in zip(pale(figure), out, strict=True):
        expected = bands[name].holds(0.0) & ~out.elided(name)
        assert np.array_equal(found, expected.numpy())
    assert note(figure) == "washed out: the 95 % band over all 264 cells holds 0"


def test_the_band_is_over_what_is_drawn() -> None:
    out = outcome(BLOCKS)
    assert "over all 264 cells" in note(out.plot())
    assert "over all 132 cells" in note(out.plot(sites=["attn"]))
    assert "the 80 % band" in note(out.plot(mute=0.8))


@BOTH
def test_where_all_is_sure_it_says_so(interactive: bool) -> None:
    out = outcome({"resid": (layer_axis(),)}, noise=0.001)
    raw = {"logit_difference": {"resid": out.raw["logit_difference"]["resid"] + 3}}
    sure = attrs.evolve(out, raw=raw)
    figure = sure.plot(interactive=interactive, kind="heatmap")
    assert note(figure) == "the 95 % band over all 12 cells holds 0 in none of them"
    assert not pale(figure)


def few() -> Outcome:
    return outcome(BLOCKS, batch=5)


def means() -> Outcome:
    out = outcome(BLOCKS)
    one = {
        metric: {name: raw.mean(1, keepdim=True) for name, raw in by_name.items()}
        for metric, by_name in out.raw.items()
    }
    return attrs.evolve(out, moments=Moments.of(out), raw=one)


def sizes() -> Outcome:
    return outcome(BLOCKS).magnitudes()


def no_gap() -> Outcome:
    """Source and target run differ by either sign."""
    out = outcome(BLOCKS)
    baseline = out.baseline
    gap = torch.where(torch.arange(32) % 2 == 0, 1.0, -0.9)
    moved = attrs.evolve(baseline, source=baseline.target + gap)
    return attrs.evolve(out, baselines={out.metric: moved})


@BOTH
@pytest.mark.parametrize("kind", ["heatmap", "lines", "bars"])
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (few, "5 prompts are too few at 95 %, it takes 6"),
        (means, "only means of the 32 prompts were kept"),
        (sizes, "sizes are above 0 without any effect"),
        (no_gap, "the source and the target run may not differ at all"),
    ],
)
def test_where_nothing_is_known_it_says_why(
    make: Any, why: str, kind: Any, interactive: bool
) -> None:
    figure = make().plot(interactive=interactive, kind=kind)
    what = {"heatmap": "nothing is washed out", "lines": "no bands", "bars": "no error bars"}[kind]
    assert f"{what}: {why}" in note(figure)
    assert not pale(figure)
    nothing = make().plot(interactive=interactive, kind=kind, mute=None)
    assert why not in note(nothing)


def test_six_prompts_are_enough() -> None:
    assert "too few" not in note(outcome(BLOCKS, batch=6).plot())
    assert "it takes 8" in note(outcome(BLOCKS, batch=7).plot(mute=0.99))


def test_a_washed_out_colour_is_paler_and_keeps_its_side() -> None:
    for colour in DIVERGING:
        light = washed(colour)
        assert all(int(light[at : at + 2], 16) > 150 for at in (1, 3, 5))
    red, blue = washed(DIVERGING[0]), washed(DIVERGING[-1])
    assert int(red[1:3], 16) > int(red[5:7], 16)
    assert int(blue[1:3], 16) < int(blue[5:7], 16)


def test_a_page_tells_a_band_under_the_mouse() -> None:
    out = outcome({"resid": (layer_axis(), position_axis())})
    told = out.plot(interactive=True).data[0].customdata
    low, high = out.band("resid")
    value = out["resid"][2, 3].item()
    assert told[2][3] == f"2, Paul|John<br>{value:.3f} ({low[2, 3]:.3f} to {high[2, 3]:.3f})"
    assert told[2][0].endswith("<br>0.000"), "what is known has no band"


@BOTH
@pytest.mark.parametrize("kind", ["heatmap", "lines", "bars"])
@pytest.mark.parametrize("mute", [None, 0.95])
def test_a_cell_that_is_nan_is_told(kind: Any, interactive: bool, mute: Any) -> None:
    out = outcome(BLOCKS)
    out.raw[out.metric]["attn"][100, 3] = torch.nan
    figure = out.plot(kind=kind, interactive=interactive, mute=mute)
    assert "1 cell has no number" in note(figure)
    out.raw[out.metric]["resid"][60, 3] = torch.nan
    assert "2 cells have no number" in note(out.plot(kind=kind, interactive=interactive, mute=mute))


# Two outcomes ------------------------------------------------------------------------------------


def titles(figure: Any) -> list[str]:
    if isinstance(figure, Figure):
        return [axis.get_title() for axis in figure.axes if axis.get_title()]
    return [each.text for each in figure.layout.annotations]


def grids(figure: Any) -> list[Any]:
    """The numbers of each panel."""
    if isinstance(figure, Figure):
        return [
            np.ma.filled(axis.images[0].get_array(), np.nan) for axis in figure.axes if axis.images
        ]
    return [np.array(each.z, dtype=float) for each in figure.data if each.customdata is not None]


@BOTH
def test_two_outcomes_and_their_difference(interactive: bool) -> None:
    one, other = outcome(BLOCKS), outcome(BLOCKS, seed=1, kind="attribution")
    figure = one.plot_beside(other, interactive=interactive, crop=False)
    assert titles(figure) == [
        f"{site}: {words}"
        for site in BLOCKS
        for words in ("activation", "attribution", "activation − attribution")
    ]
    shown = grids(figure)
    for number, site in enumerate(BLOCKS):
        row = shown[3 * number : 3 * number + 3]
        expected = (one[site], other[site], one[site] - other[site])
        for found, grid in zip(row, expected, strict=True):
            assert np.allclose(found, grid.numpy(), atol=1e-6)
    bands = (one - other).band()
    washed_out = pale(figure)
    assert np.array_equal(washed_out[2], (bands["resid"].holds(0.0) & ~one.elided("resid")).numpy())


def test_a_difference_may_have_a_scale_of_its_own() -> None:
    one, other = outcome(BLOCKS), outcome(BLOCKS, seed=1)
    layout = one.plot_beside(
        other, interactive=True, limit_difference="largest", labels=("mine", "theirs")
    ).layout
    largest = max((one[name] - other[name]).abs().max().item() for name in BLOCKS)
    assert layout.coloraxis3.cmax == pytest.approx(largest, rel=1e-5)
    assert layout.coloraxis.cmax >= 1
    assert layout.coloraxis3.colorbar.title.text == "mine − theirs"
    figure = one.plot_beside(other, limit_difference="largest")
    bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
    assert len(bars) == 2


@BOTH
def test_a_combination_draws_itself(interactive: bool) -> None:
    one, other = outcome(BLOCKS), outcome(BLOCKS, seed=1, kind="attribution")
    error = other - one
    figure = error.plot(interactive=interactive, crop=False, values=False)
    assert np.allclose(grids(figure)[0], error["resid"].numpy(), atol=1e-6)
    assert "washed out" in note(figure)
    words = (
        figure.layout.coloraxis.colorbar.title.text if interactive else figure.axes[-1].get_ylabel()
    )
    assert " ".join(words.replace("<br>", "\n").split()).startswith(
        "attribution - activation, restored"
    )


def test_outcomes_that_do_not_stand_beside_each_other() -> None:
    one = outcome(BLOCKS)
    with pytest.raises(OutcomeError, match="an outcome stands beside another, got 3"):
        one.plot_beside(3)
    with pytest.raises(OutcomeError, match="no site is in both"):
        one.plot_beside(outcome({"mlp": (layer_axis(), position_axis())}))
    with pytest.raises(OutcomeError, match="scale"):
        one.plot_beside(outcome(BLOCKS, scale="change"))
    with pytest.raises(OutcomeError, match="'resid'"):
        one.plot_beside(outcome(dict.fromkeys(BLOCKS, (layer_axis(6), position_axis()))))
    with pytest.raises(OutcomeError, match="labels must be two texts, got 'ab'"):
        one.plot_beside(outcome(BLOCKS), labels="ab")
    with pytest.raises(OutcomeError, match="limit_difference must be"):
        one.plot_beside(outcome(BLOCKS), limit_difference=-1)


def test_each_column_says_how_sure_it_is() -> None:
    one, same, less = outcome(BLOCKS), outcome(BLOCKS, seed=1), outcome(BLOCKS, batch=3)
    words = "washed out: the 95 % band over all 264 cells of a column holds 0"
    assert note(one.plot_beside(same)).endswith(words)
    few = "3 prompts are too few at 95 %, it takes 6"
    assert note(one.plot_beside(less)).endswith(
        f"{words}; nothing is washed out in other, one − other: {few}"
    )
    assert note(less.plot_beside(less)).endswith(f"nothing is washed out: {few}")
    assert "washed out" not in note(one.plot_beside(less, mute=None))


def test_lists_beside_each_other() -> None:
    listed = {"mine": (Axis("site", ("a", "b", "c")),)}
    figure = outcome(listed).plot_beside(outcome(listed, seed=2))
    assert titles(figure) == ["mine: one", "mine: other", "mine: one − other"]


def test_prompts_of_other_tokens_stand_beside_each_other() -> None:
    one = outcome(BLOCKS)
    tokens = [*PLAIN[:-1], " for"]
    figure = one.plot_beside(outcome(BLOCKS, tokens, seed=3), crop=False)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[-1] == "13 to|for"
