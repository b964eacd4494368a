"""The sweeps, which ask by default whether the model is confident."""

from __future__ import annotations

import functools

import nnpatch_core

# As partials they keep the types of all other arguments, and add no frame between a warning and
# the user's line.
activation_patching = functools.partial(
    nnpatch_core.activation_patching, force_model_confidence=True
)
activation_patching.__doc__ = (
    "`nnpatch_core.activation_patching`, with `force_model_confidence=True`: a model that does not "
    "prefer each run's own answer is a `ConfidenceError`."
)

attribution_patching = functools.partial(
    nnpatch_core.attribution_patching, force_model_confidence=True
)
attribution_patching.__doc__ = (
    "`nnpatch_core.attribution_patching`, with `force_model_confidence=True`: a model that does "
    "not prefer each run's own answer is a `ConfidenceError`."
)
