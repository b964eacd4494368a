"""The families whose edges are held against an oracle: their tiny models, and two prompts."""

from __future__ import annotations

from typing import Any

from nnpatch_core.testing import tiny_model
from tests.helpers.families import FAMILIES
from tests.helpers.families import model_of as family_model

#: Those whose layers nnpatch refuses, each with the reason in tests of its own.
REFUSED = ("llama, MLP first in one layer",)
SOURCE, TARGET = (3, 9, 4, 17, 5, 8), (3, 9, 21, 17, 30, 8)


def model_of(name: str) -> tuple[Any, Any]:
    """A tiny model of a family, and its adapter; None finds one by its type."""
    if name in FAMILIES:
        return family_model(name), FAMILIES[name].api
    kind, _, rest = name.partition(",")
    settings = {"use_parallel_residual": False} if rest else {}
    return tiny_model(kind, num_hidden_layers=2, **settings), None
