"""The patching algorithms: what is put where, and what is reported."""

from nnpatch_core.interventions import cache_average
from nnpatch_core.patching.ablation import ablation_patching
from nnpatch_core.patching.activation import activation_patching
from nnpatch_core.patching.attribution import attribution_patching
from nnpatch_core.patching.edge import EDGE_STEPS, edge_patching
from nnpatch_core.patching.path import path_patching
from nnpatch_core.patching.plan import plan_sweep

__all__ = [
    "EDGE_STEPS",
    "ablation_patching",
    "activation_patching",
    "attribution_patching",
    "cache_average",
    "edge_patching",
    "path_patching",
    "plan_sweep",
]
