"""Which kind of picture the axes ask for, what stands in it, and what a user may choose."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nnpatch_core import Outcome
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.panels import Panel
from nnpatch_core.results.pictures.sheet import strongest
from nnpatch_core.sites import Axis
from tests.helpers.made_up import PLAIN, STRANGE, head_axis, layer_axis, outcome, position_axis

BLOCKS = dict.fromkeys(("resid", "attn"), (layer_axis(), position_axis()))
LAYERS = {name: (layer_axis(),) for name in ("resid", "attn", "mlp")}
HEADS = {"o": (layer_axis(), position_axis(), head_axis())}
LISTED = {"mine": (Axis("site", ("attn L1", "mlp L1", "both")),)}
BOTH = pytest.mark.parametrize("interactive", [False, True])


def titles(figure: Any) -> list[str]:
    if isinstance(figure, Figure):
        return [axis.get_title() for axis in figure.axes if axis.get_title()]
    return [html.unescape(note.text) for note in figure.layout.annotations]


def note(figure: Any) -> str:
    if isinstance(figure, Figure):
        return figure.get_supxlabel()
    return " ".join(figure.layout.title.subtitle.text.split("<br>"))


def kind(figure: Any) -> str:
    """What is drawn, by what the figure is made of."""
    if isinstance(figure, Figure):
        first = figure.axes[0]
        if first.images:
            return "heatmap"
        return "bars" if first.patches else "lines"
    return {"heatmap": "heatmap", "bar": "bars", "scatter": "lines"}[figure.data[0].type]


def test_the_axes_choose_the_kind() -> None:
    for interactive in (False, True):
        made = [
            kind(outcome(sites).plot(interactive=interactive))
            for sites in (BLOCKS, HEADS, LAYERS, LISTED)
        ]
        assert made == ["heatmap", "heatmap", "lines", "bars"]
        asked = [
            kind(outcome(BLOCKS).plot(interactive=interactive, kind=each))
            for each in ("heatmap", "lines", "bars")
        ]
        assert asked == ["heatmap", "lines", "bars"]


@BOTH
def test_heads_of_one_position_are_layers_and_heads(interactive: bool) -> None:
    out = outcome(HEADS, only=[13])
    figure = out.plot(interactive=interactive, values=False, mute=None)
    assert titles(figure) == ["o [13] 'to'"]
    if interactive:
        shown = np.array(figure.data[0].z, dtype=np.float64)
    else:
        shown = np.asarray(figure.axes[0].images[0].get_array())
    assert np.allclose(shown, out["o"][:, 13].numpy())


@BOTH
def test_many_heads_have_a_panel_for_each_position(interactive: bool) -> None:
    out = outcome(HEADS, differs=11)
    figure = out.plot(interactive=interactive, values=False, mute=None)
    assert titles(figure) == ["o [11] 'Paul|a'", "o [12] 'drink'", "o [13] 'to'"]
    assert note(figure) == ("positions 0-10 are left out: source and target are the same there")
    last = figure.data[2].z if interactive else figure.axes[2].images[0].get_array()
    assert np.allclose(np.array(last, dtype=float), out["o"][:, 13].numpy())


def test_heads_of_spans() -> None:
    spans = Axis("span", ("S1", "S2"))
    out = outcome({"o": (layer_axis(12), spans, head_axis())})
    assert titles(out.plot()) == ["o 'S1'", "o 'S2'"]


@BOTH
def test_a_line_for_each_component(interactive: bool) -> None:
    out = outcome(LAYERS)
    figure = out.plot(interactive=interactive)
    if interactive:
        lines = {each.name: each.y for each in figure.data if each.name}
    else:
        lines = {
            text.get_text(): line.get_ydata()
            for text, line in zip(
                figure.legends[0].get_texts(), figure.axes[0].lines[1:], strict=True
            )
        }
    assert list(lines) == ["resid", "attn", "mlp"]
    for name, drawn in lines.items():
        assert np.allclose(np.array(drawn), out[name].numpy())
    assert note(figure) == "shaded: the 95 % band over all 36 cells"


def test_a_band_is_drawn_around_its_line() -> None:
    out = outcome(LAYERS)
    bands = out.band()
    figure = out.plot()
    for area, name in zip(figure.axes[0].collections, out, strict=True):
        corners = area.get_paths()[0].vertices[:, 1]
        assert corners.min() == pytest.approx(bands[name].low.min().item())
        assert corners.max() == pytest.approx(bands[name].high.max().item())


@BOTH
def test_lines_that_are_not_told_from_0_are_grey(interactive: bool) -> None:
    figure = outcome(BLOCKS).plot(interactive=interactive, kind="lines")
    if interactive:
        named = [each.name for each in figure.data if each.showlegend]
    else:
        named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(named) == {"3 Paul|John", "13 to", "9 others"}
    assert "lines whose band holds 0 at every layer are grey" in note(figure)
    # One colour is one line in all charts.
    if not interactive:
        first, second = ([line.get_color() for line in axis.lines] for axis in figure.axes)
        assert first == second


@BOTH
def test_of_many_lines_those_that_reach_furthest_have_colours(interactive: bool) -> None:
    out = outcome(BLOCKS)
    figure = out.plot(interactive=interactive, kind="lines", mute=None)
    assert "the lines that reach furthest have colours" in note(figure)
    if interactive:
        named = [each.name for each in figure.data if each.showlegend]
    else:
        named = [text.get_text() for text in figure.legends[0].get_texts()]
    reach = torch.stack([out[name].abs().amax(0) for name in BLOCKS]).amax(0)
    furthest = reach.topk(8).indices.tolist()
    assert {name.partition(" ")[0] for name in named} == {*map(str, furthest), "3"}
    assert {"3 others", "3 Paul|John"} <= set(named)


@BOTH
def test_bars_of_a_list_with_their_intervals(interactive: bool) -> None:
    out = outcome(LISTED)
    figure = out.plot(interactive=interactive)
    interval = out.interval("mine")
    if interactive:
        (bars,) = figure.data
        assert list(figure.layout.yaxis.ticktext) == ["attn L1", "mlp L1", "both"]
        assert np.allclose(bars.x, out["mine"])
        high = np.array(bars.x) + np.array(bars.error_x.array)
        low = np.array(bars.x) - np.array(bars.error_x.arrayminus)
    else:
        (axis,) = figure.axes
        assert [label.get_text() for label in axis.get_yticklabels()] == [
            "attn L1",
            "mlp L1",
            "both",
        ]
        assert np.allclose([bar.get_width() for bar in axis.patches], out["mine"])
        ends = np.array(axis.containers[1].lines[2][0].get_segments())
        low, high = ends[:, 0, 0], ends[:, 1, 0]
        first, second = (axis.transData.transform((0, place))[1] for place in (0, 1))
        assert first > second, "the first is at the top"
    assert np.allclose(low, interval.low)
    assert np.allclose(high, interval.high)
    assert note(figure).startswith("error bars: the 95 % interval of each alone")


@BOTH
def test_bars_of_grids_are_the_strongest_cells(interactive: bool) -> None:
    out = outcome(BLOCKS)
    figure = out.plot(interactive=interactive, kind="bars")
    strongest = out.strongest(30)
    if interactive:
        values, labels = (
            figure.data[0].x,
            [text.split("<br>")[0] for text in figure.data[0].customdata],
        )
    else:
        values = [bar.get_width() for bar in figure.axes[0].patches]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert np.allclose(values, [row["value"] for row in strongest])
    first = strongest[0]
    assert labels[0].startswith(f"{first['site']} L{first['layer']} [{first['position']}]")
    assert note(figure) == (
        "the 30 strongest of 336 cells; error bars: the 95 % band over all 264 cells"
    )


def test_lines_need_layers() -> None:
    with pytest.raises(OutcomeError, match="'mine' is a list of sites: leave kind out"):
        outcome(LISTED).plot(kind="lines")


# Metrics -----------------------------------------------------------------------------------------

THREE = ("logit_difference", "answer_probability", "own")


@BOTH
def test_metrics_side_by_side(interactive: bool) -> None:
    out = outcome(BLOCKS, metrics=THREE)
    figure = out.plot(metrics="all", interactive=interactive)
    assert titles(figure) == [f"{site}: {metric}" for metric in THREE for site in BLOCKS]
    some = out.plot(metrics=["own"], interactive=interactive)
    assert titles(some) == ["resid", "attn"]
    scales = [axis for axis in figure.layout if axis.startswith("coloraxis")] if interactive else []
    assert len(scales) in (0, 2), "one scale, and the same washed out"
    if not interactive:
        assert sum(axis.get_label() == "<colorbar>" for axis in figure.axes) == 1


@BOTH
def test_metrics_of_other_units_have_their_own_scales(interactive: bool) -> None:
    out = outcome(BLOCKS, metrics=THREE, scale="change", size=3)
    figure = out.plot(metrics=THREE, interactive=interactive)
    if interactive:
        axes = [figure.layout[name] for name in ("coloraxis", "coloraxis3", "coloraxis5")]
        words = [axis.colorbar.title.text.replace("<br>", " ") for axis in axes]
        limits = [axis.cmax for axis in axes]
    else:
        bars = [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]
        words = [bar.get_ylabel().replace("\n", " ") for bar in bars]
        limits = [bar.get_ylim()[1] for bar in bars]
    assert words == [
        "change of logit_difference (logits)",
        "change of answer_probability",
        "change of own",
    ]
    assert np.allclose(limits[1:], [10 * limits[0], 100 * limits[0]])


def test_metrics_that_were_not_measured() -> None:
    with pytest.raises(OutcomeError, match="no metric 'loss' was measured"):
        outcome(BLOCKS).plot(metrics=["loss"])
    with pytest.raises(OutcomeError, match=r"metrics must be .* got \[\]"):
        outcome(BLOCKS).plot(metrics=[])


# What a user chooses -----------------------------------------------------------------------------


@BOTH
def test_layers_and_positions(interactive: bool) -> None:
    out = outcome(BLOCKS)
    figure = out.plot(
        interactive=interactive, layers=range(4, 7), positions=[-1, 3], values=False, mute=None
    )
    shown = figure.data[0].z if interactive else figure.axes[0].images[0].get_array()
    assert np.allclose(np.array(shown, dtype=float), out["resid"][4:7, [3, 13]].numpy())
    assert not note(figure), "who has chosen them needs no reason"


def test_a_size_in_inches() -> None:
    figure = outcome(BLOCKS).plot(size=(7, 3.5))
    assert figure.get_size_inches().tolist() == [7, 3.5]
    page = outcome(BLOCKS).plot(size=(7, 3.5), interactive=True).layout
    assert page.width / page.height == pytest.approx(2, rel=0.35)
    assert outcome(LAYERS).plot(size=(5, 3)).get_size_inches().tolist() == [5, 3]
    assert outcome(LISTED).plot(size=(5, 3)).get_size_inches().tolist() == [5, 3]


@pytest.mark.parametrize("sites", [BLOCKS, LAYERS, LISTED], ids=["heatmap", "lines", "bars"])
def test_axes_of_a_figure_of_ones_own(sites: Any, tmp_path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    out = outcome(sites)
    chosen = ["resid"] if sites is BLOCKS else None
    before = set(plt.get_fignums())
    given = out.plot(ax=axes[1], sites=chosen, title="Mine")
    assert given is figure
    assert set(plt.get_fignums()) == before
    assert axes[1].get_title() == "Mine"
    assert not axes[0].has_data()
    assert axes[1].has_data()
    assert "95 %" in axes[1].get_xlabel(), "what was washed out is said below the panel"
    figure.savefig(tmp_path / "mine.pdf")
    plt.close(figure)


def test_axes_of_a_part_of_a_figure() -> None:
    figure = plt.figure(layout="constrained")
    left, _ = figure.subfigures(1, 2)
    assert outcome(BLOCKS).plot(ax=left.subplots(), sites=["attn"]) is figure
    plt.close(figure)


def test_axes_have_room_for_one_panel() -> None:
    figure, axis = plt.subplots()
    with pytest.raises(OutcomeError, match=r"there are 2 \(resid, attn\): name one site"):
        outcome(BLOCKS).plot(ax=axis)
    with pytest.raises(OutcomeError, match="leave out interactive=True"):
        outcome(BLOCKS).plot(ax=axis, sites=["attn"], interactive=True)
    with pytest.raises(OutcomeError, match="leave out size="):
        outcome(BLOCKS).plot(ax=axis, sites=["attn"], size=(3, 3))
    plt.close(figure)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "pie"}, "kind must be .* got 'pie'"),
        ({"size": 3}, r"size must be \(width, height\), each from 1 to 200 inches, got 3"),
        ({"size": (3, -1)}, "size must be"),
        ({"mark": -1}, "mark must be at least 0, got -1"),
        ({"mark": 1.5}, "mark must be an integer, got 1.5"),
        ({"values": "yes"}, "values must be True, False or None, got 'yes'"),
        ({"mute": 95}, "mute must be a level such as 0.95, or None, got 95"),
        ({"layers": [12]}, "layers are 0 to 11, got 12"),
        ({"layers": 3}, "layers must be numbers"),
        ({"positions": [-15]}, "positions are 0 to 13, got -15"),
        ({"ax": 3}, "ax must be the axes of a matplotlib figure, got 3"),
    ],
)
def test_bad_options(options: Any, says: str) -> None:
    with pytest.raises(OutcomeError, match=says):
        outcome(BLOCKS).plot(**options)


# Values and marks --------------------------------------------------------------------------------


def written(figure: Any) -> list[str]:
    if isinstance(figure, Figure):
        return [text.get_text() for axis in figure.axes for text in axis.texts]
    return [text for each in figure.data for line in each.text or [] for text in line if text]


@BOTH
def test_values_are_written_where_they_fit(interactive: bool) -> None:
    axes = (layer_axis(6), position_axis(PLAIN[:5]))
    small = outcome({"resid": axes, "attn": axes}, PLAIN[:5])
    shown = written(small.plot(interactive=interactive, mute=None))
    swept = torch.stack([small["resid"], small["attn"]])[:, :, 3:].flatten()
    assert sorted(shown) == sorted(
        f"{value:.2f}" if abs(value) >= 0.005 else "0" for value in swept
    )
    sure = written(small.plot(interactive=interactive))
    assert 0 < len(sure) < len(shown), "what is washed out has no number"
    assert len(written(small.plot(interactive=interactive, values=True))) == len(shown)
    assert not written(small.plot(interactive=interactive, values=False))
    assert not written(outcome(BLOCKS).plot(interactive=interactive)), "there is no room"


@BOTH
def test_the_strongest_cells_are_outlined(interactive: bool) -> None:
    out = outcome(BLOCKS, noise=0.01)
    figure = out.plot(interactive=interactive, mark=4, crop=False)
    expected = {(row["site"], row["layer"], row["position"]) for row in out.top(4)}
    assert expected != {(row["site"], row["layer"], row["position"]) for row in out.strongest(4)}
    found = set()
    if interactive:
        # Each has a dark frame and a light edge.
        assert len(figure.layout.shapes) == 8
        for shape in figure.layout.shapes:
            site = "resid" if shape.xref == "x" else "attn"
            found.add((site, int(shape.y0 + 0.5), int(shape.x0 + 0.5)))
    else:
        for axis in figure.axes:
            for frame in axis.patches:
                x, y = frame.get_xy()
                found.add((axis.get_title(), int(y + 0.5), int(x + 0.5)))
    assert found == expected


# Letters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["heatmap", "lines", "bars"])
def test_tokens_of_any_letters_are_drawn(chosen: Any, tmp_path: Path) -> None:
    """Without a warning of a glyph that is missing; warnings are errors here."""
    out = outcome({"resid": (layer_axis(), position_axis(STRANGE))}, STRANGE, differs=1)
    figure = out.plot(kind=chosen, mute=None)
    for ending in ("png", "svg", "pdf"):
        figure.savefig(tmp_path / f"out.{ending}")
    page = out.plot(kind=chosen, mute=None, interactive=True).to_json()
    assert "<b>bold" not in page


def test_a_letter_that_no_font_has_is_its_number(tmp_path: Path) -> None:
    tokens = ["a", "b", " \U000f1234", "\x00"]
    out = outcome({"resid": (layer_axis(), position_axis(tokens))}, tokens, differs=1)
    figure = out.plot()
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["a", "Paul|b", "\\U000f1234", "\\x00"]
    figure.savefig(tmp_path / "out.svg")


def test_one_scale_and_linked_panels() -> None:
    page = outcome(BLOCKS).plot(interactive=True, values=False).layout
    assert page.xaxis2.matches == "x"
    assert page.yaxis2.matches == "y"
    assert page.coloraxis.cmax == page.coloraxis2.cmax
    assert not page.coloraxis2.showscale


def test_panels_of_other_axes_are_not_linked() -> None:
    sites = {"q": (layer_axis(), head_axis()), "k": (layer_axis(), head_axis(2, "kv_head"))}
    page = outcome(sites).plot(interactive=True).layout
    assert page.xaxis2.matches is None
    assert page.yaxis2.matches == "y"


def test_pages_need_no_network(tmp_path: Path) -> None:
    for chosen in ("heatmap", "lines", "bars"):
        path = tmp_path / "page.html"
        outcome(BLOCKS).plot(kind=chosen, interactive=True).write_html(path)
        page = path.read_text("utf-8")
        assert "<script src=" not in page
        assert "<link" not in page


def test_outcome_without_a_model() -> None:
    out: Outcome = outcome(LISTED)
    out.info.pop("model")
    assert out.plot().get_suptitle() == "activation, logit_difference"


@BOTH
def test_bars_have_room_for_their_labels(interactive: bool) -> None:
    out = outcome(BLOCKS)
    small = out.plot(kind="bars", size=(6, 3), interactive=interactive)
    count = len(small.data[0].x) if interactive else len(small.axes[0].patches)
    assert count == 9
    assert note(small).startswith("the 9 strongest of 336 cells")
    many = {"mine": (Axis("site", tuple(f"site {number}" for number in range(50))),)}
    listed = outcome(many).plot(size=(6, 4), interactive=interactive)
    count = len(listed.data[0].x) if interactive else len(listed.axes[0].patches)
    assert count == 50, "of a list none is left out"
    labels = listed.layout.yaxis.ticktext if interactive else listed.axes[0].get_yticklabels()
    assert len(labels) < 25


def test_heads_that_are_rows_are_facts_of_their_own() -> None:
    rows = {"up": ("0.0", "0.1", "1.0", "1.1"), "across": ("a",), "layers": (0, 0, 1, 1)}

    def outlined(*values: float) -> Any:
        made = Panel("v", np.array(values)[:, None], up_title="", across_title="", **rows)
        return [up for up, _ in strongest([made], 2)[0]]

    assert outlined(1.0, 0.1, 0.2, 0.99) == [0, 3], "another head"
    assert outlined(1.0, 0.1, 0.99, 0.2) == [0, 3], "the same head, one layer further"


@pytest.mark.parametrize("text", ["$", "a $\x1f b", "$x$", "\\frac{$}"])
def test_names_with_dollar_signs_are_no_formulas(text: str) -> None:
    """Matplotlib measures wrapped lines as formulas, and fails at what is none."""
    out = outcome({f"mlp {text}": (layer_axis(), position_axis())}, metrics=[f"one {text} {text}"])
    figure = out.plot()
    figure.canvas.draw()
    expected = "".join(each if each.isprintable() else "\\x1f" for each in text)
    assert figure.get_suptitle().count(expected) == 2


def test_a_picture_does_not_depend_on_those_before(tmp_path: Path) -> None:
    """Fonts that are found late for one are there for the next, and come where they came."""
    axes = (layer_axis(), Axis("position", tuple(range(len(STRANGE)))))
    out = outcome({"mlp": axes}, STRANGE)
    for number in range(2):
        out.plot().savefig(tmp_path / f"{number}.png")
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
