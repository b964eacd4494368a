"""Numbers as people write them in a line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nnpatch_core._printable import shown
from nnpatch_core.errors import SettingsError

_RANGE = re.compile(r"(\d+)-(\d+)")
_NUMBER = re.compile(r"-?\d+")
#: A list that is longer was not meant.
_MOST = 100_000


def read_numbers(name: str, parts: Sequence[str]) -> list[int] | None:
    """The numbers that parts such as `0-5` and `8` stand for; None if there are none.

    Raises:
        SettingsError: one is no number and no range.

    Examples:
        >>> read_numbers("layers", ["0-2", "8"])
        [0, 1, 2, 8]
    """
    found: list[int] = []
    for part in parts:
        between = _RANGE.fullmatch(part)
        if between is not None:
            first, last = map(int, between.groups())
            if not first <= last < first + _MOST:
                raise SettingsError(
                    f"{name}: {shown(part)} is no range: its end is below its start"
                )
            found += range(first, last + 1)
        elif _NUMBER.fullmatch(part):
            found.append(int(part))
        else:
            raise SettingsError(f"{name}: {shown(part)} is no number, and no range such as 0-5")
    return found or None
