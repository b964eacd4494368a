"""The values of an ablation: zeros, means over a data set, or another prompt's activations."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core._models import Elsewhere
from nnpatch_core.adapters import Location
from nnpatch_core.batch import Batch
from nnpatch_core.errors import PositionError, TokensError
from nnpatch_core.interventions.averages import mean_activations, mean_at_positions
from nnpatch_core.interventions.constants import Recorded, RecordedElsewhere, Zeros
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention, Patches, aligned, record


def zeros(batch: Batch) -> Values:
    """Zeros."""
    return Values(batch.mask, lambda _, chunk: (None, Zeros(batch.mask[chunk])), {})


def means(
    sweep: Sweep,
    batch: Batch,
    data: Iterable[Batch] | None,
    per_position: bool,
    remembered: dict[Location, Tensor] | None = None,
) -> Values:
    """The mean over the data set, or over the prompts themselves.

    `remembered` has the means over all tokens of the data set, or will have them.
    """
    places, width = sweep.patches.places, batch.seq_len
    data = map(batch.rows, sweep.chunks) if data is None else data
    if remembered is None:
        means, known = mean_activations(sweep.nnmodel, places, data, width, per_position)
    else:
        if any(place.location not in remembered for place in places):
            remembered.update(mean_activations(sweep.nnmodel, places, data, 1, False)[0])
        means = {place.location: remembered[place.location] for place in places}
        means = {location: mean.expand(-1, width, -1) for location, mean in means.items()}
        known = torch.ones(width, dtype=torch.int64, device="cpu")
    mask = batch.mask * known.to(batch.mask.device)
    # Where positions are averaged together, all have what the last has.
    kept = slice(None) if per_position else slice(-1, None)
    numbers = torch.cat([value[0, kept].flatten() for value in means.values()])
    depends = {"mean": numbers, "mask": mask}
    return Values(mask, lambda _, chunk: (None, Recorded(means, mask[chunk])), depends)


def numbered(patches: Patches, batch: Batch) -> Patches:
    """The cells, whose positions are numbered, each for all prompts: `own_means` has such a run."""
    moved, first = {}, 0
    for positions in patches.positions:
        at = _real(positions, batch)
        numbers = first + positions.numbered.expand_as(at)
        moved[id(positions)] = Positions(at, torch.where(at == NONE, NONE, numbers))
        first += at.shape[1]
    return patches.moved(moved)


def own_means(sweep: Sweep, batch: Batch) -> Values:
    """For each position of each cell the mean over what the prompts have at their own."""
    patches = sweep.patches
    means = mean_at_positions(sweep.nnmodel, patches.places, batch, sweep.chunks, patches.positions)
    depends = {"mean": torch.cat([value.flatten() for value in means.values()])}
    mask = batch.mask
    return Values(mask, lambda _, chunk: (None, Recorded(means, mask[chunk])), depends)


def of_partners(patches: Patches, batch: Batch, partners: Tensor) -> Patches:
    """The cells, whose values come from each prompt's partner, at that prompt's own positions.

    Raises:
        PositionError: a partner has another number of positions.
    """
    moved = {}
    for positions in patches.positions:
        at = _real(positions, batch)
        columns = positions.numbered.expand_as(at)
        # By column, in which a partner has what the prompt has there.
        by_column = at.scatter(1, columns.clamp(min=0), at)
        source = by_column[partners].gather(1, columns.clamp(min=0))
        uneven = ((at == NONE) != (source == NONE)).any(1)
        if len(positions.at) == 1:
            # Of prompts that are too short for a position, neither gives nor takes.
            both = (at != NONE) & (source != NONE)
            at, source = torch.where(both, at, NONE), torch.where(both, source, NONE)
        elif uneven.any():
            prompt = int(uneven.nonzero()[0])
            raise PositionError(
                f"prompt {prompt} is resampled from prompt {int(partners[prompt])}, which has "
                "another number of tokens in a span: take token='last' or 'first', or another seed"
            )
        moved[id(positions)] = Positions(at, source)
    return patches.moved(moved)


def _real(positions: Positions, batch: Batch) -> Tensor:
    """`[batch, k]`, the positions at which each prompt has a token, -1 elsewhere."""
    at = positions.at.expand(len(batch), -1)
    return torch.where(positions.picked(batch.mask.bool().cpu()), at, NONE)


def resampled(batch: Batch, donors: Batch, *, elsewhere: bool = False) -> Values:
    """Each prompt's donor, aligned at the right end.

    Args:
        batch: the prompts.
        donors: for each of them the one it takes from.
        elsewhere: whether sites know themselves where a donor has what they take.
    """
    known = aligned(donors.mask[..., None], batch.seq_len)[..., 0]
    mask = batch.mask if elsewhere else batch.mask * known.to(batch.mask.device)

    def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
        places, store = some.patches.places, some.limits.store
        own = donors.rows(chunk)
        if isinstance(some.nnmodel, Elsewhere):
            offset = donors.seq_len - batch.seq_len
            return None, RecordedElsewhere(own, mask[chunk], offset)
        _, recorded = record(some.nnmodel, own, places, store)
        activations = {at: aligned(value, batch.seq_len) for at, value in recorded.items()}
        return None, Recorded(activations, mask[chunk])

    # What a donor's padding holds does not count, and where it is does.
    reference = torch.stack([donors.tokens * donors.mask, donors.mask])
    return Values(mask, of, {"reference": reference, "mask": mask})


def widened(values: Values, appended: int) -> Values:
    """The same for prompts with an answer appended, where nothing is ever put."""
    if not appended:
        return values

    def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
        logits, intervention = values.of(some, chunk)
        mask = pad(intervention.mask, (0, appended))
        # Ours are values, whose mask is one of their fields.
        return logits, attrs.evolve(intervention, mask=mask)  # type: ignore[misc]

    return attrs.evolve(values, mask=pad(values.mask, (0, appended)), of=of)


def draw(batch: Batch, data: Iterable[Batch] | None, seed: int) -> tuple[Batch, Tensor | None]:
    """For each prompt the one whose activations it gets; its number, where it is of the batch."""
    random = torch.Generator().manual_seed(seed)
    count = len(batch)
    if data is not None:
        drawn = list(data)
        if len(drawn) != 1:
            raise TokensError(
                f"method='resample' takes one batch as reference, got {len(drawn)}: "
                "pad them to one width"
            )
        numbers = torch.randint(len(drawn[0]), (count,), generator=random, device="cpu")
        return drawn[0].rows(numbers), None
    if count < 2:
        raise TokensError(
            "method='resample' takes another prompt of the batch, but the batch has one; "
            "pass reference="
        )
    # Each prompt takes the next one of a random cycle, so that none takes itself.
    cycle = torch.randperm(count, generator=random, device="cpu")
    partner = torch.empty(count, dtype=torch.int64, device="cpu")
    partner[cycle] = cycle.roll(1)
    return batch.rows(partner), partner
