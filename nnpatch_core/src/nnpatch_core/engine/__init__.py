"""Patched runs, exactly: cells and interventions go in, patched runs' logits come out."""

from nnpatch_core.engine.cone import NEVER, Plan, joined, leftmost, mlp_inside, plan_patches
from nnpatch_core.engine.even import even_shares
from nnpatch_core.engine.execution import Execution, Part
from nnpatch_core.engine.replay import Replay, last_logits
from nnpatch_core.engine.table import (
    ENGINES,
    Choice,
    Engine,
    beginning_for,
    check_engine,
    choose_engines,
)

__all__ = [
    "ENGINES",
    "NEVER",
    "Choice",
    "Engine",
    "Execution",
    "Part",
    "Plan",
    "Replay",
    "beginning_for",
    "check_engine",
    "choose_engines",
    "even_shares",
    "joined",
    "last_logits",
    "leftmost",
    "mlp_inside",
    "plan_patches",
]
