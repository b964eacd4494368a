"""Words on how a sweep went, which batches of it add up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nnpatch_core.results.parts import Cells


def runs_known(cells: Iterable[Cells]) -> tuple[int, int]:
    """How many patched runs were known without running, and how many there are."""
    known = [each.known for each in cells]
    return sum(int(each.sum()) for each in known), sum(each.numel() for each in known)


def known_in_words(known: int, every: int) -> str:
    """Of patched runs.

    Examples:
        >>> known_in_words(3, 12)
        '3 of 12 patched runs were known without running'
    """
    return f"{known} of {every} patched runs were known without running"


class Merged:
    """The `info` of batch after batch, as that of one sweep: times add up, and it began once."""

    def __init__(self) -> None:
        self._words: dict[str, dict[str, None]] = {}
        self._seconds = 0.0
        self._known = self._every = 0

    def add(self, info: Mapping[str, str], cells: Iterable[Cells]) -> None:
        """Add the words of the next batch, and its cells."""
        for key, value in info.items():
            self._words.setdefault(key, {})[value] = None
        self._seconds += _number(info.get("seconds"))
        known, every = runs_known(cells)
        self._known, self._every = self._known + known, self._every + every

    def info(self) -> dict[str, str]:
        """The words of all batches; those that differ, one after the other."""
        joined = {key: ", ".join(values) for key, values in self._words.items()}
        first = {key: next(iter(values)) for key, values in self._words.items()}
        own = {
            "elided": known_in_words(self._known, self._every),
            "started": first.get("started", ""),
            "seconds": f"{self._seconds:.3f}",
            "environment": "; ".join(self._words.get("environment", ())),
        }
        return {**joined, **{key: value for key, value in own.items() if key in joined}}


def _number(text: str | None) -> float:
    # A file from elsewhere may say anything.
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
