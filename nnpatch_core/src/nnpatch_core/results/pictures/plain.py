"""Figures that other rooms draw themselves."""

from __future__ import annotations

from typing import Any

from nnpatch_core._extras import extra


def new_picture(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, that a notebook shows.

    Raises:
        OutcomeError: matplotlib is not installed.
    """
    extra("matplotlib.figure", "plot")
    from nnpatch_core.results.pictures.figure import Picture

    figure = Picture(figsize=(width, height))
    figure.set_layout_engine("constrained")
    return figure
