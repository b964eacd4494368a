"""The protocol of what a sweep goes over."""

from __future__ import annotations

from typing import Any, Protocol

from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.sites.grid import Grid


class SweepSites(Protocol):
    """The sites of a sweep: `Sites`, or a list of the user's own by `Sites.from_sites`."""

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """Site name to its cells, for prompts of `seq_len` tokens; perhaps for these prompts."""
        ...
