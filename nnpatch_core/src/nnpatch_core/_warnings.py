"""Warnings that point at the user's line, from however deep inside the package."""

from __future__ import annotations

import sys
import warnings

from nnpatch_core._printable import printable

_PACKAGE = __name__.partition(".")[0]


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost frame that is not of this package, in printable text."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message, keep="\n\t"), category, stacklevel=level)
