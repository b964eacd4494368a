"""A bar of cells, with what need not be run, and an estimate of what is left."""

from __future__ import annotations

import time
from types import TracebackType

from tqdm import tqdm

from nnpatch_core.engine.rows import Booleans

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"


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
        self._begun = 0
        self._elided = 0
        self._pairs = 0
        self._known = 0.0
        self._ran = 0.0
        self._since = time.monotonic()
        self._bar = tqdm(total=cells, bar_format=_FORMAT, disable=not shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def begin(self, engine: str, work: float, elided: Booleans, done: Booleans) -> None:
        """Some prompts begin.

        Args:
            engine: which engine runs them.
            work: what they cost, in any unit.
            elided: `[cells, prompts]`: what need not be run.
            done: `[cells, prompts]`: what was run by an earlier call.
        """
        self._bar.set_description_str(f"{engine} engine", refresh=False)
        self._begun += done.shape[1]
        self._known += work
        self._elided += int(elided.sum())
        self._count(int((elided | done).sum()))

    def advance(self, pairs: int, work: float) -> None:
        """So many pairs of cell and prompt were run, at so much work."""
        self._ran += work
        self._count(pairs)

    def left(self) -> float | None:
        """About how many seconds the rest will take; None before anything was run."""
        if not self._ran:
            return None
        # Prompts that have not begun are taken to cost as much as those that have.
        total = self._known * self._batch / self._begun
        return (time.monotonic() - self._since) / self._ran * (total - self._ran)

    def _count(self, pairs: int) -> None:
        self._pairs += pairs
        words = [f"{self._elided / self._batch:.0f} elided"] if self._elided else []
        left = self.left()
        if left is not None:
            words.append(f"about {tqdm.format_interval(left)} left")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.n = self._pairs // self._batch
        self._bar.refresh()
