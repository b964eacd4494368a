"""Pictures of an outcome: what stands where, and in which colour."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnpatch_core import MultiSite, Outcome, Site, Sites, activation_patching
from nnpatch_core.errors import OutcomeError
from nnpatch_core.testing import tiny_api, tiny_model, tiny_tokenizer

WORDS = "The capital of France Japan is"
TOKENIZER = tiny_tokenizer([WORDS])
SOURCE = torch.tensor([TOKENIZER("The capital of France is").input_ids])
TARGET = torch.tensor([TOKENIZER("The capital of Japan is").input_ids])
TOKENS = ("The", "capital", "of", "France|Japan", "is")


def sweep(sites: Any, **options: Any) -> Outcome:
    answers = (torch.tensor([1]), torch.tensor([2]))
    arguments = {"progress": False, "tokenizer": TOKENIZER, **options}
    return activation_patching(
        tiny_model(), tiny_api(), sites, SOURCE, TARGET, *answers, **arguments
    )


def images(figure: Any) -> dict[str, Any]:
    """Title to numbers, of each panel of a matplotlib figure."""
    panels = [axis for axis in figure.axes if axis.images]
    return {axis.get_title(): np.ma.filled(axis.images[0].get_array(), np.nan) for axis in panels}


def labels(axis: Any) -> tuple[list[str], list[str]]:
    return (
        [label.get_text() for label in axis.get_xticklabels()],
        [label.get_text() for label in axis.get_yticklabels()],
    )


@pytest.mark.parametrize(
    ("sites", "rows", "columns"),
    [
        (Sites("resid"), ["0", "1", "2"], [""]),
        (Sites("resid", seq_pos_type="each"), ["0", "1", "2"], list(TOKENS)),
        (Sites("k", seq_pos_type="last"), ["0", "1", "2"], ["0", "1"]),
        (Sites("k", seq_pos_type="each"), ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"], list(TOKENS)),
    ],
)
def test_layers_up_and_tokens_or_heads_across(
    sites: Sites, rows: list[str], columns: list[str]
) -> None:
    out = sweep(sites)
    (name,) = out
    figure = out.plot(kind="heatmap")
    assert labels(figure.axes[0]) == (columns, rows)
    numbers = images(figure)[name]
    assert numbers.shape == (len(rows), len(columns))
    for row, column in np.ndindex(*numbers.shape):
        layer, _, head = rows[row].partition(".")
        place = [int(layer)]
        if sites.strategy.one_by_one:
            place.append(column)
        if name == "k":
            place.append(int(head) if head else column)
        assert numbers[row, column] == out[name][tuple(place)].item()


def test_one_panel_a_component_and_one_scale_centred_on_0() -> None:
    out = sweep(Sites(["resid", "attn", "mlp"], layers=[0, 2], seq_pos_type="each"))
    figure = out.plot()
    assert list(images(figure)) == ["resid", "attn", "mlp"]
    limits = {axis.images[0].get_clim() for axis in figure.axes if axis.images}
    ((low, high),) = limits
    assert low == -high == -max(out[name].abs().max().item() for name in out)
    for name, numbers in images(figure).items():
        assert np.array_equal(np.isnan(numbers), ~out.swept(name).numpy())


def test_sites_of_ones_own_are_rows() -> None:
    parts = [Site.get_site(tiny_api(), name, 1, seq_pos=[-1]) for name in ("attn", "mlp")]
    out = sweep(Sites.from_sites([*parts, MultiSite(parts, name="both")]))
    figure = out.plot(sites=["both"], kind="heatmap")
    assert labels(figure.axes[0])[1] == ["attn L1 [-1] + mlp L1 [-1]"]
    assert images(figure)["both"].tolist() == [[out["both"][0].item()]]
    (bars,) = out.plot(sites=["both"]).axes
    assert labels(bars)[1] == ["attn L1 [-1] + mlp L1 [-1]"]
    assert [bar.get_width() for bar in bars.patches] == [out["both"][0].item()]


def test_interactive_figure_says_the_same() -> None:
    out = sweep(Sites(["resid", "k"], layers=[1], seq_pos_type="each"))
    figure = out.plot(interactive=True, title="Mine", limit=2.0, crop=False, values=False)
    assert figure.layout.title.text == "Mine"
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmid) == (-2, 0)
    assert figure.layout.xaxis.ticktext == TOKENS
    resid, k = figure.data
    assert np.allclose(resid.z[1], out["resid"][1].tolist())
    assert np.isnan(np.array(resid.z[0], dtype=float)).all()
    assert np.allclose(k.z[3], out["k"][1, :, 1].tolist())
    assert resid.customdata[1][3] == f"1, France|Japan<br>{out['resid'][1, 3].item():.3f}"


def test_files(tmp_path: Path) -> None:
    out = sweep(Sites("resid", seq_pos_type="each"))
    out.plot().savefig(tmp_path / "out.png")
    out.plot(interactive=True).write_html(tmp_path / "out.html")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out.html").read_text()
    assert "France|Japan" in page
    assert 'src="http' not in page, "the page must be readable without a network"


def test_title_names_model_kind_and_metric() -> None:
    model = tiny_model()
    model.config._name_or_path = "somewhere/on/disk/my-model/"
    answers = (torch.tensor([1]), torch.tensor([2]))
    out = activation_patching(
        model, tiny_api(), Sites("resid"), SOURCE, TARGET, *answers, progress=False
    )
    assert out.plot().get_suptitle() == "my-model: activation, logit_difference"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"limit": 0}, "limit .* got 0"),
        ({"limit": -1.5}, "limit .* got -1.5"),
        ({"limit": float("nan")}, "limit .* got nan"),
        ({"sites": []}, "nothing to draw"),
    ],
)
@pytest.mark.parametrize("interactive", [False, True])
def test_bad_options(options: Any, says: str, interactive: bool) -> None:
    with pytest.raises(OutcomeError, match=says):
        sweep(Sites("resid")).plot(interactive=interactive, **options)


def test_site_that_was_not_swept() -> None:
    with pytest.raises(KeyError, match="'mlp' was not swept"):
        sweep(Sites("resid")).plot(sites=["mlp"])


@pytest.mark.parametrize(("library", "interactive"), [("matplotlib", False), ("plotly", True)])
def test_library_that_is_not_installed(
    library: str, interactive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = sweep(Sites("resid"))
    for module in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    found = builtins.__import__

    def missing(name: Any, *rest: Any) -> Any:
        if name.partition(".")[0] == library:
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(OutcomeError, match=rf"needs {library}: pip install 'nnpatch-core\[plot\]'"):
        out.plot(interactive=interactive)
