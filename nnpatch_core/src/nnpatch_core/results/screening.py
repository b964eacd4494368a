"""The bound that a screened sweep puts on the cells that it did not measure."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import attrs

from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.formats import COUNT, SIZE, TEXT, stored


@attrs.frozen
class Screening:
    """The choice of the cells that were measured, and the result of a spot check of the others.

    Args:
        by: the estimate that chose them.
        chosen: the number of cells that were measured because it put them first.
        rest: the number of cells that it put behind them.
        checked: the number of the rest that were measured too, drawn at random.
        largest: the largest absolute value among those; 0 if there were none.

    Examples:
        >>> Screening("attribution", chosen=20, rest=1000, checked=60, largest=0.01).rest
        1000
    """

    by: str = attrs.field(metadata=stored(TEXT))
    chosen: int = attrs.field(metadata=stored(COUNT))
    rest: int = attrs.field(metadata=stored(COUNT))
    checked: int = attrs.field(metadata=stored(COUNT))
    largest: float = attrs.field(metadata=stored(SIZE))

    def missed_at_most(self, confidence: float = 0.95) -> int:
        """The number of cells that were not measured and may exceed `largest`, at most.

        If there were more of them, a draw of `checked` cells would have met one with at least the
        probability `confidence`. Nothing is assumed of the cells: the draw was without replacement.
        Kramár et al., "AtP*" (2024), bound what was missed by random subsets in the same spirit;
        they patch the cells of a subset together, and assume that these do not cancel.

        Args:
            confidence: between 0 and 1.

        Raises:
            OutcomeError: a confidence that is not.

        Examples:
            >>> screening = Screening("attribution", chosen=20, rest=1000, checked=60, largest=0.01)
            >>> screening.missed_at_most()
            47
        """
        if not _is_share(confidence):
            raise OutcomeError(f"confidence must be between 0 and 1, got {shown(confidence)}")
        unseen = self.rest - self.checked
        allowed, log_missed = math.log(1 - confidence), 0.0
        for count in range(1, unseen + 1):
            # The draw misses `count` cells if it misses the ones before, and then this one too.
            log_missed += math.log((self.rest - self.checked - count + 1) / (self.rest - count + 1))
            if log_missed <= allowed:
                return count - 1
        return unseen


def _is_share(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < 1
