"""Patched runs, exactly: cells and interventions go in, patched runs' logits come out."""

from nnpatch_core.engine.execution import Execution, Part
from nnpatch_core.engine.patched_runs import Changed
from nnpatch_core.engine.plan import Plan, joined
from nnpatch_core.engine.planning import plan_patches
from nnpatch_core.engine.table import ENGINES, Choice, Engine, check_engine, choose_engines

__all__ = [
    "ENGINES",
    "Changed",
    "Choice",
    "Engine",
    "Execution",
    "Part",
    "Plan",
    "check_engine",
    "choose_engines",
    "joined",
    "plan_patches",
]
