"""Which edges make a circuit: the strongest, those over a threshold, or a way down from the logits.

Of edges that tie, the one comes first that comes first in the order of the model's edges.
"""

from __future__ import annotations

import heapq
from typing import Any, TypeAlias

import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.circuits.connected import feeds
from nnpatch_core.edges import Nodes
from nnpatch_core.errors import EdgeError

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


def ranked(scores: Floats, absolute: bool) -> Integers:
    """The places of all edges with a score in the flat matrix, strongest first.

    Args:
        scores: `[senders, receivers]`, nan where there is none.
        absolute: by size, not by value.

    Examples:
        >>> ranked(np.array([[1.0, -3.0], [np.nan, 1.0]]), absolute=True).tolist()
        [1, 0, 3]
    """
    flat = _keys(scores, absolute).ravel()
    order: Integers = np.argsort(-flat, kind="stable")
    return order[: np.count_nonzero(~np.isnan(flat))]


def by_count(scores: Floats, n: int, absolute: bool) -> Booleans:
    """The `n` strongest edges.

    Raises:
        EdgeError: fewer have a score.
    """
    order = ranked(scores, absolute)
    _check_count(n, len(order))
    return _marked(scores, order[:n])


def by_threshold(scores: Floats, threshold: float, absolute: bool) -> Booleans:
    """The edges whose score, or its size, is no less than a threshold."""
    found: Booleans = _keys(scores, absolute) >= threshold
    return found


def by_greed(nodes: Nodes, scores: Floats, n: int, absolute: bool) -> Booleans:
    """The strongest edge into a node that is reached already, `n` times.

    The logits are reached from the first; an edge reaches its sender, and with it all that the
    sender reads: of a head its query, and the key and value of its group.

    Raises:
        EdgeError: fewer have a score, or can be reached.
    """
    keys, inputs = _keys(scores, absolute), feeds(nodes)
    _check_count(n, int(np.count_nonzero(~np.isnan(keys))))
    width = keys.shape[1]
    reached = np.zeros(width, bool)
    waiting: list[tuple[float, int]] = []

    def reach(receivers: Any) -> None:
        for receiver in receivers:
            if not reached[receiver]:
                reached[receiver] = True
                for sender in np.flatnonzero(~np.isnan(keys[:, receiver])):
                    place = int(sender) * width + int(receiver)
                    heapq.heappush(waiting, (-float(keys[sender, receiver]), place))

    reach([width - 1])
    taken: list[int] = []
    while len(taken) < n:
        if not waiting:
            raise EdgeError(
                f"a greedy way down from the logits ends after {len(taken)} edges, for those "
                f"further down have no scores; n is {n}"
            )
        taken.append(heapq.heappop(waiting)[1])
        reach(np.flatnonzero(inputs[:, taken[-1] // width]))
    return _marked(scores, taken)


def _keys(scores: Floats, absolute: bool) -> Floats:
    return np.abs(scores) if absolute else scores


def _check_count(n: int, count: int) -> None:
    if n > count:
        raise EdgeError(f"n is {n}, and {count} edges have a score")


def _marked(scores: Floats, places: Any) -> Booleans:
    found = np.zeros(scores.size, bool)
    found[places] = True
    return found.reshape(scores.shape)
