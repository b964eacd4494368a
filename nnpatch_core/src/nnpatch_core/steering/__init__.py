"""Interventions during generation, and what they do to answers.

`values` reads what is put, `sited` where; `passes` says which tokens of each forward that is about,
`put` has the hooks, and `steer` the context. `collect` gives coordinates as `collected`, and
`swept` makes a `curve`.
"""

from nnpatch_core.steering.collect import collect
from nnpatch_core.steering.collected import Collected
from nnpatch_core.steering.curve import Answered, SteeringCurve
from nnpatch_core.steering.steer import steer
from nnpatch_core.steering.swept import sweep_steering
from nnpatch_core.steering.values import Add, Scale, Set

__all__ = [
    "Add",
    "Answered",
    "Collected",
    "Scale",
    "Set",
    "SteeringCurve",
    "collect",
    "steer",
    "sweep_steering",
]
