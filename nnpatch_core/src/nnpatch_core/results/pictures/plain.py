"""A figure for pictures that are no panels of an outcome."""

from __future__ import annotations

from typing import Any

from nnpatch_core._extras import extra

_DOTS = 100


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, so many inches wide and high, that a notebook shows.

    Raises:
        OutcomeError: matplotlib is not installed.
    """
    extra("matplotlib", "plot")
    # Imported here, as matplotlib is optional.
    from nnpatch_core.results.pictures.figure import Picture

    figure = Picture(figsize=(width, height), dpi=_DOTS)
    figure.set_layout_engine("constrained")
    return figure
