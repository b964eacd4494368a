"""Position strategies, and the positions that they stand for in each prompt."""

from collections.abc import Callable, Mapping

from nnpatch_core.seq_pos.laws import (
    NO_SOURCE,
    CellPositions,
    Expansion,
    check_cell,
    checked_groups,
    expansion_of,
    groups_of,
    present_in,
)
from nnpatch_core.seq_pos.positions import (
    NONE,
    Group,
    Positions,
    PromptGroups,
    are_per_prompt,
    check_alike,
    for_all,
    normalise,
    read_positions,
    read_sources,
    spread,
)
from nnpatch_core.seq_pos.prompts import PromptBatch, Span
from nnpatch_core.seq_pos.spans import LAST, Spans
from nnpatch_core.seq_pos.strategies import (
    AllPositions,
    Custom,
    CustomConstant,
    Each,
    Last,
    LastK,
    PlacedCell,
    PlacedSeqPos,
    SeqPos,
    has_place,
    resolved,
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

__all__ = [
    "BUILTIN_SEQ_POS",
    "LAST",
    "NONE",
    "NO_SOURCE",
    "AllPositions",
    "CellPositions",
    "Custom",
    "CustomConstant",
    "Each",
    "Expansion",
    "Group",
    "Last",
    "LastK",
    "PlacedCell",
    "PlacedSeqPos",
    "Positions",
    "PromptBatch",
    "PromptGroups",
    "SeqPos",
    "Span",
    "Spans",
    "are_per_prompt",
    "check_alike",
    "check_cell",
    "checked_groups",
    "expansion_of",
    "for_all",
    "groups_of",
    "has_place",
    "normalise",
    "present_in",
    "read_positions",
    "read_sources",
    "resolved",
    "spread",
]
