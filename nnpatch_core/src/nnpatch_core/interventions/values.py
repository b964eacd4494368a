"""The values of an ablation: zeros, means over a data set, or another prompt's activations."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError
from nnpatch_core.interventions.averages import aligned, mean_activations
from nnpatch_core.interventions.constants import Recorded, Zeros
from nnpatch_core.sweep import Sweep, Values
from nnpatch_core.tracing import Intervention, record


def zeros(batch: Batch) -> Values:
    """Zeros."""
    return Values(batch.mask, lambda _, chunk: (None, Zeros(batch.mask[chunk])), {})


def means(sweep: Sweep, batch: Batch, data: Iterable[Batch] | None, per_position: bool) -> Values:
    """The mean over the data set, or over the prompts themselves."""
    places = sweep.patches.places
    data = map(batch.rows, sweep.chunks) if data is None else data
    means, known = mean_activations(sweep.nnmodel, places, data, batch.seq_len, per_position)
    mask = batch.mask * known.to(batch.mask.device)
    # Where positions are averaged together, all have what the last has.
    kept = slice(None) if per_position else slice(-1, None)
    numbers = torch.cat([value[0, kept].flatten() for value in means.values()])
    depends = {"mean": numbers, "mask": mask}
    return Values(mask, lambda _, chunk: (None, Recorded(means, mask[chunk])), depends)


def resampled(batch: Batch, donors: Batch) -> Values:
    """Each prompt's donor, aligned at the right end."""
    known = aligned(donors.mask[..., None], batch.seq_len)[..., 0]
    mask = batch.mask * known.to(batch.mask.device)

    def of(some: Sweep, chunk: slice) -> tuple[Tensor | None, Intervention]:
        places, store = some.patches.places, some.limits.store
        _, recorded = record(some.nnmodel, donors.rows(chunk), places, store)
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


def draw(batch: Batch, data: Iterable[Batch] | None, seed: int) -> Batch:
    """For each prompt the one whose activations it gets."""
    random = torch.Generator().manual_seed(seed)
    count = len(batch)
    if data is not None:
        drawn = list(data)
        if len(drawn) != 1:
            raise TokensError(
                f"method='resample' takes one batch as reference, got {len(drawn)}: "
                "pad them to one width"
            )
        return drawn[0].rows(torch.randint(len(drawn[0]), (count,), generator=random, device="cpu"))
    if count < 2:
        raise TokensError(
            "method='resample' takes another prompt of the batch, but the batch has one; "
            "pass reference="
        )
    # Each prompt takes the next one of a random cycle, so that none takes itself.
    cycle = torch.randperm(count, generator=random, device="cpu")
    partner = torch.empty(count, dtype=torch.int64, device="cpu")
    partner[cycle] = cycle.roll(1)
    return batch.rows(partner)
