"""Graphs of circuits: what stands where, what is said, and that nothing covers what is written."""

from __future__ import annotations

import html
import json
import math
import os
import random
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from matplotlib.patches import PathPatch

from nnpatch_core.circuits import Circuit
from nnpatch_core.circuits.pictures import arrange
from nnpatch_core.circuits.pictures.arrange import Item, Piece, crossings
from nnpatch_core.circuits.pictures.drawing import HIGH, PORTS, Drawing, drawing_of
from nnpatch_core.circuits.pictures.shown import shown_of
from nnpatch_core.errors import EdgeError
from tests.helpers.circuits import Edges, made_circuit, made_edges, nodes_of, some_circuits

NODES = nodes_of(3, 4, group=2)
APART = nodes_of(3, 4)


def drawn(circuit: Circuit, most: int = 60) -> Drawing:
    return drawing_of(circuit.nodes, shown_of(circuit, most, None))


def texts(figure: Any) -> list[str]:
    (axis,) = figure.axes
    return [text.get_text() for text in axis.texts]


def lines(figure: Any) -> list[Any]:
    """The edges of a figure, weakest first."""
    (axis,) = figure.axes
    return [patch for patch in axis.patches if isinstance(patch, PathPatch)]


# Where things are ---------------------------------------------------------------------------------


@given(some_circuits(), st.sampled_from([5, 20, 60]))
@settings(max_examples=60)
def test_edges_go_up_and_meet_their_nodes_alone(circuit: Circuit, most: int) -> None:
    """An edge passes beside each box of the rows between, and boxes of a row stand apart."""
    assume(len(circuit))
    made = drawn(circuit, most)
    boxes = {placed.cell.node: (placed, box) for placed, box in made.nodes}
    rows: dict[float, list[tuple[float, float]]] = {}
    for placed, _ in made.nodes:
        half = placed.cell.width / 2
        rows.setdefault(round(placed.y, 4), []).append((placed.x - half, placed.x + half))
    for spans in rows.values():
        spans.sort()
        for (_, end), (start, _) in pairwise(spans):
            assert start >= end - 1e-6
    for left, _, right, _ in made.frames:
        assert -1e-6 <= left < right <= made.width + 1e-6
    for curve in made.curves:
        sender, _ = boxes[curve.link.sender.name]
        assert curve.start == pytest.approx((sender.x, sender.y + HIGH / 2))
        heights = [curve.start[1]]
        for foot, head in curve.bends:
            assert foot[0] == head[0]
            heights += [foot[1], head[1]]
            row = rows[round(foot[1] + PORTS + HIGH / 2, 4)]
            assert all(not left - 1e-6 < foot[0] < right + 1e-6 for left, right in row)
        heights.append(curve.end[1])
        assert heights == sorted(heights)
        for first, low, high, last in curve.pieces():
            assert low[0] == first[0]
            assert high[0] == last[0]
    # An estimate passes nowhere as what is exact, nor does what is positive as what is negative.
    looks: dict[tuple[float, float], set[tuple[bool, bool]]] = {}
    for curve in made.curves:
        for foot, _ in curve.bends:
            look = curve.link.score < 0, bool(curve.link.estimate)
            looks.setdefault(foot, set()).add(look)
    assert all(len(each) == 1 for each in looks.values())
    xs = [x for curve in made.curves for x, _ in (curve.start, curve.end)]
    assert all(0 <= x <= made.width for x in xs)


@given(some_circuits())
@settings(max_examples=40)
def test_edges_end_at_the_letter_of_what_they_go_into(circuit: Circuit) -> None:
    assume(len(circuit))
    made = drawn(circuit)
    cells = {placed.cell.node: (placed, box) for placed, box in made.nodes}
    for curve in made.curves:
        receiver = curve.link.receiver
        if receiver.head is None:
            placed, _ = cells[receiver.name]
            assert curve.end == pytest.approx((placed.x, placed.y - HIGH / 2))
            continue
        nodes = circuit.nodes
        group = nodes.query[receiver.layer] // nodes.key_value[receiver.layer]
        shared = receiver.kind != "q" and group > 1
        name = f"a{receiver.layer}.{'kv' if shared else 'h'}{receiver.head}"
        placed, box = cells[name]
        x, y = placed.port(box, receiver.kind)
        assert curve.end == pytest.approx((x, y - PORTS / 2))
        assert placed.cell.shared is shared


