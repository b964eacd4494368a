"""Edges between the nodes of a model: what one adds to the stream, as another alone reads it."""

from nnpatch_core.edges.nodes import ARROW, Nodes, Receiver, Sender

__all__ = ["ARROW", "Nodes", "Receiver", "Sender"]
