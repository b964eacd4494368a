"""Pictures of outcomes and of agreements, as matplotlib or as interactive plotly figures.

A picture is made in steps: the cells become panels or points (`outcome`, `agreement`), lines where
nothing was swept or run are left out (`crop`), panels find their places (`layout`), and a library
draws (`heatmap`, `scatter`). Both libraries are optional, and imported where they draw.
"""

from nnpatch_core.results.pictures.agreement import draw_agreement
from nnpatch_core.results.pictures.beside import draw_beside
from nnpatch_core.results.pictures.outcome import draw_combination, draw_outcome
from nnpatch_core.results.pictures.request import PictureKind, PlotOptions

__all__ = [
    "PictureKind",
    "PlotOptions",
    "draw_agreement",
    "draw_beside",
    "draw_combination",
    "draw_outcome",
]