def test_layers_go_up_and_an_mlp_stands_above_its_heads() -> None:
    for parallel in (False, True):
        nodes = nodes_of(3, 4, parallel=parallel)
        made = drawn(Circuit.of(nodes, list(nodes)), 999)
        heights = {placed.cell.node: placed.y for placed, _ in made.nodes}
        for layer in range(3):
            heads = {heights[f"a{layer}.h{head}"] for head in range(4)}
            assert len(heads) == 1
            (height,) = heads
            assert height > heights["input"]
            assert (heights[f"m{layer}"] == height) if parallel else (heights[f"m{layer}"] > height)
            if layer:
                assert height > heights[f"m{layer - 1}"]
        assert heights["logits"] == max(heights.values())
        assert [band.label for band in made.bands] == ["layer 0", "layer 1", "layer 2"]
        assert all(one.high < other.low for one, other in pairwise(made.bands))


def test_the_same_circuit_has_the_same_picture() -> None:
    circuit = made_circuit(NODES, 40)
    assert circuit.page() == circuit.page()


def test_crossings_are_counted() -> None:
    def piece(start: float, end: float) -> Piece:
        return Piece(Item(0, 1.0, start), Item(1, 1.0, end), 0.0, 0.0, 1.0)

    assert crossings([[]]) == 0
    assert crossings([[piece(0, 1), piece(1, 0)]]) == 1
    assert crossings([[piece(0, 0), piece(1, 1)], [piece(0, 2), piece(1, 1), piece(2, 0)]]) == 3
    # From one place, or to one, nothing crosses.
    assert crossings([[piece(0, 1), piece(0, 0), piece(0, 2), piece(-1, 2)]]) == 2


def test_boxes_stand_as_near_as_can_be_to_where_they_belong() -> None:
    row = [Item(0, 1.0, box=0), Item(0, 1.0, box=1), Item(0, 2.0, box=2)]
    arrange._place(row, [0.0, 0.0, 9.0], [1.0, 3.0, 1.0])
    gap = 1 + arrange._APART
    assert [item.x for item in row] == pytest.approx([-0.75 * gap, 0.25 * gap, 9.0])
    arrange._place(row, [5.0, 5.0, 5.0], [1.0, 1.0, 1.0])
    assert sum(item.x for item in row) == pytest.approx(15)
    assert row[2].x - row[1].x == pytest.approx(1.5 + arrange._APART)


@pytest.mark.parametrize("seed", range(6))
def test_edges_cross_seldom(seed: int) -> None:
    """Strands side by side, whatever the numbers of their heads, need no crossing."""
    nodes = nodes_of(4, 6)
    draw = random.Random(seed)
    layers = [draw.sample(range(6), 6) for _ in range(4)]
    edges = [f"a3.h{head}->logits" for head in layers[3]]
    for strand in range(6):
        before = "input"
        for layer, heads in enumerate(layers):
            if draw.random() < 0.7 or layer == 3:
                edges.append(f"{before}->a{layer}.h{heads[strand]}<q>")
                before = f"a{layer}.h{heads[strand]}"
    made = drawn(Circuit.of(nodes, edges))
    rows: dict[float, list[Piece]] = {}
    for curve in made.curves:
        for start, _, _, end in curve.pieces():
            piece = Piece(Item(0, 1.0, start[0]), Item(1, 1.0, end[0]), 0.0, 0.0, 1.0)
            rows.setdefault(round(start[1], 4), []).append(piece)
    assert crossings(list(rows.values())) == 0


