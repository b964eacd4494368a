"""The content of a circuit's file, whatever its kind."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from torch import Tensor

from nnpatch_core.edges import Nodes


@attrs.frozen(eq=False)
class Content:
    """The parts of a circuit; see `Circuit`."""

    nodes: Nodes
    kept: Tensor
    scores: Tensor | None
    exact: Tensor | None
    info: Mapping[str, str]
