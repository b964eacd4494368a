"""How a notebook shows what nnpatch gives: pictures as pictures, texts as they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from matplotlib.figure import Figure

from nnpatch_core import (
    Outcome,
    PromptPairs,
    Sites,
    activation_patching,
    attribution_patching,
    plan_sweep,
)
from nnpatch_core.errors import OutcomeError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

EVIL = "<script>alert(1)</script>$x$&amp;"
SOURCE, TARGET = [f"The capital of France is {EVIL}"], [f"The capital of Japan is {EVIL}"]
TOKENIZER = tiny_tokenizer([*SOURCE, *TARGET, " Paris Tokyo"])
PAIRS = PromptPairs.from_texts(SOURCE, TARGET, [" Paris"], [" Tokyo"], TOKENIZER)
SITES = Sites(["resid", "v"], seq_pos_type="each")


def sweep(kind: Callable[..., Any] = activation_patching, **options: Any) -> Outcome:
    return kind(tiny_model(), tiny_api(), SITES, PAIRS, progress=False, **options)


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("kind", ["outcome", "agreement"])
def test_a_picture_is_shown_as_one(kind: str, tmp_path: Path) -> None:
    out = sweep()
    figure = out.plot() if kind == "outcome" else sweep(attribution_patching).agreement(out).plot()
    assert isinstance(figure, Figure)
    png = figure._repr_png_()
    assert png.startswith(b"\x89PNG")
    width, height = int.from_bytes(png[16:20]), int.from_bytes(png[20:24])
    assert (width, height) == pytest.approx(figure.get_size_inches() * figure.dpi, abs=1)
    figure.savefig(tmp_path / "out.svg")
    assert pickle.loads(pickle.dumps(figure))._repr_png_().startswith(b"\x89PNG")


def test_a_figure_is_written_by_savefig() -> None:
    """nnsight gives each object a `save`, which is about traces."""
    with pytest.raises(OutcomeError, match="savefig"):
        sweep().plot().save("out.png")


def test_an_outcome_says_what_it_is_of() -> None:
    out = attrs.evolve(sweep(), info={**sweep().info, "model": EVIL, "fallback": EVIL})
    read = Reader(out._repr_html_())
    assert set(read.tags) <= {"div", "p", "b", "table", "tr", "th", "td"}
    for words in (
        "Outcome: activation",
        "logit_difference, restored (0 target, 1 source)",
        EVIL,
        f"1 of {PAIRS.source_tokens.shape[1]} tokens",
        out.info["adapter"],
        out.info["engine"],
        f"[3, {PAIRS.source_tokens.shape[1]}, 2] layer, position, kv_head",
        f"{out['v'].max():.3f}",
        f"{out['v'].min():.3f}",
        f"{out.strongest(1)[0]['value']:.3f}",
    ):
        assert words in read.text
    for row in out.top(5):
        assert f"'{row['token']}'" in read.text
        assert row["layers"] in read.text
    assert out.top().notes[0] in read.text


def test_an_outcome_of_which_little_is_known() -> None:
    """Runs that gave nan, sites of a list, cells that nothing ran."""
    out = sweep()
    raw = {
        out.metric: {name: torch.full_like(out.raw[out.metric][name], torch.nan) for name in out}
    }
    assert "nan" in Reader(attrs.evolve(out, raw=raw)._repr_html_()).text
    part = Sites.from_sites(SITES.get_sites_dict(tiny_model(), tiny_api(), PAIRS)["resid"][:2])
    listed = activation_patching(tiny_model(), tiny_api(), part, PAIRS, progress=False)
    assert listed.strongest(1)[0]["label"] in Reader(listed._repr_html_()).text


def test_texts_are_shown_as_they_are() -> None:
    out = sweep()
    shown = {
        "pairs": PAIRS._repr_html_(),
        "agreement": sweep(attribution_patching).agreement(out)._repr_html_(),
        "plan": plan_sweep(tiny_model(), tiny_api(), SITES, PAIRS)._repr_html_(),
    }
    for page in (*shown.values(), out._repr_html_()):
        assert "script" not in Reader(page).tags
        assert page.startswith('<div class="tex2jax_ignore mathjax_ignore">'), "no formulas"
    assert repr(SOURCE[0]) in Reader(shown["pairs"]).text


def test_not_all_pairs_are_shown() -> None:
    many = PromptPairs.from_texts(SOURCE * 7, TARGET * 7, [" Paris"] * 7, [" Tokyo"] * 7, TOKENIZER)
    read = Reader(many._repr_html_())
    assert read.text.count(repr(SOURCE[0])) == 5
    assert "and 2 more" in read.text


def test_plotly_reads_no_markup() -> None:
    figure = sweep().plot(interactive=True)
    for label in figure.layout.xaxis.ticktext:
        assert "<" not in label
        assert "$" not in label