def test_few_edges_cross_where_none_must() -> None:
    nodes = nodes_of(1, 6)
    edges = [f"input->a0.h{head}<{'qkv'[head % 3]}>" for head in range(6)]
    edges += [f"a0.h{head}->logits" for head in range(6)]
    made = drawn(Circuit.of(nodes, edges))
    order = sorted(made.curves, key=lambda curve: (curve.start[0], curve.end[0]))
    into = [curve.end[0] for curve in order if curve.link.sender.name == "input"]
    out = [curve.start[0] for curve in order if curve.link.sender.name != "input"]
    assert into == sorted(into)
    assert [round(x, 6) for x in into] == [round(x, 6) for x in out]


# The static picture -------------------------------------------------------------------------------


def test_widths_and_colours_are_those_of_the_scores() -> None:
    scores = {"input->m0": 1.0, "m0->m1": -0.5, "m1->logits": 0.25, "input->logits": 1e-9}
    figure = Circuit.from_edges(scores, n=4, nodes=NODES).plot()
    found = [(patch.get_linewidth(), patch.get_edgecolor()[:3]) for patch in lines(figure)]
    widths = [width for width, _ in found]
    assert widths == pytest.approx([0.6, 1.25, 2.5, 5.0])
    colours = [colour for _, colour in found]
    assert colours[0] == colours[1] == colours[3] != colours[2]
    assert {"1.000", "0.250", "-0.250"} <= set(texts(figure))
    negative = {edge: -score for edge, score in scores.items()}
    figure = Circuit.from_edges(negative, n=3, nodes=NODES).plot()
    assert {"-1.000", "-0.250"} <= set(texts(figure))
    assert "1.000" not in texts(figure)


def test_it_says_what_it_leaves_out() -> None:
    circuit = made_circuit(APART, 80)
    assert len(circuit) > 30
    figure = circuit.plot(edges=10)
    assert len(lines(figure)) == 10
    words = " ".join(texts(figure))
    left = len(circuit) - 10
    assert f"Only the 10 strongest edges are drawn. Not drawn: {left} edges of size" in words
    last = circuit.top(10).to_dataframe()["score"].abs().min()
    assert f"of size {last:.3f} or less" in words
    assert "Not drawn" not in " ".join(texts(circuit.plot(edges=len(circuit))))
    plain = Circuit.of(APART, circuit.edges)
    assert f"Only 10 edges are drawn. Not drawn: {left} edges." in " ".join(
        texts(plain.plot(edges=10))
    )


def test_estimates_are_no_exact_values() -> None:
    edges = made_edges(NODES)
    marks = torch.from_numpy(NODES.mask)
    strong = marks & (edges.matrix.abs() >= edges.matrix.nan_to_num().abs().flatten().sort()[0][-4])
    for exact, words, dashes in (
        (strong, "Dashed: an estimate, where others are exact.", 6),
        (marks, "All values are exact.", 0),
        (marks & False, "All values are estimates.", 0),
        (None, "", 0),
    ):
        circuit = Circuit.from_edges(Edges(NODES, edges.matrix, exact), n=10, pruned=False)
        figure, page = circuit.plot(), circuit.page()
        said = " ".join(texts(figure))
        assert sum(patch.get_linestyle() != "solid" for patch in lines(figure)) == dashes
        assert len(re.findall(r'class="edge \w+ estimate" data-edge', page)) == dashes
        assert (words in said) if words else ("exact" not in said)
        assert words in page
        kinds = [edge["kind"] for edge in data(page)["edges"]]
        expected = 0 if exact is None else int((circuit.kept & ~exact).sum())
        assert kinds.count("estimate") == expected


