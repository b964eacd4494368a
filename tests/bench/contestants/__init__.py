"""The contestants: each a module, imported only where its library is installed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jobs import Cell

if TYPE_CHECKING:  # who only wants the names need not wait for torch
    from subject import Prompts, Subject


class Contestant(Protocol):
    """Sweeps cell by cell, each at the same cost."""

    def sweep(self, prompts: Prompts, cells: Sequence[Cell]) -> list[list[float]]:
        """Patch each cell alone.

        Returns:
            Cell by cell the logit difference of each prompt.
        """
        ...


class Entry(NamedTuple):
    """A contestant's title, its module, and what its `make` takes besides the model."""

    title: str
    module: str
    options: dict[str, Any]


CONTESTANTS = {
    "cone": Entry("cone", "nnpatch_engine", {"engine": "cone"}),
    "full": Entry("full", "nnpatch_engine", {"engine": "full"}),
    "transformerlens": Entry("TransformerLens", "transformerlens", {}),
    "hooks": Entry("plain hooks", "hooks", {}),
}
#: Cells of these share work, so that a sample of them tells nothing: they sweep whole grids, and
#: everyone else's time is compared with theirs.
WHOLE = ("cone",)
#: Those that learn subspaces; their modules' contestants have `learn`, and the first `prepare`.
LEARNERS = {
    "nnpatch": Entry("nnpatch", "nnpatch_lessons", {"engine": "auto"}),
    "pyvene": Entry("pyvene", "pyvene_lessons", {"last_logits": False, "recorded": False}),
    "pyvene-last": Entry(
        "pyvene, last logits", "pyvene_lessons", {"last_logits": True, "recorded": False}
    ),
    "pyvene-recorded": Entry(
        "pyvene, last logits, sources recorded",
        "pyvene_lessons",
        {"last_logits": True, "recorded": True},
    ),
}
#: These live in an environment of their own.
APART = ("transformerlens", "pyvene", "pyvene-last", "pyvene-recorded")
#: These are in the scaling chart: who the others are compared with, and the simplest peer.
CHARTED = ("cone", "hooks")
#: No contestant: the worker of that name measures what the machine can do at best.
BOUND = "bound"


def make(name: str, subject: Subject) -> Contestant:
    """A contestant that is ready to sweep."""
    entry = CONTESTANTS[name]
    module = importlib.import_module(f"contestants.{entry.module}")
    return module.make(subject, **entry.options)
