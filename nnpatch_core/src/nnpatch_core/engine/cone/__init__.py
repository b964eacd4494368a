"""The cone engine: the planner, the recorded target run, and the traces of patched runs."""

from nnpatch_core.engine.cone.execution import ConeExecution, open_cone
from nnpatch_core.engine.cone.last_layer import mlp_inside
from nnpatch_core.engine.cone.patched_runs import NEVER, Changed, leftmost
from nnpatch_core.engine.cone.plan import Plan, joined
from nnpatch_core.engine.cone.planning import plan_patches
from nnpatch_core.engine.cone.reasons import beginning_of, why_not_cone, why_rather_not_cone
from nnpatch_core.engine.cone.replay import open_cone_replay

__all__ = [
    "NEVER",
    "Changed",
    "ConeExecution",
    "Plan",
    "beginning_of",
    "joined",
    "leftmost",
    "mlp_inside",
    "open_cone",
    "open_cone_replay",
    "plan_patches",
    "why_not_cone",
    "why_rather_not_cone",
]
