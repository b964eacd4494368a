"""Edges between the nodes of a model: what one adds to the stream, as another alone reads it."""

from nnpatch_core.edges.changes import (
    Changes,
    Climb,
    Entry,
    Given,
    Rows,
    SenderChanges,
    Writes,
    added_up,
    positions_of,
)
from nnpatch_core.edges.layers import Layers, nodes_of, open_layers
from nnpatch_core.edges.nodes import ARROW, Nodes, Receiver, ReceiverKind, Sender
from nnpatch_core.edges.put import source_given
from nnpatch_core.edges.sites import receiver_site
from nnpatch_core.edges.values import Received, read_by

__all__ = [
    "ARROW",
    "Changes",
    "Climb",
    "Entry",
    "Given",
    "Layers",
    "Nodes",
    "Received",
    "Receiver",
    "ReceiverKind",
    "Rows",
    "Sender",
    "SenderChanges",
    "Writes",
    "added_up",
    "nodes_of",
    "open_layers",
    "positions_of",
    "read_by",
    "receiver_site",
    "source_given",
]
