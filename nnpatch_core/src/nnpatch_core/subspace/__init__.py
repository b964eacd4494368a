"""Subspaces of activations: learn one, patch it, steer with it."""

from nnpatch_core.spaces import Features, SiteRecord, Subspace
from nnpatch_core.subspace.controls import Control
from nnpatch_core.subspace.evaluation import Evaluation, Measured, evaluate_subspace
from nnpatch_core.subspace.learning import Epoch
from nnpatch_core.subspace.proportion import Proportion
from nnpatch_core.subspace.sweeping import SubspaceSweep, sweep_subspaces
from nnpatch_core.subspace.trained import Trained
from nnpatch_core.subspace.training import train_subspace

__all__ = [
    "Control",
    "Epoch",
    "Evaluation",
    "Features",
    "Measured",
    "Proportion",
    "SiteRecord",
    "Subspace",
    "SubspaceSweep",
    "Trained",
    "evaluate_subspace",
    "sweep_subspaces",
    "train_subspace",
]