def test_what_stands_in_it() -> None:
    circuit = Circuit.of(NODES, ["input->a1.h1<k>", "a1.h2->a2.h3<q>", "a2.h3->logits"])
    figure = circuit.plot(title="of $x$ and 中")
    # Where no font has a character, its number stands for it.
    found = [text.replace("\\u4e2d", "中") for text in texts(figure)]
    nodes = {"input", "a1.h2", "kv1", "k", "a2.h3", "q", "logits", "layer 1", "layer 2"}
    assert nodes | {"of $x$ and 中"} <= set(found)
    assert "A frame: heads that share a key and a value (kv)." in " ".join(found)
    assert "A frame" not in " ".join(texts(made_circuit(APART, 20).plot()))
    figure.canvas.draw()
    model = Circuit(NODES, circuit.kept, info={"model": "org/some-model"})
    assert "some-model: circuit of 3 edges" in texts(model.plot())


def test_no_text_covers_another_or_is_cut_off() -> None:
    for circuit, options in (
        (made_circuit(NODES, 40), {}),
        (made_circuit(nodes_of(12, 12), 200), {}),
        (made_circuit(nodes_of(30, 9, group=3), 300), {"edges": 80}),
        (made_circuit(NODES, 12), {"size": (12, 9), "title": "a title of many words " * 12}),
        (Circuit.of(NODES, ["input->logits"]), {}),
    ):
        figure = circuit.plot(**options)
        figure.canvas.draw()
        (axis,) = figure.axes
        found = [(text.get_text(), text.get_window_extent()) for text in axis.texts]
        for number, (text, box) in enumerate(found):
            assert box.x0 >= -1 and box.y0 >= -1, text  # noqa: PT018
            assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text  # noqa: PT018
            for other, beside in found[:number]:
                across = min(box.x1, beside.x1) - max(box.x0, beside.x0)
                up = min(box.y1, beside.y1) - max(box.y0, beside.y0)
                assert across < 2.5 or up < 2.5, (text, other)


def test_a_size_of_ones_own_scales_it() -> None:
    circuit = made_circuit(NODES, 20)
    usual, half = circuit.plot(), circuit.plot(size=(3, 30))
    assert half.get_size_inches().tolist() == [3, 30]
    scale = 3 / usual.get_size_inches()[0]
    for one, other in zip(usual.axes[0].texts, half.axes[0].texts, strict=True):
        assert other.get_fontsize() == pytest.approx(max(1, scale * one.get_fontsize()))


def test_it_is_written(tmp_path: Path) -> None:
    circuit = made_circuit(NODES, 20)
    for name, beginning in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")):
        circuit.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(beginning)
    before = os.listdir(tmp_path)  # noqa: PTH208 - hidden files count
    for path, words in (
        (tmp_path / "a.doc", "must end in one of .*png"),
        (tmp_path / "a", "must end in one of"),
        (tmp_path, "is not a file: it is a folder"),
        (tmp_path / "no" / "a.png", "there is no folder"),
    ):
        with pytest.raises(EdgeError, match=words):
            circuit.plot(path)
    assert os.listdir(tmp_path) == before  # noqa: PTH208 - hidden files count


def test_scores_that_are_no_sizes() -> None:
    scores = {"input->m0": math.inf, "m0->m1": -1.0, "m1->logits": 0.5, "input->m1": 0.0}
    kept = Circuit.of(NODES, [*scores, "m0->logits"]).kept
    circuit = Circuit(NODES, kept, Circuit.from_edges(scores, n=0, nodes=NODES).scores)
    widths = [patch.get_linewidth() for patch in lines(circuit.plot())]
    assert widths == pytest.approx([0.6, 0.6, 2.5, 5, 5])
    assert "m0-&gt;logits</title>" in circuit.page()
    zeros = Circuit.from_edges(dict.fromkeys(scores, 0.0), n=4, nodes=NODES)
    assert {patch.get_linewidth() for patch in lines(zeros.plot())} == {0.6}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"edges": 0}, "edges must be at least 1, got 0"),
        ({"edges": "all"}, "edges must be an integer, got 'all'"),
        ({"title": 3}, "title must be a text, got 3"),
        ({"path": 3}, "a file is named by a string or a path, got 3"),
        ({"size": (3, 0.1)}, r"size must be \(width, height\), each from 1 to 200 inches"),
        ({"size": 3}, r"size must be \(width, height\)"),
        ({"size": "ab"}, r"size must be \(width, height\)"),
        ({"size": (1, 2, 3)}, r"size must be \(width, height\)"),
    ],
)
def test_arguments_that_are_none(options: Any, words: str) -> None:
    circuit = made_circuit(NODES, 5)
    with pytest.raises(EdgeError, match=words):
        circuit.plot(**options)
    if "size" not in options:
        with pytest.raises(EdgeError, match=words):
            circuit.page(**options)


