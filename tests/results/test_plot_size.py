"""Pictures that fit and do not shout: their width, what is left out, and the scale of colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpatch_core import (
    Outcome,
    Site,
    Sites,
    ablation_patching,
    activation_patching,
    attribution_patching,
)
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.layout import lay_out
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.testing import tiny_api, tiny_model

ANSWERS = torch.tensor([1]), torch.tensor([2])
THREE = Sites(["resid", "attn", "mlp"], seq_pos_type="each")


def outcome(
    length: int,
    differs: int,
    sites: Sites = THREE,
    sweep: Callable[..., Any] = attribution_patching,
    **options: Any,
) -> Outcome:
    """A pair of prompts that differ in one token."""
    target = torch.arange(length)[None] % 50 + 3
    source = target.clone()
    source[0, differs] += 1
    return sweep(
        tiny_model(), tiny_api(), sites, source, target, *ANSWERS, progress=False, **options
    )


def scaled(out: Outcome, largest: float) -> Outcome:
    """The same outcome with smaller effects."""
    target = out.baseline.target
    factor = largest / max(out[name].abs().max().item() for name in out)
    raw = {name: target + factor * (out.raw[out.metric][name] - target) for name in out}
    return attrs.evolve(out, raw={out.metric: raw})


def plot(out: Outcome, **options: Any) -> Any:
    """A picture whose note is about what is left out alone: of one prompt nothing is sure."""
    return out.plot(**{"mute": None, "values": False, **options})


def panels(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.images]


def texts(figure: Any) -> tuple[str, str]:
    """What a matplotlib or plotly figure says below or above its panels, and beside the colours."""
    if isinstance(figure, matplotlib.figure.Figure):
        note, legend = figure.get_supxlabel(), figure.axes[-1].get_ylabel()
    else:
        note = figure.layout.title.subtitle.text
        legend = figure.layout.coloraxis.colorbar.title.text
    return " ".join(note.split("<br>")), " ".join(legend.replace("<br>", "\n").split("\n"))


def limits(figure: Any) -> tuple[float, float]:
    if isinstance(figure, matplotlib.figure.Figure):
        return panels(figure)[0].images[0].get_clim()
    return figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax


def columns(figure: Any) -> list[int]:
    """How many columns each panel has."""
    if isinstance(figure, matplotlib.figure.Figure):
        return [np.asarray(axis.images[0].get_array()).shape[1] for axis in panels(figure)]
    return [len(trace.z[0]) for trace in figure.data]


# Width -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "names", "crop"),
    [
        (5, ["attn"], None),
        (32, ["q", "k", "v", "o", "resid"], None),
        (80, ["resid", "attn", "mlp"], None),
        (80, ["attn"], False),
        (300, ["resid", "v"], False),
    ],
)
def test_no_picture_is_wider_than_a_page(
    length: int, names: list[str], crop: Any, tmp_path: Path
) -> None:
    out = outcome(length, length // 4, Sites(names, seq_pos_type="each"))
    figure = plot(out, crop=crop)
    width, height = figure.get_size_inches()
    assert width <= 16
    assert height <= 40
    figure.canvas.draw()
    for axis in panels(figure):
        for labels, side in ((axis.get_xticklabels(), "width"), (axis.get_yticklabels(), "height")):
            # The room of a label is that from one tick to the next.
            if len(labels) > 1:
                extent = getattr(axis.get_window_extent(), side)
                size = np.asarray(axis.images[0].get_array()).shape[side == "width"]
                places = [label.get_position()[side == "height"] for label in labels]
                room = extent / size * (places[1] - places[0])
                assert room >= 0.1 * figure.dpi, f"{len(labels)} labels of {side}"
        last = axis.get_xticklabels()[-1]
        assert last.get_position()[0] == np.asarray(axis.images[0].get_array()).shape[1] - 1


@given(
    counts=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    rows=st.integers(1, 400),
)
def test_panels_find_a_place(counts: Any, rows: Any) -> None:
    made = [Panel("p", np.zeros((rows, n)), ("r",) * rows, ("c",) * n, "", "") for n in counts]
    grid = lay_out(made)
    assert grid.width <= 16
    assert grid.down * grid.across >= len(made) > (grid.down - 1) * grid.across
    assert grid.down * grid.height <= 36.1
    assert 0 < grid.column <= 0.42


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_a_page_of_several_panels_fits_the_window_of_a_laptop(count: int) -> None:
    names = ["resid", "attn", "mlp", "q", "k", "v", "o", "resid_pre"][:count]
    out = outcome(24, 3, Sites(names, seq_pos_type="each"))
    figure = plot(out, interactive=True)
    assert figure.layout.width is None or figure.layout.width <= 1160
    assert plot(out, interactive=True, size=(18, 6)).layout.width == 18 * 82


# What is left out --------------------------------------------------------------------------------


@given(differs=st.integers(0, 59), interactive=st.booleans())
@settings(deadline=None, max_examples=8)
def test_what_was_not_run_is_left_out_and_named(differs: Any, interactive: Any) -> None:
    out = outcome(60, differs)
    figure = plot(out, interactive=interactive)
    note, _ = texts(figure)
    assert columns(figure) == [60 - differs] * 3
    said = {0: "", 1: "position 0 is left out: source and target are the same there"}.get(
        differs, f"positions 0-{differs - 1} are left out: source and target are the same there"
    )
    assert (note or "") == said
    if interactive:
        first, label = figure.data[0].z, figure.layout.xaxis.ticktext[-1]
    else:
        first, label = panels(figure)[0].images[0].get_array(), None
    assert np.allclose(np.asarray(first, dtype=float), out["resid"][:, differs:].numpy())
    if label is not None:
        assert label.startswith("59 "), "a label says its position"
    assert not bool((~out.elided("resid"))[:, :differs].any())


@pytest.mark.parametrize("interactive", [False, True])
def test_what_was_run_in_one_panel_is_kept_in_all(interactive: bool) -> None:
    """`crop` goes by all panels together, so that they can be compared."""
    out = outcome(80, 20, Sites(["resid", "attn"], seq_pos_type="each"))
    cells = dict(out.cells)
    elided = cells["resid"].elided.clone()
    elided[(cells["resid"].index[:, 1] == 10).nonzero()[0]] = False
    cells["resid"] = attrs.evolve(cells["resid"], elided=elided)
    figure = plot(attrs.evolve(out, cells=cells), interactive=interactive)
    assert columns(figure) == [61, 61]
    note, _ = texts(figure)
    assert note == "positions 0-9, 11-19 are left out: source and target are the same there"


@pytest.mark.parametrize("interactive", [False, True])
def test_a_user_decides(interactive: bool) -> None:
    out, small = outcome(80, 20), outcome(5, 3)
    kept = plot(out, crop=False, interactive=interactive)
    assert columns(kept) == [80] * 3
    assert not texts(kept)[0]
    assert columns(plot(small, interactive=interactive)) == [5] * 3, "there is room"
    cropped = plot(small, crop=True, interactive=interactive)
    assert columns(cropped) == [2] * 3
    assert "positions 0-2 are left out" in texts(cropped)[0]
    with pytest.raises(OutcomeError, match="crop must be True, False or None, got 'no'"):
        plot(small, crop="no", interactive=interactive)


def test_each_reason_is_told() -> None:
    sites = Sites("resid", seq_pos_type="custom", seq_pos=[2, 3, 4, 70, 71, 79])
    figure = plot(outcome(80, 4, sites))
    assert columns(figure) == [4]
    assert texts(figure)[0] == (
        "positions 0-1, 5-69, 72-78 are left out: nothing was swept there; "
        "positions 2-3 are left out: source and target are the same there"
    )
    # In the last layer nothing but the last token matters, though the runs differ.
    last = Sites("attn", layers=[2], seq_pos_type="each")
    assert texts(plot(outcome(80, 4, last)))[0] == (
        "positions 0-3 are left out: source and target are the same there; "
        "positions 4-78 are left out: nothing reads what is there; "
        "layers 0-1 are left out: nothing was swept there"
    )


def test_where_nothing_was_run_all_is_shown() -> None:
    out = outcome(80, 4)
    still = {
        name: attrs.evolve(cells, elided=torch.ones_like(cells.elided))
        for name, cells in out.cells.items()
    }
    figure = plot(attrs.evolve(out, cells=still), crop=True)
    assert columns(figure) == [80] * 3
    assert not texts(figure)[0]


def test_sites_without_positions_are_not_cropped() -> None:
    assert columns(plot(outcome(80, 20, Sites("q", seq_pos_type="last")), crop=True)) == [4]
    assert columns(plot(outcome(80, 20, Sites("resid")), kind="heatmap", crop=True)) == [1]


# Layers that were not swept ----------------------------------------------------------------------


def rows(figure: Any) -> Any:
    """The labels of the rows of each panel, and its numbers."""
    if isinstance(figure, matplotlib.figure.Figure):
        return [
            ([label.get_text() for label in axis.get_yticklabels()], axis.images[0].get_array())
            for axis in panels(figure)
        ]
    return [
        (list(axis.ticktext), np.array(trace.z, dtype=float))
        for axis, trace in zip(figure.select_yaxes(), figure.data, strict=True)
    ]


def layered(layers: Any, names: Any = ("resid", "mlp"), **options: Any) -> Any:
    return outcome(5, 3, Sites(list(names), layers=layers, seq_pos_type="each"), **options)


LEFT_OUT = "layers 0, 2 are left out: nothing was swept there"


@pytest.mark.parametrize("interactive", [False, True])
def test_layers_are_left_out_where_most_were_not_swept(interactive: Any) -> None:
    out = layered([1])
    figure = plot(out, interactive=interactive)
    assert texts(figure)[0] == LEFT_OUT
    assert columns(figure) == [5, 5]
    for name, (labels, numbers) in zip(out, rows(figure), strict=True):
        assert labels == ["1"]
        assert np.allclose(np.asarray(numbers), out[name][1:2].numpy())
    kept = plot(out, interactive=interactive, crop=False)
    assert [labels for labels, _ in rows(kept)] == [["0", "1", "2"]] * 2
    assert not texts(kept)[0]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("layers", [None, [0, 1, 2], [0, 2]])
def test_most_layers_are_all_layers(layers: Any, interactive: Any) -> None:
    figure = plot(layered(layers), interactive=interactive)
    assert [labels for labels, _ in rows(figure)] == [["0", "1", "2"]] * 2
    assert not texts(figure)[0]


def test_a_user_may_leave_out_any_layer() -> None:
    figure = plot(layered([0, 2]), crop=True)
    assert [labels for labels, _ in rows(figure)] == [["0", "2"]] * 2
    said = "positions 0-2 are left out: source and target are the same there; "
    assert texts(figure)[0] == f"{said}layer 1 is left out: nothing was swept there"


@pytest.mark.parametrize("interactive", [False, True])
def test_a_layer_of_one_panel_is_kept_in_all(interactive: Any) -> None:
    """Heads have rows of their own, and lists of sites have no layers."""
    get = Site.get_site
    few = [get(tiny_api(), "mlp", 1, seq_pos=[3]), get(tiny_api(), "mlp", 2, seq_pos=[4])]
    listed, out = outcome(5, 3, Sites.from_sites(few)), layered([1], ["resid", "k"])
    drawn = plot(listed, interactive=interactive, kind="heatmap", crop=True)
    assert [len(labels) for labels, _ in rows(drawn)] == [2]
    figure = plot(out, interactive=interactive)
    assert [labels for labels, _ in rows(figure)] == [["1"], ["1.0", "1.1"]]
    cells = {**out.cells, "k": layered([2], ["k"]).cells["k"]}
    both = plot(attrs.evolve(out, cells=cells), interactive=interactive)
    assert [len(labels) for labels, _ in rows(both)] == [3, 6]
    alone = plot(attrs.evolve(out, cells=cells), interactive=interactive, sites=["k"])
    assert [labels for labels, _ in rows(alone)] == [["2.0", "2.1"]]


def test_layers_without_positions_are_left_out_too() -> None:
    heads = plot(outcome(5, 3, Sites("q", layers=[2], seq_pos_type="last")))
    assert [labels for labels, _ in rows(heads)] == [["2"]]
    assert columns(heads) == [4]
    together = plot(outcome(5, 3, Sites("resid", layers=[0])), kind="heatmap")
    assert [labels for labels, _ in rows(together)] == [["0"]]
    assert texts(together)[0] == "layers 1-2 are left out: nothing was swept there"


def test_a_long_note_is_not_cut_off() -> None:
    sites = Sites("resid", layers=[1], seq_pos_type="custom", seq_pos=[2, 3, 4, 70, 71, 79])
    figure = plot(outcome(80, 4, sites))
    assert len(texts(figure)[0]) > 150
    figure.canvas.draw()
    # The note is all of it; it is drawn in several lines.
    extent = figure._supxlabel.get_window_extent()
    assert extent.height > 3 * 8
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width


# Colours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("size", [False, True])
def test_next_to_nothing_looks_like_it(interactive: bool, size: bool) -> None:
    out = scaled(outcome(5, 3, sweep=activation_patching), 0.006)
    out = out.magnitudes() if size else out
    figure = plot(out, interactive=interactive)
    assert limits(figure) == (-1, 1)
    assert texts(figure)[1].endswith("the largest is 0.006")
    darkest = plot(out, interactive=interactive, limit="largest")
    assert limits(darkest)[1] == pytest.approx(0.006, rel=1e-4)
    assert "the largest is" not in texts(darkest)[1]


@pytest.mark.parametrize("interactive", [False, True])
def test_what_is_more_than_all_of_it_is_the_scale(interactive: bool) -> None:
    figure = plot(scaled(outcome(5, 3, sweep=activation_patching), 3.0), interactive=interactive)
    assert limits(figure)[1] == pytest.approx(3.0, rel=1e-4)
    assert "the largest is" not in texts(figure)[1]


@pytest.mark.parametrize("interactive", [False, True])
@pytest.mark.parametrize("metric", ["logit_difference", "kl_divergence"])
def test_a_change_is_compared_with_the_unablated_metric(metric: str, interactive: bool) -> None:
    out = ablation_patching(
        tiny_model(),
        tiny_api(),
        Sites("mlp", seq_pos_type="each"),
        torch.tensor([[5, 6, 7], [8, 9, 10]]),
        torch.tensor([1, 2]),
        torch.tensor([2, 1]),
        metric=metric,
        progress=False,
    )
    floor = out.baseline.target.abs().mean().item() if metric == "logit_difference" else 1.0
    assert limits(plot(scaled(out, floor / 100), interactive=interactive))[1] == pytest.approx(
        floor
    )
    large = plot(scaled(out, 5 * floor), interactive=interactive)
    assert limits(large)[1] == pytest.approx(5 * floor, rel=1e-4)


@pytest.mark.parametrize("limit", ["most", "1"])
def test_a_limit_is_a_number_or_the_largest(limit: str) -> None:
    with pytest.raises(
        OutcomeError, match=f"limit must be a positive number or 'largest', got '{limit}'"
    ):
        plot(outcome(5, 3), limit=limit)
