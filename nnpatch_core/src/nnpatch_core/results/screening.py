"""What a screened sweep says of the cells that it did not measure."""

from __future__ import annotations

import math

import attrs

from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.formats import COUNT, SIZE, TEXT, stored


@attrs.frozen
class Screening:
    """How the cells that were measured were chosen, and what a spot check of the others found.

    Args:
        by: the estimate that chose them.
        chosen: how many cells were measured because it put them first.
        rest: how many cells it put behind them.
        checked: how many of the rest were measured too, drawn at random.
        largest: the largest absolute value among those; 0 if there were none.
    """

    by: str = attrs.field(metadata=stored(TEXT))
    chosen: int = attrs.field(metadata=stored(COUNT))
    rest: int = attrs.field(metadata=stored(COUNT))
    checked: int = attrs.field(metadata=stored(COUNT))
    largest: float = attrs.field(metadata=stored(SIZE))

    def missed_at_most(self, confidence: float = 0.95) -> int:
        """How many cells that were not measured may exceed `largest`, at most.

        If there were more of them, a draw of `checked` cells would have met one with at least the
        probability `confidence`. Nothing is assumed of the cells: the draw was without replacement.
        Kramár et al., "AtP*" (2024), bound what was missed by random subsets in the same spirit;
        they patch the cells of a subset together, and assume that these do not cancel.

        Args:
            confidence: between 0 and 1.

        Raises:
            OutcomeError: a confidence that is not.

        Examples:
            >>> found = Screening("attribution", chosen=20, rest=1000, checked=60, largest=0.01)
            >>> found.missed_at_most()
            47
        """
        if not 0 < confidence < 1:
            raise OutcomeError(f"confidence must be between 0 and 1, got {confidence!r}")
        unseen = self.rest - self.checked
        allowed, log_missed = math.log(1 - confidence), 0.0
        for count in range(1, unseen + 1):
            # The draw misses `count` cells if it misses the ones before, and then this one too.
            log_missed += math.log((self.rest - self.checked - count + 1) / (self.rest - count + 1))
            if log_missed <= allowed:
                return count - 1
        return unseen
