"""The grid of sites, whose arguments stand in the older library's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nnpatch_core
from nnpatch_core import SeqPos
from nnpatch_core.names import ComponentName, SeqPosName


class Sites(nnpatch_core.Sites):
    """`nnpatch_core.Sites`, where positions that are given are patched one by one by default.

    Args:
        site_names: component names, or one.
        seq_pos_type: which positions; see `nnpatch_core.Sites`. None is all at once.
        seq_pos: what the named strategy takes; `"custom"`, the default, needs it.
        layers: which layers; None is all.
        heads: of components with heads, which ones; None is each of them.

    Raises:
        PatchingError: as for `nnpatch_core.Sites`.

    Examples:
        >>> Sites(["resid", "o"], seq_pos=[-3, -1], layers=[1, 2]).strategy.positions
        (-3, -1)
    """

    def __init__(
        self,
        site_names: ComponentName | str | Sequence[ComponentName | str],
        seq_pos_type: SeqPosName | str | SeqPos | None = "custom",
        seq_pos: Any = None,
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
    ) -> None:
        super().__init__(site_names, layers, seq_pos_type, seq_pos, heads)
