"""The parts of an estimate, of which each can be made without the others."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers


@attrs.frozen(eq=False)
class Parts:
    """The parts of an estimate, in a chunk of the prompts each.

    Args:
        owner: `[rows]`: of each row of the tally the part that makes it.
        work: `[parts]`: what each costs, in any unit.
        together: whether a part is made in all prompts or in none, as those are whose metrics are
            given all prompts.
    """

    owner: Integers
    work: Integers
    together: bool = False

    @property
    def there(self) -> list[int]:
        """The parts that some row is of."""
        found: list[int] = np.unique(self.owner).tolist()
        return found

    def rows(self, parts: Sequence[int]) -> Booleans:
        """`[rows]`: which are of some parts."""
        found: Booleans = np.isin(self.owner, parts)
        return found

    def costs(self, chunks: Sequence[slice]) -> Integers:
        """`[chunks, parts]`: what each part costs in each chunk; none where no row is of it."""
        prompts = np.array([chunk.stop - chunk.start for chunk in chunks], dtype=np.int64)
        own = np.zeros(len(self.work), dtype=np.int64)
        own[self.there] = np.maximum(self.work[self.there], 1)
        return np.outer(prompts, own)

    def shared_out(self, chunks: Sequence[slice], count: int) -> Integers:
        """`[chunks, parts]`: which of `count` shares, from 0, makes each part in each chunk.

        One after another, so that a share has few chunks, and about as much work as the others.
        """
        costs = self.costs(chunks)
        if self.together:
            shares = _in_turn(costs.sum(0), count)
            return np.broadcast_to(shares, costs.shape)
        return _in_turn(costs.flatten(), count).reshape(costs.shape)


def _in_turn(costs: Integers, count: int) -> Integers:
    """The share in which each of some costs begins, if they stand one after another."""
    starts: Integers = (np.cumsum(costs) - costs) * count // max(int(costs.sum()), 1)
    # One that costs nothing may begin where all end.
    return np.minimum(starts, count - 1)
