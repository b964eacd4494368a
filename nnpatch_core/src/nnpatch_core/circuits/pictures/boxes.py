"""The things in a picture: boxes of nodes in rows, and lanes in which edges pass a row.

The input, the logits and an MLP have a box each; heads that share a key and a value stand in one,
a cell for each head and one for what they share. Lengths are inches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import attrs

from nnpatch_core.circuits.pictures.shown import Link
from nnpatch_core.edges import Nodes, Receiver, Sender

#: Inches: the least width of a node, that of what a group shares, and of a port.
_NODE, _SHARED, _PORT = 0.56, 0.46, 0.17
#: Inches: a letter of a node's name, and what is around them.
_LETTER, _AROUND = 0.075, 0.12
#: Inches: the input and the logits, and what is around a group.
_INPUT, _FRAME = 0.8, 0.05
#: Inches: a lane, in which an edge passes.
_LANE = 0.05

#: The place of a box: its kind, its layer, and the group of heads.
Place: TypeAlias = tuple[str, int, int]


@attrs.frozen
class Cell:
    """A node in a box.

    Args:
        node: its name.
        label: what stands in it.
        x: of its middle, from the middle of the box.
        width: of it.
        ports: the letters of the inputs that edges go into, with their x from the middle of the
            box; "" is an input that needs no letter.
        writes: whether edges start from it.
        shared: whether it is the key and the value that heads share, and no node of its own.
    """

    node: str
    label: str
    x: float
    width: float
    ports: Mapping[str, float]
    writes: bool
    shared: bool = False


@attrs.frozen
class Box:
    """Nodes that stand together.

    Args:
        row: of the picture, from 0, upwards.
        layer: the label of its layer.
        width: of it.
        cells: its nodes.
        framed: whether it has a frame of its own around them.
    """

    row: int
    layer: str
    width: float
    cells: tuple[Cell, ...]
    framed: bool


@attrs.frozen
class Boxes:
    """The boxes of a picture.

    Args:
        rows: how many there are.
        all: the boxes, row by row.
        starts: by a sender's name, the number of its box and its x from the middle of that.
        ends: the same by a receiver's name.
    """

    rows: int
    all: tuple[Box, ...]
    starts: Mapping[str, tuple[int, float]]
    ends: Mapping[str, tuple[int, float]]


def boxes_of(nodes: Nodes, links: Sequence[Link]) -> Boxes:
    """The boxes that edges go from and into, and no others."""
    places: dict[Place, tuple[set[Sender], set[Receiver]]] = {}
    for link in links:
        places.setdefault(_of_sender(nodes, link.sender), (set(), set()))[0].add(link.sender)
        places.setdefault(_of_receiver(nodes, link.receiver), (set(), set()))[1].add(link.receiver)
    longest = max((len(link.sender.name) for link in links), default=0)
    node = max(_NODE, _LETTER * longest + _AROUND)
    steps = {place: _step(nodes, place) for place in places}
    rows = {step: row for row, step in enumerate(sorted(set(steps.values())))}
    made: list[Box] = []
    starts: dict[str, tuple[int, float]] = {}
    ends: dict[str, tuple[int, float]] = {}
    for place in sorted(places, key=lambda place: (steps[place], place[2])):
        senders, receivers = places[place]
        box = _box(nodes, place, rows[steps[place]], node, senders, receivers)
        for cell in box.cells:
            if cell.writes:
                starts[cell.node] = (len(made), cell.x)
        for receiver in receivers:
            ends[receiver.name] = (len(made), _port(box, receiver))
        made.append(box)
    return Boxes(len(rows), tuple(made), starts, ends)


def lane_width(count: int) -> float:
    """The room of a lane, beside so many others at most."""
    return _LANE if count > 20 else 2 * _LANE


def shared_name(layer: int, group: int) -> str:
    """The name of what a group of heads shares."""
    return f"a{layer}.kv{group}"


def _of_sender(nodes: Nodes, sender: Sender) -> Place:
    if sender.kind != "head":
        return (sender.kind, sender.layer, 0)
    size = nodes.query[sender.layer] // nodes.key_value[sender.layer]
    return ("heads", sender.layer, (sender.head or 0) // size)


def _of_receiver(nodes: Nodes, receiver: Receiver) -> Place:
    if receiver.head is None:
        return (receiver.kind, receiver.layer, 0)
    size = nodes.query[receiver.layer] // nodes.key_value[receiver.layer]
    return ("heads", receiver.layer, receiver.head // (size if receiver.kind == "q" else 1))


def _step(nodes: Nodes, place: Place) -> int:
    kind, layer, _ = place
    if kind in ("input", "logits"):
        return -1 if kind == "input" else 2 * nodes.n_layers
    return 2 * layer + (kind == "mlp" and not nodes.parallel[layer])


def _box(
    nodes: Nodes,
    place: Place,
    row: int,
    node: float,
    senders: set[Sender],
    receivers: set[Receiver],
) -> Box:
    kind, layer, group = place
    if kind == "heads":
        return _group(nodes, (layer, group), row, node, senders, receivers)
    name = f"m{layer}" if kind == "mlp" else kind
    width = node if kind == "mlp" else _INPUT
    ports = {"": 0.0} if receivers else {}
    cell = Cell(name, name, 0.0, width, ports, bool(senders))
    return Box(row, "" if kind != "mlp" else f"layer {layer}", width, (cell,), False)


def _group(
    nodes: Nodes,
    place: tuple[int, int],
    row: int,
    node: float,
    senders: set[Sender],
    receivers: set[Receiver],
) -> Box:
    layer, group = place
    size = nodes.query[layer] // nodes.key_value[layer]
    letters: dict[int, set[str]] = {each.head or 0: set() for each in senders}
    shared: set[str] = set()
    for receiver in receivers:
        if receiver.kind == "q" or size == 1:
            letters.setdefault(receiver.head or 0, set()).add(receiver.kind)
        else:
            shared.add(receiver.kind)
    widths = [node] * len(letters) + [_SHARED] * bool(shared)
    framed = size > 1
    width = sum(widths) + _FRAME * 2 * framed
    heads = {each.head or 0 for each in senders}
    cells, x = [], -sum(widths) / 2
    for head in sorted(letters):
        middle = x + node / 2
        name = f"a{layer}.h{head}"
        cells.append(Cell(name, name, middle, node, _ports(letters[head], middle), head in heads))
        x += node
    if shared:
        middle = x + _SHARED / 2
        name = shared_name(layer, group)
        cells.append(Cell(name, f"kv{group}", middle, _SHARED, _ports(shared, middle), False, True))
    return Box(row, f"layer {layer}", width, tuple(cells), framed)


def _ports(letters: set[str], middle: float) -> dict[str, float]:
    """Each letter has its place, whichever others there are."""
    places = {"q": -_PORT, "k": 0.0, "v": _PORT}
    if "q" not in letters and len(letters) == 2:
        places = {"k": -_PORT / 2, "v": _PORT / 2}
    if len(letters) == 1:
        places = dict.fromkeys(letters, 0.0)
    return {letter: middle + places[letter] for letter in sorted(letters, key="qkv".index)}


def _port(box: Box, receiver: Receiver) -> float:
    letter = receiver.kind if receiver.head is not None else ""
    for cell in box.cells:
        is_own = receiver.kind != "q" or cell.node == f"a{receiver.layer}.h{receiver.head}"
        if letter in cell.ports and is_own:
            return cell.ports[letter]
    raise AssertionError(f"no port for {receiver.name}")  # pragma: no cover - each has one
