"""Where the logits of a bucket's runs are read: those left of it are the target run's own."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from nnpatch_core.adapters import Place
from nnpatch_core.engine.cone.target import TargetRun
from nnpatch_core.tracing import Caught, Kept, picked, sites_of, taken


@attrs.frozen(eq=False)
class BucketReading:
    """The logits of a bucket's runs, at the places where they are read.

    Args:
        tokens: `[tokens]`, which rows have one of these places at or right of the first token that
            is run, and where it stands from there.
        kept: makes `[rows, places, ids]` of the model's logits.
    """

    tokens: tuple[Tensor, Tensor]
    kept: Kept


def read_from(
    target: TargetRun,
    prompts: Tensor,
    start: int,
    ids: Tensor | None,
    restricted: bool,
    entered_at: Callable[[Place], int],
) -> BucketReading:
    """Where the logits of a bucket's runs are read.

    Args:
        target: the recorded target run.
        prompts: `[rows]`, the prompt of each run.
        start: the first position that is run.
        ids: which ids of the vocabulary are wanted; None is all.
        restricted: whether the unembedding gives nothing but the tokens and ids that are wanted,
            `[1, tokens, ids]`.
        entered_at: how many of the rows have entered at a place; they are sorted by that.
    """
    batch = target.batch
    assert batch.read is not None
    wanted = (batch.read >= start) & ~batch.read_padding
    own_sites = sites_of(batch.sites)
    rows, places = wanted[prompts].nonzero().T
    offsets = batch.read[prompts][rows, places] - start
    asked, pick = picked(rows, offsets, batch.seq_len - start)

    def of(logits: Tensor, caught: Caught) -> Tensor:
        whole = target.logits if ids is None else target.logits[..., ids]
        read = whole[prompts]
        read[rows, places] = logits[0].to("cpu", torch.float32) if restricted else pick(logits)
        first = batch.read.shape[1] if batch.read is not None else 0
        for site in own_sites:
            count = site.positions.shape[1]
            entered = min(entered_at(site.place), len(prompts))
            if entered and site.place.location in caught:
                # Of rows that have not entered yet, and left of the bucket, all is the target's.
                own = site.rows(prompts[:entered])
                there = own.real(batch.mask.cpu()[prompts[:entered]]) & (own.positions >= start)
                which, at = there.nonzero().T
                offset, activation = own.positions[which, at] - start, caught[site.place.location]
                read[which, first + at] = taken(site, activation, which, offset, read.shape[-1])
            first += count
        return read

    return BucketReading((rows, offsets), Kept(0 if restricted else asked, of))
