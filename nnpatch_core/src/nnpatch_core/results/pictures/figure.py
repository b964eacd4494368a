"""A matplotlib figure that a notebook shows; imported where a picture is drawn."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from nnpatch_core.errors import OutcomeError


class Picture(Figure):
    """A figure that pyplot does not know, so that nobody has to close it.

    A notebook shows those of pyplot alone; this one says itself how it looks.
    """

    def _repr_png_(self) -> bytes:
        written = io.BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()

    def save(self, *args: Any, **options: Any) -> None:
        """No method of a figure: nnsight gives each object one, which is about traces."""
        raise OutcomeError("a matplotlib figure is written by savefig(path), not by save")
