"""A matplotlib figure that a notebook shows; imported where a picture is drawn."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.figure import Figure

from nnpatch_core._printable import printable
from nnpatch_core.errors import OutcomeError

#: The width of a letter, as a share of its points, and the points of an inch.
_LETTER, _POINTS = 0.55, 72.0


class Picture(Figure):
    """A figure that pyplot does not know, so that nobody has to close it.

    A notebook shows those of pyplot alone; this one says itself how it looks.
    """

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()

    def say(self, place: str, text: str, points: float, **how: Any) -> None:
        """Write words that hold no formula above or below all else, in as many lines as they take.

        Matplotlib measures the lines of a text as if it might be a formula, whatever it was told,
        and fails at one that is none: so with two dollar signs the lines are made here.

        Args:
            place: the method that writes there, `"suptitle"` or `"supxlabel"`.
            text: the words.
            points: the size of the letters.
            **how: whatever else is to be said of them, such as `family`.
        """
        text = printable(text, keep="\n")
        formula = text.count("$") > 1
        if formula:
            wide = float(self.get_size_inches()[0]) * _POINTS / (points * _LETTER)
            text = textwrap.fill(text, max(20, int(wide)))
        getattr(self, place)(text, fontsize=points, wrap=not formula, **how).set_parse_math(False)

    def save(self, *args: Any, **options: Any) -> None:
        """No method of a figure: nnsight gives each object one, which is about traces."""
        raise OutcomeError("a matplotlib figure is written by savefig(path), not by save")
