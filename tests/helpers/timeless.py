"""The words of an outcome on where it comes from, as far as another run has them too."""

from __future__ import annotations

from collections.abc import Mapping

#: What is another in each run.
TIMES = ("started", "seconds")


def timeless(info: Mapping[str, str]) -> dict[str, str]:
    return {name: words for name, words in info.items() if name not in TIMES}