def test_no_edges_have_no_picture() -> None:
    for draw in (Circuit.of(NODES, []).plot, Circuit.of(NODES, []).page):
        with pytest.raises(EdgeError, match="there are no edges to draw"):
            draw()


# The page -----------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, with what each has as text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._last = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._last = tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self._last, []).append(data)


def data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_page_is_one_file_without_a_network() -> None:
    page = made_circuit(APART, 80).page()
    elements = Elements(page)
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form", "a")
        for name, value in attributes.items():
            assert name not in ("src", "href", "style") or tag == "never"
            assert not name.startswith("on")
            if name != "xmlns":
                assert "//" not in (value or "")
    assert "default-src 'none'" in page
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1
    assert len(scripts[0]) < 50_000
    # Names of edges have a "<", which could end the element that they are in.
    assert re.search(r'id="data">[^<]*</script>', page)
    for word in ("innerHTML", "eval(", "fetch", "import(", "XMLHttpRequest", "http"):
        assert word not in scripts[0]
    assert "url(" not in page
    assert "@import" not in page


def test_texts_of_others_are_shown_as_they_are() -> None:
    nasty = "</title></script><script>alert(1)</script>&amp;<!-- \"'"
    circuit = made_circuit(NODES, 8, info={"model": nasty})
    for page in (circuit.page(), circuit.page(title=nasty)):
        elements = Elements(page)
        assert [tag for tag, _ in elements.found].count("script") == 2
        assert nasty.rpartition("/")[2] in "".join(elements.text["h1"])
        assert "<script>alert" not in page
        assert html.escape(nasty.rpartition("/")[2]) in page


@given(some_circuits(), st.sampled_from([3, 400]))
@settings(max_examples=30)
def test_a_page_has_each_edge_once(circuit: Circuit, most: int) -> None:
    assume(len(circuit))
    page = circuit.page(edges=most)
    found = data(page)
    names = [edge["name"] for edge in found["edges"]]
    assert set(names) <= set(circuit)
    assert len(names) == len(set(names)) == min(most, len(circuit))
    assert found["total"] == len(circuit)
    elements = Elements(page).found
    for kind in ("edge", "hit"):
        numbers = [
            each["data-edge"]
            for _, each in elements
            if "data-edge" in each and (each["class"] or "").split()[0] == kind
        ]
        assert sorted(map(int, numbers)) == list(range(len(names)))
    nodes = {each["data-node"] for _, each in elements if "data-node" in each}
    assert {edge[end] for edge in found["edges"] for end in ("from", "into")} <= nodes
    for reads in found["reads"].values():
        assert all(re.fullmatch(r"a\d+\.(h|kv)\d+", each) for each in reads)
    sizes = [abs(float(edge["words"])) for edge in found["edges"] if edge["words"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    circuit = made_circuit(NODES, 8)
    page = circuit.page(tmp_path / "circuit.html")
    assert (tmp_path / "circuit.html").read_text("utf-8") == page
    with pytest.raises(EdgeError, match="there is no folder"):
        circuit.page(tmp_path / "no" / "circuit.html")
    assert os.listdir(tmp_path) == ["circuit.html"]  # noqa: PTH208 - hidden files count
