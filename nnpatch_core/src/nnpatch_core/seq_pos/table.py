"""The built-in strategies, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nnpatch_core.seq_pos.spans import Spans
from nnpatch_core.seq_pos.strategies import (
    AllPositions,
    Custom,
    CustomConstant,
    Each,
    Last,
    LastK,
    PlacedSeqPos,
    SeqPos,
)

BUILTIN_SEQ_POS: Mapping[str, Callable[..., SeqPos | PlacedSeqPos]] = {
    "all": AllPositions,
    "custom": Custom,
    "custom_constant": CustomConstant,
    "each": Each,
    "last": Last,
    "lastk": LastK,
    "spans": Spans,
}
