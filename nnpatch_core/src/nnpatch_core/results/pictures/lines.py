"""The lines of charts: which have a colour, the same in all charts, and which are grey."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from nnpatch_core.results.pictures.colours import FAINT, distinct
from nnpatch_core.results.pictures.panels import Panel

#: So many lines can be told from each other.
_MOST = 8
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@attrs.frozen
class Line:
    """One line: its label, its colour, and its marker, as matplotlib names it."""

    label: str
    colour: str
    marker: str


@attrs.frozen
class Legend:
    """The lines that have a colour, and one entry for the others."""

    named: tuple[Line, ...]
    others: int

    @property
    def entries(self) -> tuple[Line, ...]:
        """The lines of a legend; none for a single line, which the title names."""
        if not self.others:
            return self.named if len(self.named) > 1 else ()
        others = "1 other" if self.others == 1 else f"{self.others} others"
        return (*self.named, Line(others, FAINT, ""))

    def find(self, label: str) -> Line | None:
        """The line of a label; None for one that is grey."""
        return next((each for each in self.named if each.label == label), None)


def legend_of(panels: Sequence[Panel]) -> Legend:
    """The lines of charts that share their colours: those that reach furthest have one.

    Lines whose bands hold 0 at every layer have none.
    """
    reach: dict[str, float] = {}
    for each in panels:
        for label, values in zip(each.across, each.values.T, strict=True):
            seen = np.abs(values[np.isfinite(values)]).max(initial=-1.0)
            reach[label] = max(reach.get(label, -1.0), float(seen))
    shown = [label for label in reach if reach[label] >= 0]
    sure = [label for label in shown if label not in unsure(panels)]
    first = sorted(sure, key=lambda label: -reach[label])[:_MOST]
    labels = [label for label in shown if label in first]
    styles = zip(labels, distinct(len(labels)), _MARKERS, strict=False)
    return Legend(tuple(Line(*style) for style in styles), len(shown) - len(labels))


def unsure(panels: Sequence[Panel]) -> set[str]:
    """The lines whose bands hold 0 wherever they are drawn, in every chart."""
    told: dict[str, bool] = {}
    for each in panels:
        drawn = np.isfinite(each.values)
        away = drawn & ~each.unsure
        for column, label in enumerate(each.across):
            if drawn[:, column].any():
                told[label] = told.get(label, False) or bool(away[:, column].any())
    return {label for label, is_away in told.items() if not is_away}
