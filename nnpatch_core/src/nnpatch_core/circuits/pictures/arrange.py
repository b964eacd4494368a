"""The places of boxes and lanes: edges go up without crossing boxes, and each other seldom.

Rows are given. Boxes and lanes of a row are sorted by the middle of what they are connected to, row
by row upwards and downwards, as Sugiyama, Tagawa and Toda did (1981), and moved as near to it as
their order and their widths allow. The order with the fewest crossings is taken.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

import attrs

from nnpatch_core.circuits.pictures.boxes import Boxes, lane_width
from nnpatch_core.circuits.pictures.shown import Link

#: Edges that are equal in this share their lanes.
_Look: TypeAlias = tuple[str, bool, bool]
#: Inches between boxes, and beside a lane.
_APART, _BESIDE = 0.16, 0.07
_SWEEPS, _MOVES = 16, 120
#: Inches: moves end when none is larger.
_STILL = 0.004
#: How much a lane pulls on the next one of its edge, and on the box that it comes from or goes to.
_STRAIGHT, _NEAR = 8.0, 2.0


@attrs.define(eq=False)
class Item:
    """A box or a lane.

    Args:
        row: of it.
        width: of it.
        x: of its middle.
        box: the number of its box; None of a lane.
    """

    row: int
    width: float
    x: float = 0.0
    box: int | None = None


@attrs.frozen(eq=False)
class Piece:
    """A part of an edge, from one row to the next.

    Args:
        below, above: what it goes from and to.
        leaves, enters: the x from the middle of those.
        pull: how much it draws them together.
    """

    below: Item
    above: Item
    leaves: float
    enters: float
    pull: float

    @property
    def start(self) -> float:
        """The x where it leaves."""
        return self.below.x + self.leaves

    @property
    def end(self) -> float:
        """The x where it enters."""
        return self.above.x + self.enters


@attrs.frozen(eq=False)
class Arranged:
    """Where all is.

    Args:
        boxes: the x of the middle of each box.
        routes: for each edge the x at which it leaves, passes each row between, and enters.
        crowds: for each row but the last, how many pieces go from it to the next, and how far the
            widest goes sideways.
        left, right: the ends of what is there.
    """

    boxes: tuple[float, ...]
    routes: tuple[tuple[float, ...], ...]
    crowds: tuple[tuple[int, float], ...]
    left: float
    right: float


def arrange(boxes: Boxes, links: Sequence[Link]) -> Arranged:
    """Find the places of boxes, and the ways of edges."""
    rows: list[list[Item]] = [[] for _ in range(boxes.rows)]
    items = []
    for number, box in enumerate(boxes.all):
        items.append(Item(box.row, box.width, box=number))
        rows[box.row].append(items[-1])
    ways, pieces = _ways(boxes, links, items, rows)
    below: list[list[Piece]] = [[] for _ in rows]
    for piece in pieces:
        below[piece.above.row].append(piece)
    for row in rows:
        _place(row, [item.x for item in row], [1.0] * len(row))
    _sort(rows, below)
    _move(rows, below)
    ends = [(item.x - item.width / 2, item.x + item.width / 2) for item in items]
    return Arranged(
        boxes=tuple(item.x for item in items),
        routes=tuple((way[0].start, *(piece.end for piece in way)) for way in ways),
        crowds=tuple(
            (len(each), max((abs(piece.end - piece.start) for piece in each), default=0.0))
            for each in below[1:]
        ),
        left=min([*(low for low, _ in ends), *(x for way in ways for x in _lanes(way))]),
        right=max([*(high for _, high in ends), *(x for way in ways for x in _lanes(way))]),
    )


def _lanes(way: Sequence[Piece]) -> list[float]:
    return [piece.end for piece in way]


def _ways(
    boxes: Boxes, links: Sequence[Link], items: Sequence[Item], rows: Sequence[list[Item]]
) -> tuple[list[list[Piece]], list[Piece]]:
    """The pieces of each edge; edges of a sender that look alike share their lanes."""
    highest: dict[_Look, int] = {}
    for link in links:
        lane = _look(link)
        row = items[boxes.ends[link.receiver.name][0]].row
        highest[lane] = max(highest.get(lane, 0), row)
    lanes: dict[_Look, list[tuple[Item, float]]] = {}
    shared: dict[_Look, list[Piece]] = {}
    wide = lane_width(len(highest))
    for lane, top in highest.items():
        number, x = boxes.starts[lane[0]]
        stations = [(items[number], x)]
        shared[lane] = []
        for row in range(items[number].row + 1, top):
            item = Item(row, wide)
            rows[row].append(item)
            pull = _STRAIGHT if len(stations) > 1 else _NEAR
            shared[lane].append(Piece(*_ends(stations[-1], (item, 0.0)), pull))
            stations.append((item, 0.0))
        lanes[lane] = stations
    ways, last = [], []
    for link in links:
        lane = _look(link)
        number, x = boxes.ends[link.receiver.name]
        steps = items[number].row - lanes[lane][0][0].row
        station = lanes[lane][steps - 1]
        pull = 1.0 if steps == 1 else _NEAR
        last.append(Piece(*_ends(station, (items[number], x)), pull))
        ways.append([*shared[lane][: steps - 1], last[-1]])
    return ways, [*(piece for each in shared.values() for piece in each), *last]


def _look(link: Link) -> _Look:
    """Where an edge comes from, its sign, and whether it is an estimate."""
    return link.sender.name, link.score < 0, bool(link.estimate)


def _ends(below: tuple[Item, float], above: tuple[Item, float]) -> tuple[Item, Item, float, float]:
    return below[0], above[0], below[1], above[1]


def _sort(rows: list[list[Item]], below: Sequence[Sequence[Piece]]) -> None:
    """Sort the rows, and leave them in the order with the fewest crossings."""
    best = [list(row) for row in rows]
    fewest = crossings(below)
    for _ in range(_SWEEPS):
        for upwards in (True, False):
            numbers = range(1, len(rows)) if upwards else range(len(rows) - 2, -1, -1)
            for number in numbers:
                wanted = _wanted(rows[number], below, number, upwards, not upwards)
                order = sorted(range(len(wanted)), key=lambda place: wanted[place][0])
                rows[number][:] = [rows[number][place] for place in order]
                _place(rows[number], *zip(*(wanted[place] for place in order), strict=True))
        count = crossings(below)
        if count < fewest:
            fewest, best = count, [list(row) for row in rows]
    for row, found in zip(rows, best, strict=True):
        row[:] = found


def _move(rows: Sequence[list[Item]], below: Sequence[Sequence[Piece]]) -> None:
    """Bring what is connected near to each other, the order kept."""
    for row in rows:
        _place(row, [0.0] * len(row), [1.0] * len(row))
    for turn in range(_MOVES):
        before = [item.x for row in rows for item in row]
        for number in range(len(rows)) if turn % 2 else range(len(rows) - 1, -1, -1):
            wanted = _wanted(rows[number], below, number, True, True)
            _place(rows[number], *zip(*wanted, strict=True))
        after = (item.x for row in rows for item in row)
        if max(abs(one - other) for one, other in zip(before, after, strict=True)) < _STILL:
            break


def _wanted(
    row: Sequence[Item], below: Sequence[Sequence[Piece]], number: int, down: bool, up: bool
) -> list[tuple[float, float]]:
    """Where each of a row would be best, by what it is connected to, and how much that counts."""
    sums = {id(item): [0.0, 0.0] for item in row}
    if down:
        for piece in below[number]:
            entry = sums[id(piece.above)]
            entry[0] += piece.pull * (piece.start - piece.enters)
            entry[1] += piece.pull
    if up and number + 1 < len(below):
        for piece in below[number + 1]:
            entry = sums[id(piece.below)]
            entry[0] += piece.pull * (piece.end - piece.leaves)
            entry[1] += piece.pull
    found = []
    for item in row:
        total, weight = sums[id(item)]
        found.append((total / weight, weight) if weight else (item.x, 0.01))
    return found


def _place(row: Sequence[Item], wanted: Sequence[float], weights: Sequence[float]) -> None:
    """Place items as near as can be to where they want to be, in their order, and apart.

    Without the widths that would be isotonic regression, so they are taken off before and put on
    after it.
    """
    offsets = [0.0]
    for one, other in pairwise(row):
        gap = _APART if one.box is not None and other.box is not None else _BESIDE
        offsets.append(offsets[-1] + (one.width + other.width) / 2 + gap)
    # Blocks that move as one: their mean, their weight, and how many they are.
    blocks: list[tuple[float, float, int]] = []
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        mean, total, count = want - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            before, own, more = blocks.pop()
            mean = (mean * total + before * own) / (total + own)
            total, count = total + own, count + more
        blocks.append((mean, total, count))
    places = [mean for mean, _, count in blocks for _ in range(count)]
    for item, place, offset in zip(row, places, offsets, strict=True):
        item.x = place + offset


def crossings(below: Sequence[Sequence[Piece]]) -> int:
    """How often pieces cross."""
    count = 0
    for pieces in below:
        ends: list[float] = []
        for _, end in sorted((round(each.start, 6), round(each.end, 6)) for each in pieces):
            count += len(ends) - bisect_right(ends, end)
            insort(ends, end)
    return count
