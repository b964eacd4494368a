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
    at_step,
    positions_of,
    told_of,
)
from nnpatch_core.edges.estimates import BOTH, Estimate, estimate_edges
from nnpatch_core.edges.estimates import METHODS as EDGE_METHODS
from nnpatch_core.edges.given import Ablated
from nnpatch_core.edges.layers import Layers, Structure, open_layers
from nnpatch_core.edges.memory import fitting_prompts
from nnpatch_core.edges.nodes import ARROW, Nodes, Receiver, ReceiverKind, Sender
from nnpatch_core.edges.outcome import EdgeOutcome
from nnpatch_core.edges.put import EdgePut, source_given
from nnpatch_core.edges.recording import Recording, record_run
from nnpatch_core.edges.setting import Setting, likely_nodes, open_setting, read_ablated
from nnpatch_core.edges.sites import EDGE, EdgeSites, receiver_site
from nnpatch_core.edges.structure import find_structure
from nnpatch_core.edges.values import Received, read_by

#: The method that measures.
EXACT = "exact"

__all__ = [
    "ARROW",
    "BOTH",
    "EDGE",
    "EDGE_METHODS",
    "EXACT",
    "Ablated",
    "Changes",
    "Climb",
    "EdgeOutcome",
    "EdgePut",
    "EdgeSites",
    "Entry",
    "Estimate",
    "Given",
    "Layers",
    "Nodes",
    "Received",
    "Receiver",
    "ReceiverKind",
    "Recording",
    "Rows",
    "Sender",
    "SenderChanges",
    "Setting",
    "Structure",
    "Writes",
    "added_up",
    "at_step",
    "estimate_edges",
    "find_structure",
    "fitting_prompts",
    "likely_nodes",
    "open_layers",
    "open_setting",
    "positions_of",
    "read_ablated",
    "read_by",
    "receiver_site",
    "record_run",
    "source_given",
    "told_of",
]
