"""Projections on subspaces, and hooks that steer by them, under the older library's names.

`Subspace` and the other names of `nnpatch_core.subspace` are new here, and do more.
"""

from nnpatch.subspace._hooks import BinaryHook, FeatureCollectionHook, SteerHook
from nnpatch.subspace._projection import LowRankOrthogonalProjection
from nnpatch_core.subspace import (
    Add,
    Features,
    Scale,
    Set,
    SiteRecord,
    Subspace,
    Trained,
    collect,
    evaluate_subspace,
    steer,
    sweep_steering,
    sweep_subspaces,
    train_subspace,
)

__all__ = [
    "Add",
    "BinaryHook",
    "FeatureCollectionHook",
    "Features",
    "LowRankOrthogonalProjection",
    "Scale",
    "Set",
    "SiteRecord",
    "SteerHook",
    "Subspace",
    "Trained",
    "collect",
    "evaluate_subspace",
    "steer",
    "sweep_steering",
    "sweep_subspaces",
    "train_subspace",
]
