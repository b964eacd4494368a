"""Prompts of different lengths: their columns do not line up, which is said."""

from __future__ import annotations

from typing import Any

import torch

from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PromptWarning
from nnpatch_core.seq_pos import Custom, CustomConstant, SeqPos, groups_of
from nnpatch_core.site import AnySite
from nnpatch_core.sites import SiteList, Sites, SweepSites


def warn_of_lengths(sites: SweepSites, source: Batch | None, target: Batch) -> None:
    """Warn where a column of the outcome stands for different things in different prompts.

    Args:
        sites: what is swept.
        source: where values come from; None of an ablation.
        target: where they are put.

    Warns:
        PromptWarning: prompts differ in length, and positions are compared one by one, or counted
            from the start.
    """
    lengths = target.mask.sum(1).cpu()
    sources = lengths if source is None else source.mask.sum(1).cpu()
    every = torch.cat([lengths, sources])
    shortest, longest = int(every.min()), int(every.max())
    if shortest == longest or not _mixes(sites, target.seq_len):
        return
    apart = int((lengths != sources).sum())
    pairs = f", and differ within {apart} of {len(lengths)} pairs" if apart else ""
    warn(
        f"prompts have {shortest} to {longest} tokens{pairs}: a position is a "
        f"place in the batch of {target.seq_len}, padded on the left, so that each column mixes "
        "what stands that far from the end of each prompt. Give prompts of one length, or patch "
        "one position from the end, such as 'last'",
        PromptWarning,
    )


def _mixes(sites: SweepSites, seq_len: int) -> bool:
    """Whether places count that prompts of different lengths do not share."""
    if isinstance(sites, SiteList):
        named = {_positions(cell) for cell in sites.sites} - {frozenset()}
        return len(named) > 1 or any(_from_start(each, seq_len) for each in named)
    if not isinstance(sites, Sites):
        return False
    strategy: SeqPos = sites.strategy
    if isinstance(strategy, Custom | CustomConstant) and _from_start(strategy.positions, seq_len):
        return True
    return strategy.one_by_one and len(groups_of(strategy, seq_len)) > 1


def _positions(cell: AnySite) -> frozenset[int]:
    """The positions that a cell names; none where it is patched at all of them."""
    return frozenset(position for site in cell.sites for position in site.seq_pos or ())


def _from_start(positions: Any, seq_len: int) -> bool:
    """Whether some are counted from the start; the last one is the last one of each prompt."""
    return any(0 <= position < seq_len - 1 for position in positions)
