"""A bar of cells, with what need not be run, and an estimate of what is left."""

from __future__ import annotations

import time
from types import TracebackType

import attrs
from tqdm import tqdm

from nnpatch_core.engine.rows import Booleans

_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} cells [{elapsed}{postfix}]"


@attrs.define
class _Chunk:
    """Some prompts: how many, the pairs of cell and prompt that are known, work, and when begun."""

    prompts: int
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
        self._chunks: dict[int, _Chunk] = {}
        self._now = _Chunk(0, 0, 0, 0.0)
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

    def begin(
        self, rows: slice, engine: str, work: float, elided: Booleans, done: Booleans
    ) -> None:
        """Some prompts begin, or begin again in another engine.

        Args:
            rows: which prompts.
            engine: which engine runs them.
            work: what they cost, in any unit.
            elided: `[cells, prompts]`: what need not be run.
            done: `[cells, prompts]`: what was run by an earlier call.
        """
        self._bar.set_description_str(f"{engine} engine", refresh=False)
        known = int((elided | done).sum())
        self._now = _Chunk(done.shape[1], int(elided.sum()), known, work)
        self._chunks[rows.start] = self._now
        self._show()

    def advance(self, pairs: int, work: float) -> None:
        """So many pairs of cell and prompt were run, at so much work."""
        self._now.pairs += pairs
        self._now.ran += work
        self._show()

    def left(self) -> float | None:
        """About how many seconds the rest will take; None before anything was run."""
        now = self._now
        if not now.ran:
            return None
        # Prompts that have not begun are taken to cost as much as these.
        later = self._batch - sum(chunk.prompts for chunk in self._chunks.values())
        left = now.work - now.ran + now.work * later / now.prompts
        return (time.monotonic() - now.since) / now.ran * left

    def _show(self) -> None:
        elided = sum(chunk.elided for chunk in self._chunks.values())
        words = [f"{elided / self._batch:.0f} elided"] if elided else []
        left = self.left()
        if left is not None:
            words.append(f"about {tqdm.format_interval(left)} left")
        self._bar.set_postfix_str(", ".join(words), refresh=False)
        self._bar.n = sum(chunk.pairs for chunk in self._chunks.values()) // self._batch
        self._bar.refresh()
