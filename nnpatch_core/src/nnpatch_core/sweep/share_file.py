"""A checkpoint that is given to a sweep with what is wanted of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import attrs

from nnpatch_core.sweep.held import Held
from nnpatch_core.sweep.share import Share


@attrs.frozen
class ShareFile(os.PathLike[str]):
    """The checkpoint of one share: a sweep that is given it measures that share, and stops.

    Args:
        path: the file.
        share: what is measured; None is all of it, and the sweep gives its outcome.
        told: is told, as the sweep goes on, how much of all is measured or another share's, from 0
            to 1.
        held: what is known of its unpatched runs.
    """

    path: Path
    share: Share | None
    told: Callable[[float], object] = attrs.field(default=float, eq=False)
    held: Held = attrs.field(factory=Held, eq=False)

    def __fspath__(self) -> str:
        return os.fspath(self.path)
