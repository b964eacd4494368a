"""Patched runs, estimated: what a patch would do to first order, for all cells at once."""

from nnpatch_core.gradients.atp_star import (
    FIXED,
    AtPStar,
    adding_places,
    fixed_attentions,
    lowest,
    mean_size,
)
from nnpatch_core.gradients.attention import AttentionPlaces
from nnpatch_core.gradients.cotangents import cotangents
from nnpatch_core.gradients.first_order import Estimator, joint
from nnpatch_core.gradients.graph import Graph, forward_with_graph, open_graph
from nnpatch_core.gradients.integrated import Entries, Paths, record_entries
from nnpatch_core.gradients.limits import GraphLimits, graph_limits, waiting_paths
from nnpatch_core.gradients.support import check_gradients
from nnpatch_core.gradients.terms import Terms, cells_apart, still, terms_of

__all__ = [
    "FIXED",
    "AtPStar",
    "AttentionPlaces",
    "Entries",
    "Estimator",
    "Graph",
    "GraphLimits",
    "Paths",
    "Terms",
    "adding_places",
    "cells_apart",
    "check_gradients",
    "cotangents",
    "fixed_attentions",
    "forward_with_graph",
    "graph_limits",
    "joint",
    "lowest",
    "mean_size",
    "open_graph",
    "record_entries",
    "still",
    "terms_of",
    "waiting_paths",
]
