"""Subspaces of activations: learn one, patch it, steer with it."""

from nnpatch_core.spaces import Features, SiteRecord, Subspace
from nnpatch_core.steering import (
    Add,
    Answered,
    Collected,
    Scale,
    Set,
    SteeringCurve,
    collect,
    steer,
    sweep_steering,
)

__all__ = [
    "Add",
    "Answered",
    "Collected",
    "Features",
    "Scale",
    "Set",
    "SiteRecord",
    "SteeringCurve",
    "Subspace",
    "collect",
    "steer",
    "sweep_steering",
]
