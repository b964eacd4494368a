"""Edges between the nodes of a model: what one adds to the stream, as another alone reads it."""

from nnpatch_core.edges.changes import Changes, Entry, Given, SenderChanges
from nnpatch_core.edges.estimates import METHODS as EDGE_METHODS
from nnpatch_core.edges.estimates import Estimate, estimate_edges
from nnpatch_core.edges.layers import Layers, Recording, Structure, open_layers, record_run
from nnpatch_core.edges.memory import fitting_prompts
from nnpatch_core.edges.nodes import ARROW, Nodes, Receiver, Sender
from nnpatch_core.edges.outcome import EdgeOutcome
from nnpatch_core.edges.put import EdgePut, GivenOf
from nnpatch_core.edges.setting import Setting, open_setting, read_ablated
from nnpatch_core.edges.sites import EDGE, EdgeSites
from nnpatch_core.edges.structure import find_structure
from nnpatch_core.edges.values import Received

#: The method that measures.
EXACT = "exact"

__all__ = [
    "ARROW",
    "EDGE",
    "EDGE_METHODS",
    "EXACT",
    "Changes",
    "EdgeOutcome",
    "EdgePut",
    "EdgeSites",
    "Entry",
    "Estimate",
    "Given",
    "GivenOf",
    "Layers",
    "Nodes",
    "Received",
    "Receiver",
    "Recording",
    "Sender",
    "SenderChanges",
    "Setting",
    "Structure",
    "estimate_edges",
    "find_structure",
    "fitting_prompts",
    "open_layers",
    "open_setting",
    "read_ablated",
    "record_run",
]
