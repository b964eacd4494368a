"""Run by the `pictures` session: draws every kind of picture, and looks at each as it is rendered.

Static pictures are written as PNG and SVG, interactive ones as pages, which a headless Chromium
opens as wide as a desktop and as a phone. No text may cover another, and none may be cut off; a
page may say nothing on its console. The pictures of docs/pictures.md are drawn anew by `--publish`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import attrs  # noqa: E402

from nnpatch_core import PromptPairs, Sites, activation_patching, attribution_patching  # noqa: E402
from nnpatch_core.circuits import Circuit  # noqa: E402
from nnpatch_core.sites import Axis  # noqa: E402
from nnpatch_core.testing import tiny_model, tiny_tokenizer  # noqa: E402
from tests.helpers.circuits import made_circuit, made_edges, nodes_of  # noqa: E402
from tests.helpers.made_up import (  # noqa: E402
    PLAIN,
    STRANGE,
    head_axis,
    layer_axis,
    outcome,
    position_axis,
)

DOCS = ROOT / "docs" / "_static" / "pictures"
#: The widths of pages that are looked at, in pixels.
WIDTHS = {"desktop": (1400, 900), "phone": (390, 844)}
#: So many pixels may two texts share, for their boxes are larger than their letters.
SHARED = 2.5
#: As far as text may be below the edge of a page, in pixels.
EDGE = 2.0

Figures = Callable[[bool], Any]


def blocks(tokens: Any = PLAIN, layers: int = 12) -> dict[str, tuple[Axis, ...]]:
    axes = (layer_axis(layers), position_axis(tokens))
    return dict.fromkeys(("resid", "attn", "mlp"), axes)


def long(count: int) -> list[str]:
    return [PLAIN[number % len(PLAIN)] for number in range(count)]


SPAN = Axis("span", ("subject", "second subject", "verb", "end"))
LISTED = Axis(
    "site",
    ("attn L5 [-1]", "mlp L5 [-1]", "o L9 H6 [-1]", "the name movers, all of them together",
     "o L3 H0 ' John'", "q L7 H3 [-1]", "resid L11 [-1]"),
)  # fmt: skip


def gallery() -> dict[str, Figures]:
    """The name of each picture, and what draws it, interactive or not."""
    plain = outcome(blocks())
    small = outcome(blocks(PLAIN[:5], 6), PLAIN[:5])
    strange = outcome(blocks(STRANGE), STRANGE, differs=1)
    heads = outcome(
        {"q": (layer_axis(), head_axis()), "k": (layer_axis(), head_axis(2, "kv_head"))}
    )
    at_one = outcome({"o": (layer_axis(), position_axis(), head_axis())}, only=[13])
    many_heads = outcome(
        {"o": (layer_axis(30), position_axis(PLAIN[:9]), head_axis(32))}, PLAIN[:9]
    )
    few_heads = outcome({"v": (layer_axis(6), position_axis(PLAIN[:5]), head_axis(3, "kv_head"))},
                        PLAIN[:5])  # fmt: skip
    spans = outcome({name: (layer_axis(), SPAN) for name in ("resid", "attn", "mlp")}, differs=2)
    span_heads = outcome({"o": (layer_axis(), SPAN, head_axis())})
    listed = outcome({"chosen": (LISTED,)})
    one_list = outcome({"a": (Axis("site", ("mlp L1 [-1]",)),)})
    over_layers = outcome({name: (layer_axis(),) for name in ("resid", "attn", "mlp")})
    metrics = ("logit_difference", "answer_probability", "own")
    changes = outcome(blocks(), scale="change", metrics=metrics, kind="ablation (zero)", size=0.1)
    shares = outcome(blocks(), metrics=metrics[:2])
    other = outcome(blocks(), seed=1, kind="attribution")
    few = outcome(blocks(), batch=3)
    tiny = outcome(blocks(), size=0.006)
    some = outcome(blocks(), layers=[3, 4], only=[3, 4, 9, 13])
    return {
        "heatmap": lambda page: plain.plot(interactive=page),
        "heatmap-one": lambda page: plain.plot(interactive=page, sites=["resid"]),
        "heatmap-values-marked": lambda page: small.plot(interactive=page, mark=3),
        "heatmap-unmuted": lambda page: plain.plot(interactive=page, mute=None, mark=5),
        "heatmap-strange": lambda page: strange.plot(interactive=page),
        "heatmap-few-prompts": lambda page: few.plot(interactive=page),
        "heatmap-tiny-effects": lambda page: tiny.plot(interactive=page),
        "heatmap-some": lambda page: some.plot(interactive=page),
        "heatmap-some-kept": lambda page: some.plot(interactive=page, crop=False),
        "heatmap-chosen": lambda page: plain.plot(
            interactive=page, layers=range(4, 9), positions=[3, 9, 13]
        ),
        "heatmap-sized": lambda page: plain.plot(interactive=page, size=(7, 4)),
        "heatmap-80": lambda page: outcome(blocks(long(80)), long(80), differs=20).plot(
            interactive=page
        ),
        "heatmap-500": lambda page: outcome(blocks(long(500)), long(500), differs=20).plot(
            interactive=page
        ),
        "heads": lambda page: heads.plot(interactive=page, mark=3),
        "heads-at-one-position": lambda page: at_one.plot(interactive=page),
        "heads-few": lambda page: few_heads.plot(interactive=page),
        "heads-many": lambda page: many_heads.plot(interactive=page),
        "spans": lambda page: spans.plot(interactive=page),
        "spans-heads": lambda page: span_heads.plot(interactive=page),
        "lines": lambda page: over_layers.plot(interactive=page, mark=2),
        "lines-low": lambda page: spans.plot(
            interactive=page, kind="lines", sites=["attn"], size=(5, 3)
        ),
        "lines-spans": lambda page: spans.plot(interactive=page, kind="lines"),
        "lines-positions": lambda page: plain.plot(interactive=page, kind="lines"),
        "lines-heads": lambda page: heads.plot(interactive=page, kind="lines"),
        "lines-strange": lambda page: strange.plot(
            interactive=page, kind="lines", sites=["resid"]
        ),
        "bars": lambda page: listed.plot(interactive=page, mark=1),
        "bars-values": lambda page: listed.plot(interactive=page, values=True),
        "bars-low": lambda page: plain.plot(interactive=page, kind="bars", size=(5, 3)),
        "bars-one": lambda page: one_list.plot(interactive=page),
        "bars-of-grids": lambda page: plain.plot(interactive=page, kind="bars"),
        "bars-strange": lambda page: strange.plot(interactive=page, kind="bars", mute=None),
        "metrics-restored": lambda page: shares.plot(interactive=page, metrics="all"),
        "metrics-change": lambda page: changes.plot(interactive=page, metrics="all"),
        "metrics-lines": lambda page: outcome(
            {"resid": (layer_axis(),)}, metrics=metrics[:2], scale="change"
        ).plot(interactive=page, metrics="all"),
        "metrics-bars": lambda page: outcome(
            {"chosen": (LISTED,)}, metrics=metrics[:2], scale="change"
        ).plot(interactive=page, metrics="all"),
        "change": lambda page: changes.plot(interactive=page),
        "beside": lambda page: plain.plot_beside(other, interactive=page),
        "beside-one": lambda page: plain.plot_beside(
            other, interactive=page, sites=["attn"], limit_difference="largest"
        ),
        "agreement": lambda page: plain.agreement(other).plot(interactive=page),
        "circuit": lambda page: graph(made_circuit(nodes_of(12, 12), 120), page),
        "circuit-few": lambda page: graph(made_circuit(nodes_of(4, 4, group=2), 12, seed=2), page),
        "circuit-groups": lambda page: graph(made_circuit(nodes_of(30, 9, group=3), 900), page),
        "circuit-parallel": lambda page: graph(
            made_circuit(nodes_of(6, 8, parallel=True), 60), page
        ),
        "circuit-estimates": lambda page: graph(partly_exact(), page),
        "circuit-plain": lambda page: graph(
            Circuit.of(nodes_of(1, 2), ["input->m0", "m0->logits", "input->a0.h1<v>"]), page
        ),
        "real": lambda page: swept().plot(interactive=page),
        "real-agreement": lambda page: swept(attribution_patching).agreement(swept()).plot(
            interactive=page
        ),
    }  # fmt: skip


@attrs.frozen
class Page:
    """A page, which is written as plotly's are."""

    text: str

    def write_html(self, path: Path) -> None:
        path.write_text(self.text, "utf-8")


