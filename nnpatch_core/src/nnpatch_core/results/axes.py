"""The axes of outcomes: how a table, a picture and a file treat each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs


@attrs.frozen
class AxisKind:
    """The properties that all axes of one name share.

    Args:
        column: the column of a table that holds the axis's labels.
        title: the words beside the axis in a picture.
        numbered: whether the labels are 0, 1, 2 and so on; they are texts otherwise.
    """

    column: str
    title: str = ""
    numbered: bool = True


#: Every axis that an outcome may have, by name.
AXES: Mapping[str, AxisKind] = {
    "site": AxisKind("label", numbered=False),
    "layer": AxisKind("layer", "layer"),
    "position": AxisKind("position", "token"),
    "column": AxisKind("column", "column of seq_pos"),
    "span": AxisKind("span", "span", numbered=False),
    "head": AxisKind("head", "head"),
    "kv_head": AxisKind("head", "key/value head"),
    "sender": AxisKind("sender", "sender", numbered=False),
    "receiver": AxisKind("receiver", "receiver", numbered=False),
    "circuit": AxisKind("circuit", "circuit", numbered=False),
}
_POSITIONS = ((), ("position",), ("column",), ("span",))
#: The axes that a site name may have together, in their order.
ORDERS = (
    ("site",),
    ("circuit",),
    *(
        ("layer", *positions, *heads)
        for positions in _POSITIONS
        for heads in ((), ("head",), ("kv_head",))
    ),
    *(
        (*nodes, *positions)
        for nodes in (("sender", "receiver"), ("sender",), ("receiver",))
        for positions in _POSITIONS
    ),
)
#: The columns of a table that name a cell, in their order; a position has a token too.
LABELS = (
    *("site", "label", "circuit", "sender", "receiver", "layer", "position", "token", "column"),
    *("span", "head"),
)
#: The columns that hold integers.
NUMBERED = frozenset(kind.column for kind in AXES.values() if kind.numbered)


def are_labels(axis: str, labels: Any) -> bool:
    """Tell whether `labels`, as JSON, can be the labels of an axis of this name."""
    if not isinstance(labels, list) or not labels:
        return False
    if not AXES[axis].numbered:
        return all(isinstance(label, str) for label in labels)
    return all(type(label) is int for label in labels) and labels == list(range(len(labels)))


def are_axes(value: Any) -> bool:
    """Tell whether `value`, as JSON, is a list of `[name, labels]` that can be a site's axes."""
    if not isinstance(value, list):
        return False
    if not all(_is_pair(axis) for axis in value):
        return False
    names: Sequence[str] = tuple(name for name, _ in value)
    return names in ORDERS and all(are_labels(*axis) for axis in value)


def _is_pair(axis: Any) -> bool:
    return isinstance(axis, list) and len(axis) == 2 and isinstance(axis[0], str)
