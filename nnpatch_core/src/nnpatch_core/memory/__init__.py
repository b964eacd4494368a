"""The memory that there is, and the memory that a sweep needs."""

from nnpatch_core.memory.costs import Costs, in_units
from nnpatch_core.memory.free import host_memory
from nnpatch_core.memory.limits import Gathered, Limits, limits_of
from nnpatch_core.memory.needs import MemoryBudget, memory_budgets, needs_of
from nnpatch_core.memory.pieces import Beginning, Pieces
from nnpatch_core.memory.placement import Placement, placement_of
from nnpatch_core.memory.rooms import Room, read_budget

__all__ = [
    "Beginning",
    "Costs",
    "Gathered",
    "Limits",
    "MemoryBudget",
    "Pieces",
    "Placement",
    "Room",
    "host_memory",
    "in_units",
    "limits_of",
    "memory_budgets",
    "needs_of",
    "placement_of",
    "read_budget",
]
