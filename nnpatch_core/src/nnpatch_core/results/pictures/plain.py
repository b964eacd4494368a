"""Figures that other rooms draw themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nnpatch_core._extras import extra

if TYPE_CHECKING:
    from nnpatch_core.results.pictures.fonts import Letters


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


def letters_of(texts: Iterable[str]) -> Letters:
    """The fonts that can draw some texts.

    Raises:
        OutcomeError: matplotlib is not installed.
    """
    extra("matplotlib.figure", "plot")
    from nnpatch_core.results.pictures.fonts import Letters

    return Letters.of(texts)
