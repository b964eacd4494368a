"""A bar of cells, which tells how many need no run, and how long the rest will take."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any

import attrs
from tqdm.auto import tqdm

from nnpatch_core._arrays import Booleans

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"
#: Values that leave the bars of `TQDM_DISABLE` shown.
_NO = ("", "0", "false", "no", "off")


def is_shown(asked: bool) -> bool:
    """Whether there are bars: not where `TQDM_DISABLE` is set, whoever asked for one."""
    # tqdm reads its own variables once, on import, and an argument overrides them.
    return asked and os.environ.get("TQDM_DISABLE", "").strip().lower() in _NO


def make_bar(total: int | None, shown: bool, **options: Any) -> Any:
    """A bar of tqdm's, a widget in a notebook; see `is_shown`."""
    return tqdm(
        total=total, disable=not is_shown(shown), mininterval=_interval(), leave=True, **options
    )


def _interval() -> float:
    """How many seconds a bar is left alone: longer where each state is kept, as in a log."""
    isatty = getattr(sys.stderr, "isatty", None)
    return 0.1 if isatty is not None and isatty() else 1.0


@attrs.define
class _Stretch:
    """Pairs of cell and prompt: how many, those that are known, work, and when begun."""

    size: int
    elided: int
    pairs: int
    work: float
    ran: float = 0.0
    since: float = attrs.field(factory=lambda: time.monotonic())


class Progress:
    """The bar of one sweep; a cell counts by the share of its prompts.

    The estimate goes by work, not by cells: a cell at an early token costs more than one at a late
    one. There is none until something was run.

    Args:
        cells: how many there are.
        batch: the number of prompts.
        shown: whether there is a bar at all.
    """

    def __init__(self, cells: int, batch: int, shown: bool) -> None:
        self._batch = batch
        self._size = cells * batch
        self._stretches: dict[tuple[int, int], _Stretch] = {}
        self._now = _Stretch(0, 0, 0, 0.0)
        self._bar = make_bar(cells, shown, bar_format=_FORMAT)
        self._interval = _interval()
        self._drawn = -self._interval

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def begin(
        self,
        chunk: slice,
        engine: str,
        work: float,
        elided: Booleans,
        done: Booleans,
        first_cell: int = 0,
    ) -> None:
        """Some prompts begin, or begin again in another engine.

        Args:
            chunk: which prompts.
            engine: which engine runs them.
            work: their cost, in any unit.
            elided: `[cells, prompts]`: those that need not be run.
            done: `[cells, prompts]`: those that an earlier call has run.
            first_cell: the first of the cells, where they are run in several groups.
        """
        self._bar.set_description_str(f"{engine} engine", refresh=False)
        known = int((elided | done).sum())
        self._now = _Stretch(done.size, int(elided.sum()), known, work)
        self._stretches[first_cell, chunk.start] = self._now
        self._show(at_once=True)

    def advance(self, pairs: int, work: float) -> None:
        """So many pairs of cell and prompt were run, at so much work."""
        self._now.pairs += pairs
        self._now.ran += work
        self._show()

    @property
    def known(self) -> float:
        """The share of all pairs of cell and prompt that need no run any more, from 0 to 1."""
        return sum(each.pairs for each in self._stretches.values()) / self._size

    def left(self) -> float | None:
        """About how many seconds the rest will take; None before anything was run."""
        now = self._now
        if not now.ran:
            return None
        # What has not begun is taken to cost as much as this.
        later = self._size - sum(each.size for each in self._stretches.values())
        left = now.work - now.ran + now.work * later / now.size
        return (time.monotonic() - now.since) / now.ran * left

    def _show(self, at_once: bool = False) -> None:
        elided = sum(each.elided for each in self._stretches.values())
        words = [f"{elided / self._batch:.0f} elided"] if elided else []
        left = self.left()
        if left is not None:
            words.append(f"about {tqdm.format_interval(left)} left")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.n = sum(each.pairs for each in self._stretches.values()) // self._batch
        now = time.monotonic()
        if at_once or now - self._drawn >= self._interval:
            self._drawn = now
            self._bar.refresh()
