"""Pictures in a notebook: a real kernel runs the cells, and what it shows is looked at."""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[2]
SETUP = """
import sys
sys.path[:0] = {path}
from tests.helpers.made_up import head_axis, layer_axis, outcome, position_axis
out = outcome({{"resid": (layer_axis(), position_axis())}})
heads = outcome({{"o": (layer_axis(), head_axis())}})
"""


def run(*cells: str) -> list[list[Any]]:
    """The outputs of each cell; the kernel of the name is that of this Python."""
    made = nbformat.v4.new_notebook()
    setup = SETUP.format(path=[str(ROOT), *sys.path])
    made.cells = [nbformat.v4.new_code_cell(cell) for cell in (setup, *cells)]
    nbclient.NotebookClient(made, timeout=300, kernel_name="python3").execute()
    return [cell.outputs for cell in made.cells[1:]]


def data(outputs: Sequence[Any]) -> dict[str, Any]:
    """What a cell of one output shows, by its kind."""
    (output,) = outputs
    assert output.output_type in ("display_data", "execute_result"), output
    return dict(output.data)


def test_a_notebook_shows_pictures() -> None:
    plain, page, lines, into = run(
        "out.plot()",
        "out.plot(interactive=True)",
        "heads.plot(kind='lines')",
        "import matplotlib.pyplot as plt\n"
        "figure, axes = plt.subplots(1, 2, figsize=(10, 4))\n"
        "out.plot(ax=axes[0]), heads.plot(ax=axes[1])\n"
        "plt.show()",
    )
    for outputs in (plain, lines, into):
        picture = matplotlib.image.imread(
            io.BytesIO(base64.b64decode(data(outputs)["image/png"])), format="png"
        )
        height, width, _ = picture.shape
        assert width > 300
        assert height > 200
        assert len({tuple(dot) for dot in picture[::7, ::7].reshape(-1, picture.shape[-1])}) > 20
    figure = data(page)["application/vnd.plotly.v1+json"]
    assert figure["data"][0]["type"] == "heatmap"
    assert json.dumps(figure["layout"]).count("made-up-135m-instruct") == 1
