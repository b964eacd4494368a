"""Pictures of outcomes and of agreements, as matplotlib or as interactive plotly figures.

A picture is made in steps: the arguments are read once (`request`), an outcome becomes grids and
how sure they are (`seen`, `certainty`), grids become panels of a kind (`kinds`, `panels`), lines
where nothing was swept or run are left out (`crop`), panels find their places (`layout`) and scales
(`scales`) on a sheet (`sheet`), and a library draws it: matplotlib in `static`, plotly in `page`.
Both libraries are optional, and imported where they draw.
"""

from nnpatch_core.results.pictures.agreement import draw_agreement
from nnpatch_core.results.pictures.beside import draw_beside
from nnpatch_core.results.pictures.colours import GUIDE, distinct
from nnpatch_core.results.pictures.kinds import kind_of
from nnpatch_core.results.pictures.outcome import draw_combination, draw_outcome
from nnpatch_core.results.pictures.plain import letters_of, new_picture
from nnpatch_core.results.pictures.request import PictureKind, PlotOptions

__all__ = [
    "GUIDE",
    "PictureKind",
    "PlotOptions",
    "distinct",
    "draw_agreement",
    "draw_beside",
    "draw_combination",
    "draw_outcome",
    "kind_of",
    "letters_of",
    "new_picture",
]
