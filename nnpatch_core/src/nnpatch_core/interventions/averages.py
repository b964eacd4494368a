"""Means of activations over a data set of any size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnpatch_core._models import Elsewhere, as_nnsight, evaluating, in_one_thread, module_of
from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError
from nnpatch_core.interventions.inputs import read_batches
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.site import check_site, execution_order
from nnpatch_core.sites import Sites
from nnpatch_core.tracing import forward, record, summed, tokens_there, total, totals_there


@in_one_thread
def cache_average(nnmodel: Any, sites: Iterable[Any], batches: Any) -> None:
    """Fill each site's cache with the mean of its activation over a data set.

    Runs the batches one at a time and keeps only sums, so the data set may be larger than memory.
    `site.patch(nnmodel)` in a trace then puts the mean there. Positions count in each batch's
    left-padded layout, so -1 is each prompt's last token; name positions from the end where
    lengths differ.

    Args:
        nnmodel: an `NNsight`, a `TransformersModel` or a plain Hugging Face model.
        sites: `Site` and `MultiSite` objects; what they had cached is forgotten.
        batches: one batch or an iterable of them: tokens `[batch, seq]`, a tuple `(tokens, mask)`,
            or a tokenizer's output.

    Raises:
        PatchingError: a site that the model does not have, a malformed batch, an empty data set,
            or a prompt that has padding at a site's position.

    Examples:
        >>> import torch
        >>> from nnpatch_core import Site
        >>> from nnpatch_core.testing import tiny_api, tiny_model
        >>> site = Site.get_site(tiny_api(), "mlp", layer=1, seq_pos=[-1])
        >>> cache_average(tiny_model("llama"), [site], torch.tensor([[5, 6], [7, 8]]))
        >>> site.value.shape
        torch.Size([1, 1, 32])
    """
    traced = as_nnsight(nnmodel)
    model = module_of(traced)
    given = [each for cell in Sites.from_sites(sites).sites for each in cell.sites]
    for site in given:
        check_site(site, model)
        site.clear()
    wanted = execution_order(given, traced)
    empty = True

    def visit(model: Any) -> None:
        for site in wanted:
            site.cache(model, average=True)

    with evaluating(model):
        for batch in read_batches(traced, "the data set", batches):
            for site in wanted:
                positions = site.positions(batch.seq_len)
                if len(positions.at) not in (1, len(batch)):
                    raise TokensError(
                        f"site {site.label} has positions of {len(positions.at)} prompts, and a "
                        f"batch of the data set has {len(batch)}: name positions for all prompts"
                    )
                # A cache looks at the source's positions.
                taken = positions if positions.source is None else Positions(positions.source)
                if not bool((taken.picked(batch.mask.bool().cpu()) | (taken.at < 0)).all()):
                    raise TokensError(
                        f"site {site.label} meets padding in a batch of the data set, whose "
                        "prompts are too short for a mean there; name positions from the end"
                    )
            forward(traced, batch, visit)
            empty = False
    if empty:
        raise TokensError("the data set is empty: a mean needs at least one batch")


def mean_activations(
    nnmodel: Any,
    places: Sequence[Place],
    batches: Iterable[Batch],
    seq_len: int,
    per_position: bool,
) -> tuple[dict[Location, Tensor], Tensor]:
    """Mean activations over the real tokens of a data set.

    A batch is added up in float32 where it was computed, the batches in float64 on the CPU.

    With `per_position` each position, counted from the end, is averaged apart; otherwise all
    together.

    Returns:
        `[1, seq, width]` for each `Place.location`, and `[seq]`: 1 where some prompt had a token.
    """
    sums: dict[Location, Tensor] = {}
    counts: Tensor | None = None

    for batch in batches:
        kind = seq_len, per_position
        count = summed(batch.mask[..., None], *kind).cpu()
        counts = count if counts is None else counts + count
        if isinstance(nnmodel, Elsewhere):
            totals = totals_there(nnmodel, batch, places, *kind)
        else:
            _, recorded = record(nnmodel, batch, places)
            totals = {at: total(value, batch.mask, *kind) for at, value in recorded.items()}
        for location, part in totals.items():
            added = part.cpu().double()
            sums[location] = sums[location] + added if location in sums else added
    if counts is None:
        raise TokensError("the data set is empty: a mean needs at least one batch")
    means = {
        location: (values / counts.clamp(min=1)).float().expand(-1, seq_len, -1)
        for location, values in sums.items()
    }
    return means, (counts[0, :, 0] > 0).long().expand(seq_len)


def mean_at_positions(
    nnmodel: Any,
    places: Sequence[Place],
    batch: Batch,
    chunks: Iterable[slice],
    positions: Sequence[Positions],
) -> dict[Location, Tensor]:
    """Mean activations over prompts, of which each has positions of its own.

    Args:
        nnmodel: the model, wrapped by nnsight.
        places: where activations are.
        batch: the prompts.
        chunks: those that run together.
        positions: the positions; their sources are the numbers of the means.

    Returns:
        `[1, means, width]` for each `Place.location`.
    """
    size = 1 + max(int(each.source.max()) for each in positions if each.source is not None)
    sums: dict[Location, Tensor] = {}
    counts = torch.zeros(size, dtype=torch.float64, device="cpu")
    for chunk in chunks:
        own = batch.rows(chunk)
        tokens = [_numbered(each.rows(chunk)) for each in positions]
        prompts, at, numbers = (torch.cat(columns) for columns in zip(*tokens, strict=True))
        counts.index_add_(0, numbers, torch.ones(len(numbers), dtype=torch.float64, device="cpu"))
        for location, found in _at_tokens(nnmodel, own, places, prompts, at).items():
            values = found.double()
            if location not in sums:
                sums[location] = values.new_zeros(size, values.shape[-1])
            sums[location].index_add_(0, numbers, values)
    return {
        location: (total / counts.clamp(min=1)[:, None]).float()[None]
        for location, total in sums.items()
    }


def _at_tokens(
    nnmodel: Any, batch: Batch, places: Sequence[Place], prompts: Tensor, at: Tensor
) -> dict[Location, Tensor]:
    """For each place `[tokens, width]` of some tokens of prompts, in float32 on the CPU."""
    if isinstance(nnmodel, Elsewhere):
        return tokens_there(nnmodel, batch, places, prompts, at)
    _, recorded = record(nnmodel, batch, places)
    return {
        location: whole[prompts.to(whole.device), at.to(whole.device)].float().cpu()
        for location, whole in recorded.items()
    }


def _numbered(positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt, position and source of each token, of positions with sources."""
    assert positions.source is not None
    prompts, columns = (positions.at != NONE).nonzero().T
    return prompts, positions.at[prompts, columns], positions.source[prompts, columns]
