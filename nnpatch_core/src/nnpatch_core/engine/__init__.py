"""How a sweep is executed: cells and their replacements go in, patched runs' logits come out."""

from nnpatch_core.engine.cone import ConeRun
from nnpatch_core.engine.full import FullRun
from nnpatch_core.engine.opened import open_cone, open_full, plan_cells
from nnpatch_core.engine.parts import EngineRun, Part
from nnpatch_core.engine.plan import Plan, joined
from nnpatch_core.engine.support import why_not_cone, why_rather_full
from nnpatch_core.memory import Gathered, Limits, limits_of
from nnpatch_core.tracing import (
    Recorded,
    Replacement,
    Zeros,
    backward_hooks,
    check_forwards,
    forward,
    forward_functions,
    forward_hooks,
    in_words,
    record,
)

__all__ = [
    "ConeRun",
    "EngineRun",
    "FullRun",
    "Gathered",
    "Limits",
    "Part",
    "Plan",
    "Recorded",
    "Replacement",
    "Zeros",
    "backward_hooks",
    "check_forwards",
    "forward",
    "forward_functions",
    "forward_hooks",
    "in_words",
    "joined",
    "limits_of",
    "open_cone",
    "open_full",
    "plan_cells",
    "record",
    "why_not_cone",
    "why_rather_full",
]