def graph(circuit: Circuit, page: bool) -> Any:
    return Page(circuit.page()) if page else circuit.plot()


def partly_exact() -> Circuit:
    edges = made_edges(nodes_of(6, 4), few=1.2)
    exact = torch.from_numpy(edges.nodes.mask) & (edges.matrix.abs() > 0.15)
    return Circuit.from_edges(attrs.evolve(edges, exact=exact), n=120, method="greedy")


def swept(sweep: Callable[..., Any] = activation_patching) -> Any:
    """A sweep of a tiny random model."""
    texts = [f"The capital of {land} is" for land in ("France", "Japan", "Greece", "Spain")]
    tokenizer = tiny_tokenizer([*texts, " Paris Tokyo"])
    pairs = PromptPairs.from_texts(
        texts[:1] * 3, texts[1:], [" Paris"] * 3, [" Tokyo"] * 3, tokenizer
    )
    torch.manual_seed(0)
    return sweep(
        tiny_model(), None, Sites(["resid", "v"], seq_pos_type="each"), pairs, progress=False
    )


# The pictures of the page ------------------------------------------------------------------------

LANDS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid",
    "Russia": "Moscow", "Egypt": "Cairo", "Austria": "Vienna", "Norway": "Oslo",
}  # fmt: skip
OTHERS = {
    "Japan": "Tokyo", "Greece": "Athens", "China": "Beijing", "Cuba": "Havana",
    "Peru": "Lima", "Iraq": "Baghdad", "Ireland": "Dublin", "Hungary": "Budapest",
}  # fmt: skip


