"""Prompts whose columns do not mean the same: that is said before they are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._templates import MOST, templates_of
from nnpatch_core._warnings import warn
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PromptWarning
from nnpatch_core.seq_pos import (
    Custom,
    CustomConstant,
    PromptBatch,
    SeqPos,
    are_per_prompt,
    groups_of,
    has_place,
)
from nnpatch_core.site import AnySite
from nnpatch_core.sites import SiteList, Sites, SweepSites, Together

_REMEDY = (
    "Patch by name, with seq_pos_type='spans' (PromptPairs.from_template gives spans, and spans= "
    "of the other constructors); or sweep each kind of prompt alone, as pairs.groups has them; or "
    "patch one position from the end, such as 'last'"
)


def warn_of_columns(
    sites: SweepSites,
    prompts: PromptBatch,
    strings: Mapping[int, str] | None = None,
    donors: Batch | None = None,
) -> None:
    """Warn where a column of the outcome stands for different things in different prompts.

    Args:
        sites: what is swept.
        prompts: the prompts.
        strings: the text of each token, where it is known.
        donors: the prompts that an ablation takes values from.

    Warns:
        PromptWarning: positions are compared one by one, or counted from the start, and prompts
            differ in length, or have other words at the same places.
    """
    if not _mixes(sites, prompts.seq_len):
        return
    told = (
        _lengths(prompts, donors)
        or _spans(prompts)
        or (_words(prompts, strings) if strings else None)
    )
    if told is not None:
        warn(f"{told}. {_REMEDY}", PromptWarning)


def _lengths(prompts: PromptBatch, donors: Batch | None) -> str | None:
    """Say that prompts differ in length; None if they do not."""
    lengths = prompts.target.mask.sum(1).cpu()
    source = donors if prompts.source is None else prompts.source
    sources = lengths if source is None else source.mask.sum(1).cpu()
    every = torch.cat([lengths, sources])
    shortest, longest = int(every.min()), int(every.max())
    if shortest == longest:
        return None
    apart = int((lengths != sources).sum())
    pairs = f", and differ within {apart} of {len(lengths)} pairs" if apart else ""
    return (
        f"prompts have {shortest} to {longest} tokens{pairs}: a position is a place in the batch "
        f"of {prompts.seq_len}, padded on the left, so that each column mixes what stands that far "
        "from the end of each prompt"
    )


def _spans(prompts: PromptBatch) -> str | None:
    """Say that a span stands at other places in other prompts; None if none does."""
    for name, span in prompts.spans.items():
        sides = {"source": span.source, "target": span.target}
        for side, ends in sides.items():
            starts = ends[:, 0][ends[:, 0] >= 0]
            if len(starts) and int(starts.min()) != int(starts.max()):
                return (
                    f"span {name!r} begins at position {int(starts.min())} in one {side} prompt "
                    f"and at {int(starts.max())} in another, so that each column mixes other words"
                )
        both = (span.source >= 0).all(1) & (span.target >= 0).all(1)
        moved = both & (span.source[:, 0] != span.target[:, 0])
        if moved.any():
            pair = int(moved.nonzero()[0])
            return (
                f"span {name!r} begins at position {int(span.source[pair, 0])} in the source of "
                f"pair {pair} and at {int(span.target[pair, 0])} in its target, so that a position "
                "puts other words' values there"
            )
    return None


def _words(prompts: PromptBatch, strings: Mapping[int, str]) -> str | None:
    """Say that prompts have other words at the same places; None if they are of one template."""
    target = prompts.target.to(torch.device("cpu"))
    source = target if prompts.source is None else prompts.source.to(torch.device("cpu"))
    # Where the two runs of a pair differ is what the pair is about, and no template.
    fixed = (source.tokens == target.tokens) & target.mask.bool()
    kinds = templates_of(target.tokens, fixed)
    if len(kinds) == 1:
        return None
    column, words = _example(target, fixed, kinds, strings)
    count = f"{len(kinds)}{' or more' if len(kinds) == MOST else ''}"
    return (
        f"prompts have other words at the same places, as of {count} templates: position "
        f"{column} is {' and '.join(words)}, and each column mixes them"
    )


def _example(
    batch: Batch, fixed: Tensor, kinds: list[int], strings: Mapping[int, str]
) -> tuple[int, list[str]]:
    """The last column in which two templates have other words, and these."""
    first, second = kinds[:2]
    both = fixed[first] & fixed[second] & (batch.tokens[first] != batch.tokens[second])
    column = int(both.nonzero()[-1])
    tokens = (int(batch.tokens[prompt, column]) for prompt in (first, second))
    return column, [repr(strings.get(token, str(token))) for token in tokens]


def _mixes(sites: SweepSites, seq_len: int) -> bool:
    """Whether places count that prompts of different lengths do not share."""
    if isinstance(sites, Together):
        return any(_mixes(part, seq_len) for part in sites.parts)
    if isinstance(sites, SiteList):
        named = {_positions(cell) for cell in sites.sites} - {frozenset()}
        taken = {_positions(cell, sources=True) for cell in sites.sites}
        return len(named) > 1 or any(_from_start(each, seq_len) for each in named | taken)
    if not isinstance(sites, Sites) or has_place(sites.strategy):
        return False
    strategy: Any = sites.strategy
    if isinstance(strategy, Custom | CustomConstant) and (
        _from_start(strategy.positions, seq_len) or _from_start(strategy.source or (), seq_len)
    ):
        return True
    expands: SeqPos = strategy
    return expands.one_by_one and len(groups_of(expands, seq_len)) > 1


def _positions(cell: AnySite, *, sources: bool = False) -> frozenset[Any]:
    """The positions that a cell names for all prompts; none where it is patched at all of them."""
    every = (site.source_seq_pos if sources else site.seq_pos for site in cell.sites)
    return frozenset(at for named in every if not are_per_prompt(named) for at in named or ())


def _from_start(positions: Any, seq_len: int) -> bool:
    """Whether some are counted from the start; the last one is the last one of each prompt."""
    return any(0 <= position < seq_len - 1 for position in positions)
