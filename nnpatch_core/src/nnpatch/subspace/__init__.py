"""Projections on subspaces, and hooks that steer by them, under the older library's names.

`Subspace` and the other names of `nnpatch_core.subspace` are new here, and do more.
"""

from nnpatch.subspace._hooks import BinaryHook, FeatureCollectionHook, SteerHook
from nnpatch.subspace._projection import LowRankOrthogonalProjection
from nnpatch_core.subspace import Features, SiteRecord, Subspace

__all__ = [
    "BinaryHook",
    "FeatureCollectionHook",
    "Features",
    "LowRankOrthogonalProjection",
    "SiteRecord",
    "SteerHook",
    "Subspace",
]
