"""Work in shares that are about even."""

from __future__ import annotations

import heapq

import numpy as np

from nnpatch_core._arrays import Integers


def even_shares(work: Integers, count: int) -> Integers:
    """Which of `count` shares each piece of work is in, `[pieces]`.

    The largest first, each to the share with the least: the heaviest share is at most a third
    heavier than the best that can be (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).

    Args:
        work: `[pieces]`, how much each is.
        count: of shares.
    """
    shares = np.zeros(len(work), dtype=np.int32)
    least = [(0, share) for share in range(count)]
    for piece in np.argsort(-work, kind="stable").tolist():
        taken, share = heapq.heappop(least)
        shares[piece] = share
        heapq.heappush(least, (taken + int(work[piece]), share))
    return shares
