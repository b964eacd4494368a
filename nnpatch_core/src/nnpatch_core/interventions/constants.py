"""Interventions whose values do not depend on what they replace."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.errors import EngineError
from nnpatch_core.tracing import Origin, PatchedTokens


@attrs.frozen(eq=False)
class Recorded:
    """Activations recorded elsewhere: another run's, or means over a data set.

    Args:
        activations: `Place.location` to `[batch or 1, positions from first on, width]`.
        mask: `[batch, seq]`: 1 where the patched run has a token and a value was recorded.
        first: the position of the activations' first token.
    """

    activations: Mapping[Location, Tensor]
    mask: Tensor
    first: int = 0
    by_cell: bool = attrs.field(default=False, init=False)

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`."""
        whole = self.activations[place.location]
        prompts = tokens.prompts if len(whole) > 1 else torch.zeros_like(tokens.prompts)
        sources = tokens.sources - self.first
        values = whole[prompts.to(whole.device), sources.to(whole.device)]
        return values.to(device=there.device, dtype=there.dtype)

    def origin(self) -> Origin:
        """See `Sendable.origin`."""
        return Origin(given=self.activations, offset=-self.first)


@attrs.frozen(eq=False)
class RecordedElsewhere:
    """Activations of a run that stay where the model is: each request records what it needs anew.

    Args:
        run: the prompts.
        mask: `[batch, seq]`: 1 where the patched run has a token and the run has a value.
        offset: what is added to a position of the source to get that of the run.
    """

    run: Batch
    mask: Tensor
    offset: int = 0
    by_cell: bool = attrs.field(default=False, init=False)

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`: nothing of it is here.

        Raises:
            EngineError: always.
        """
        raise EngineError(f"the activations at {place.name} are elsewhere")

    def origin(self) -> Origin:
        """See `Sendable.origin`."""
        return Origin(run=self.run, offset=self.offset)


@attrs.frozen(eq=False)
class Zeros:
    """Zeros.

    Args:
        mask: `[batch, seq]`: 1 where the patched run has a token.
    """

    mask: Tensor
    by_cell: bool = attrs.field(default=False, init=False)

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """See `Intervention.patched`."""
        return torch.zeros_like(there)

    def origin(self) -> Origin:
        """See `Sendable.origin`."""
        return Origin()
