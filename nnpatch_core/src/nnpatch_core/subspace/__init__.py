"""Subspaces of activations: learn one, patch it, steer with it.

`found` has the pairs and their site before anything runs, `interchange` has them recorded; `basis`,
`losses` and `learning` learn from them, a `lesson` one basis after another, with `options` and a
`checkpoint`; `controls` are what should do worse, `evaluation` measures, `training` and `sweeping`
are the entry points, and `trained` is what they give.
"""

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
from nnpatch_core.subspace.controls import Control
from nnpatch_core.subspace.evaluation import Evaluation, Measured, evaluate_subspace
from nnpatch_core.subspace.learning import Epoch
from nnpatch_core.subspace.proportion import Proportion
from nnpatch_core.subspace.sweeping import SubspaceSweep, sweep_subspaces
from nnpatch_core.subspace.trained import Trained
from nnpatch_core.subspace.training import train_subspace

__all__ = [
    "Add",
    "Answered",
    "Collected",
    "Control",
    "Epoch",
    "Evaluation",
    "Features",
    "Measured",
    "Proportion",
    "Scale",
    "Set",
    "SiteRecord",
    "SteeringCurve",
    "Subspace",
    "SubspaceSweep",
    "Trained",
    "collect",
    "evaluate_subspace",
    "steer",
    "sweep_steering",
    "sweep_subspaces",
    "train_subspace",
]