def publish(folder: Path) -> None:
    """Draw the pictures of docs/pictures.md: SmolLM2-135M, asked for the capitals of lands."""
    sys.path.insert(0, str(ROOT / "docs" / "examples"))
    import smollm2

    model, tokenizer = smollm2.load()
    pairs = PromptPairs.from_texts(
        [f"The capital of {land} is" for land in LANDS],
        [f"The capital of {land} is" for land in OTHERS],
        [f" {city}" for city in LANDS.values()],
        [f" {city}" for city in OTHERS.values()],
        tokenizer,
    )
    metric = ["logit_difference", "answer_probability"]
    sites = Sites(["resid", "attn", "mlp"], seq_pos_type="each")
    out = activation_patching(model, None, sites, pairs, metric=metric, progress=False)
    heads = activation_patching(model, None, Sites("o", seq_pos_type="last"), pairs, progress=False)
    estimate = attribution_patching(model, None, sites, pairs, progress=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in {
        "heatmap": out.plot(mark=3),
        "heads": heads.plot(limit="largest", mark=3),
        "lines": out.plot(kind="lines", sites=["attn", "mlp"]),
        "bars": out.plot(kind="bars", sites=["attn", "mlp"]),
        "beside": estimate.plot_beside(out, sites=["mlp"]),
        "metrics": out.plot(metrics="all", sites=["resid", "attn"], layers=range(15, 30)),
    }.items():
        figure.savefig(folder / f"{name}.png", dpi=80)


# Static pictures ---------------------------------------------------------------------------------


def static_faults(figure: Any) -> Iterator[str]:
    """Texts of a matplotlib figure that cover each other or are cut off."""
    inside = figure.bbox
    shown = _drawn_texts(figure)
    for text, _, box in shown:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > inside.x1 + 1 or box.y1 > inside.y1 + 1:
            yield f"{text!r} is cut off: {box.extents.round()} of {inside.extents}"
    for (one, slant, first), (other, slanted, second) in itertools.combinations(shown, 2):
        if slant % 90 and slanted % 90:
            if _slanted(first.extents[2:], second.extents[2:], 7):
                yield f"{one!r} covers {other!r}"
            continue
        if _overlap(first.extents, second.extents):
            yield f"{one!r} covers {other!r}"


def _drawn_texts(figure: Any) -> list[tuple[str, float, Any]]:
    """Each text as it is drawn, with its slant and its box: some are moved for that alone."""
    from matplotlib.text import Text

    drawn: dict[int, tuple[str, float, Any]] = {}
    original = Text.draw

    def draw(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent(renderer)
            drawn[id(text)] = (text.get_text(), text.get_rotation(), box)
        original(text, renderer)

    with mock.patch.object(Text, "draw", draw):
        figure.canvas.draw()
    return list(drawn.values())


def _overlap(one: Any, other: Any) -> bool:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return bool(across > SHARED and down > SHARED)


def _slanted(one: Any, other: Any, letter: float) -> bool:
    """Whether parallel labels that end at these places are nearer than letters are high.

    The boxes of slanted labels are much larger than the labels.
    """
    across, down = abs(one[0] - other[0]), abs(one[1] - other[1])
    return bool(down < 2 and across < 1.2 * letter)


# Pages -------------------------------------------------------------------------------------------

#: The texts of a page with their boxes, and how large the page is.
READ = """() => {
  const texts = [...document.querySelectorAll('svg text')]
    .filter(text => text.textContent.trim() && text.getBoundingClientRect().width
      && getComputedStyle(text).visibility !== 'hidden'
      && text.closest('.hoverlayer, .modebar') === null
      && Number(getComputedStyle(text).opacity) > 0)
    .map(text => {
      const box = text.getBoundingClientRect();
      const way = text.getCTM();
      const slanted = Math.abs(way.b) > 0.1 && Math.abs(way.a) > 0.1;
      const scrolled = text.closest('#graph') !== null;
      return {text: text.textContent, slanted, scrolled,
              box: [box.left + scrollX, box.top + scrollY,
                    box.right + scrollX, box.bottom + scrollY]};
    });
  const plots = [...document.querySelectorAll('.subplot .plot, .bglayer rect, .nsewdrag')]
    .map(each => each.getBoundingClientRect()).map(box => [box.width, box.height]);
  const page = document.documentElement;
  return {texts, plots, width: page.scrollWidth, height: page.scrollHeight};
}"""


def page_faults(read: dict[str, Any], phone: bool) -> Iterator[str]:
    """Texts of a page that cover each other or are cut off, and panels too small to be seen."""
    texts = read["texts"]
    for each in texts:
        left, top, right, bottom = each["box"]
        # The graph of a circuit is moved sideways within its page.
        if each["scrolled"]:
            right = min(right, read["width"])
        if left < -EDGE or top < -EDGE or right > read["width"] + EDGE:
            yield f"{each['text']!r} is cut off: {each['box']} of {read['width']}"
        if bottom > read["height"] + EDGE:
            yield f"{each['text']!r} is below the page: {each['box']} of {read['height']}"
    for one, other in itertools.combinations(texts, 2):
        if one["slanted"] and other["slanted"]:
            if _slanted(one["box"][2:0:-1], other["box"][2:0:-1], 7):
                yield f"{one['text']!r} covers {other['text']!r}"
            continue
        if _overlap(one["box"], other["box"]):
            yield f"{one['text']!r} covers {other['text']!r}"
    for width, height in read["plots"]:
        if 0 < width < 80 or 0 < height < 40:
            yield f"a panel has {width:.0f} x {height:.0f} pixels"
    if not phone and read["width"] > 1420:
        yield f"a desktop's page is {read['width']} pixels wide"


def look(pages: dict[str, Path], out: Path, chromium: str | None) -> list[str]:
    """Open pages in a headless Chromium, keep a picture of each, and say what is wrong."""
    from playwright.sync_api import sync_playwright

    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for device, (width, height) in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            said = _listen(page)
            for name, path in pages.items():
                said.clear()
                page.goto(path.as_uri())
                page.wait_for_selector("svg text")
                page.wait_for_timeout(150)
                read = page.evaluate(READ)
                page.screenshot(path=out / f"{name}-{device}.png", full_page=True)
                found = [*said, *page_faults(read, device == "phone")]
                faults += [f"{name}, {device}: {fault}" for fault in found]
            page.close()
        browser.close()
    return faults


def _listen(page: Any) -> list[str]:
    """What a page says on its console, and what it asks the network for, as it comes."""
    said: list[str] = []

    def asked(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            said.append(f"asks for {request.url}")

    page.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", asked)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("pictures"), help="folder for the pictures"
    )
    parser.add_argument("--only", default="", help="the beginning of the names of pictures")
    parser.add_argument("--chromium", help="the browser; by default that of playwright")
    parser.add_argument("--publish", action="store_true", help="draw those of docs/pictures.md too")
    parser.add_argument("--no-pages", action="store_true", help="draw static pictures alone")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    if told.publish:
        publish(DOCS)
    faults, pages = [], {}
    for name, draw in gallery().items():
        if not name.startswith(told.only):
            continue
        figure = draw(False)
        figure.savefig(told.out / f"{name}.png")
        figure.savefig(told.out / f"{name}.svg")
        faults += [f"{name}: {fault}" for fault in static_faults(figure)]
        if not told.no_pages:
            pages[name] = told.out.resolve() / f"{name}.html"
            draw(True).write_html(pages[name])
    if pages:
        faults += look(pages, told.out, told.chromium)
    for fault in faults:
        print(fault)  # noqa: T201
    if faults:
        sys.exit(f"{len(faults)} faults in {len(pages)} pictures")
    print(f"{len(pages)} pictures, each as a file and as a page of two widths: no faults")  # noqa: T201


if __name__ == "__main__":
    main()
