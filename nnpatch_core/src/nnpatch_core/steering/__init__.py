"""Interventions during generation, and what they do to answers."""

from nnpatch_core.steering.steer import steer
from nnpatch_core.steering.values import Add, Scale, Set

__all__ = ["Add", "Scale", "Set", "steer"]
