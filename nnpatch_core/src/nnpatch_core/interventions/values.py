"""What an ablation puts at its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import attrs
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.errors import TokensError
from nnpatch_core.interventions.averages import aligned, mean_activations
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.tracing import Recorded, Replacement, Zeros, record


@attrs.frozen(eq=False)
class Values:
    """What is put at the sites.

    Args:
        mask: `[batch, seq]`: where.
        of_rows: what, for some of the prompts.
        given: what that depends on besides the prompts.
    """

    mask: Tensor
    of_rows: Callable[[slice], Replacement]
    given: Mapping[str, Tensor]


def zeros(batch: Batch) -> Values:
    """Zeros."""
    return Values(batch.mask, lambda rows: Zeros(batch.mask[rows]), {})


def means(sweep: Sweep, batch: Batch, data: Iterable[Batch] | None, per_position: bool) -> Values:
    """The mean over the data set, or over the prompts themselves."""
    nnmodel = sweep.nnmodel
    data = map(batch.rows, sweep.chunks(len(batch))) if data is None else data
    means, known = mean_activations(nnmodel, sweep.places, data, batch.seq_len, per_position)
    mask = batch.mask * known.to(batch.mask.device)
    # Where positions are averaged together, all have what the last has.
    kept = slice(None) if per_position else slice(-1, None)
    numbers = torch.cat([value[0, kept].flatten() for value in means.values()])
    given = {"mean": numbers, "mask": mask}
    return Values(mask, lambda rows: Recorded(means, mask[rows]), given)


def resampled(sweep: Sweep, batch: Batch, donors: Batch) -> Values:
    """Each prompt's donor, aligned at the right end."""
    known = aligned(donors.mask[..., None], batch.seq_len)[..., 0]
    mask = batch.mask * known.to(batch.mask.device)

    def of_rows(rows: slice) -> Replacement:
        store = sweep.limits.store
        _, found = record(sweep.nnmodel, donors.rows(rows), sweep.places, store)
        activations = {at: aligned(value, batch.seq_len) for at, value in found.items()}
        return Recorded(activations, mask[rows])

    # What a donor's padding holds does not count, and where it is does.
    reference = torch.stack([donors.tokens * donors.mask, donors.mask])
    return Values(mask, of_rows, {"reference": reference, "mask": mask})


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
