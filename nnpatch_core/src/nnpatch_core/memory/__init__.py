"""The memory that there is, and the memory that a sweep needs."""

from nnpatch_core.memory.costs import Costs, in_units
from nnpatch_core.memory.limits import Gathered, Limits, limits_of
from nnpatch_core.memory.needs import host_memory, memory_budget, needs_of
from nnpatch_core.memory.pieces import Pieces

__all__ = [
    "Costs",
    "Gathered",
    "Limits",
    "Pieces",
    "host_memory",
    "in_units",
    "limits_of",
    "memory_budget",
    "needs_of",
]
