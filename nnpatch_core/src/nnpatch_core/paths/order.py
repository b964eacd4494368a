"""The order of nodes along a path: which entries can follow which."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from nnpatch_core.edges import Nodes, Receiver, Sender
from nnpatch_core.errors import EdgeError
from nnpatch_core.paths.named import Named

Node: TypeAlias = Sender | Receiver
#: For each member of a path the entries that are swept there: of senders first, then of receivers.
Members: TypeAlias = Sequence[Sequence[Named[Any]]]


def writers(nodes: Nodes, node: Node) -> tuple[Sender, ...]:
    """The senders that send on what a node is: itself, the heads that read it, or its MLP."""
    if isinstance(node, Sender):
        return (node,)
    if node.kind == "mlp":
        return (Sender("mlp", node.layer),)
    if node.head is None:
        return ()
    share = 1
    if node.kind != "q":
        share = nodes.query[node.layer] // nodes.key_value[node.layer]
    heads = range(node.head * share, (node.head + 1) * share)
    return tuple(Sender("head", node.layer, head) for head in heads)


def paths_through(nodes: Nodes, members: Members) -> list[tuple[int, ...]]:
    """The paths that there are, each by the number of its entry in each member.

    A path is there where some node of each entry is before some node of the next.

    Args:
        nodes: the nodes of the model.
        members: the entries, of two members at least.

    Raises:
        EdgeError: no path is there; or an entry that was named by itself, and not drawn from a
            grid, has a node after all of the next member's, or before all of the one before.
    """
    for entry in itertools.chain(*members[1:-1]):
        for node in entry.nodes:
            if not writers(nodes, node):
                raise EdgeError(
                    f"{node.name} cannot stand amid a path, which goes on from heads and MLPs alone"
                )
    for before, after in itertools.pairwise(members):
        _check(nodes, before, after)
    found = [
        path
        for path in itertools.product(*(range(len(each)) for each in members))
        if all(
            _leads(nodes, members[at][path[at]], members[at + 1][path[at + 1]])
            for at in range(len(path) - 1)
        )
    ]
    if not found:
        one, other = members[0][0].nodes[0], members[-1][-1].nodes[-1]
        raise EdgeError(f"there is no path from {one.name} to {other.name}, nor between others")
    return found


class _At(NamedTuple):
    """A node of an entry, and the step from which on it has written, or at which it reads."""

    step: int
    node: Node
    listed: bool


def _leads(nodes: Nodes, before: Named[Any], after: Named[Any]) -> bool:
    first = min(each.step for each in _writing(nodes, [before]))
    return first <= max(each.step for each in _reading(nodes, [after]))


def _writing(nodes: Nodes, entries: Sequence[Named[Any]]) -> Iterator[_At]:
    for entry in entries:
        for node in entry.nodes:
            yield _At(writers(nodes, node)[0].step, node, entry.listed)


def _reading(nodes: Nodes, entries: Sequence[Named[Any]]) -> Iterator[_At]:
    for entry in entries:
        for node in entry.nodes:
            yield _At(nodes.step(node), node, entry.listed)


def _check(nodes: Nodes, before: Sequence[Named[Any]], after: Sequence[Named[Any]]) -> None:
    """Raise for a node of an entry that was named by itself, and leads nowhere."""
    writing, reading = [*_writing(nodes, before)], [*_reading(nodes, after)]
    first = min(writing, key=lambda each: each.step)
    last = max(reading, key=lambda each: each.step)
    pairs = [(each, last) for each in writing if each.listed]
    pairs += [(first, each) for each in reading if each.listed]
    for one, other in pairs:
        if one.step > other.step:
            assert isinstance(other.node, Receiver)
            why = nodes.why_not(writers(nodes, one.node)[0], other.node)
            raise EdgeError(f"there is no path from {one.node.name} to {other.node.name}: {why}")
