"""Drawing: a sheet becomes a figure of one of the two libraries."""

from __future__ import annotations

from typing import Any

from nnpatch_core._extras import extra
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.pictures.sheet import Sheet


def draw(sheet: Sheet, *, interactive: bool, ax: Any = None) -> Any:
    """Draw a sheet, by plotly if it is to be interactive and by matplotlib if not.

    Args:
        sheet: what is drawn.
        interactive: whether it is a page.
        ax: the axes of a matplotlib figure of the user's own, to be drawn into.

    Raises:
        OutcomeError: the library is not installed; axes for more than one panel.
    """
    if interactive:
        extra("plotly.graph_objects", "plot")
        from nnpatch_core.results.pictures.page import draw_page

        return draw_page(sheet)
    extra("matplotlib.figure", "plot")
    from nnpatch_core.results.pictures.static import draw_into, draw_static

    if ax is None:
        return draw_static(sheet)
    if len(sheet.panels) > 1:
        names = ", ".join(each.name for each in sheet.panels)
        raise OutcomeError(
            f"ax= has room for one panel, and there are {len(sheet.panels)} ({names}): name one "
            "site by sites="
        )
    return draw_into(sheet, ax)
