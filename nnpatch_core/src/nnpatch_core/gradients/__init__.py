"""Estimates from gradients: what a patch would do, to first order, for all cells at once."""

from nnpatch_core.gradients.cotangents import cotangents
from nnpatch_core.gradients.first_order import Estimator, joint
from nnpatch_core.gradients.graph import Graph, open_graph
from nnpatch_core.gradients.integrated import Entries, Paths, record_entries
from nnpatch_core.gradients.limits import GraphLimits, graph_limits, waiting_paths
from nnpatch_core.gradients.star import Star, adding_sites, needed_sites
from nnpatch_core.gradients.support import check_gradients
from nnpatch_core.gradients.terms import Terms, Where, are_apart, known, terms_of

__all__ = [
    "Entries",
    "Estimator",
    "Graph",
    "GraphLimits",
    "Paths",
    "Star",
    "Terms",
    "Where",
    "adding_sites",
    "are_apart",
    "check_gradients",
    "cotangents",
    "graph_limits",
    "joint",
    "known",
    "needed_sites",
    "open_graph",
    "record_entries",
    "terms_of",
    "waiting_paths",
]
