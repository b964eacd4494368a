"""A share of a sweep: which patched runs one of several processes measures."""

from __future__ import annotations

import re
from typing import Any

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._printable import shown
from nnpatch_core.engine import Execution, even_shares
from nnpatch_core.errors import ShardError

#: More shards than anybody has processes for.
_MOST = 100_000


@attrs.frozen
class Share:
    """One share of several.

    Args:
        number: which one, from 1.
        count: how many there are.

    Examples:
        >>> print(Share.of("3/16"))
        3/16
    """

    number: int
    count: int

    @classmethod
    def of(cls, words: Any) -> Share:
        """The share that `K/N` names.

        Raises:
            ShardError: it names none.
        """
        if isinstance(words, cls):
            return words
        found = (
            re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", words) if isinstance(words, str) else None
        )
        if found is None:
            raise ShardError(
                f"a shard is K/N, such as 3/16 for the third of sixteen, got {shown(words)}"
            )
        number, count = map(int, found.groups())
        if count > _MOST:
            raise ShardError(f"shard {words} is one of too many: at most {_MOST} are allowed")
        if not 1 <= number <= count:
            raise ShardError(
                f"there is no shard {words}: with /{count} they are 1/{count} to {count}/{count}"
            )
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def chunks(self, recorded: Integers, patched: Integers) -> Booleans | None:
        """`[chunks]`: which chunks of the prompts it measures; None where all are shared out.

        Shares of whole chunks record only their own, but may be less even than shares of patched
        runs. The cheaper way is taken, by the share that has most to do.

        Args:
            recorded: `[chunks]`, the work of what is recorded.
            patched: `[chunks]`, the work of the patched runs.
        """
        work = recorded + patched
        shares = even_shares(work, self.count)
        most = np.bincount(shares, weights=work, minlength=self.count).max()
        if most > recorded.sum() + patched.sum() / self.count:
            return None
        own: Booleans = shares == self.number - 1
        return own

    def others(self, execution: Execution) -> Booleans:
        """`[cells, batch]`: what other shares measure of a chunk that is shared out.

        Args:
            execution: the chunk, opened.
        """
        theirs: Booleans = execution.shared_out(self.count) != self.number - 1
        return theirs

    def other_cells(self, cells: int) -> Booleans:
        """`[cells]`: which of so many others measure, where a cell waits for all of its prompts."""
        found: Booleans = np.arange(cells) * self.count // max(cells, 1) != self.number - 1
        return found


class ShareMeasured(Exception):  # noqa: N818 - it is no error
    """A share is measured and kept: the sweep ends here, for an outcome needs all shares.

    Args:
        measured: how many patched runs this share has measured, or how many it has estimated.
        told: what it has done, in words.
    """

    def __init__(self, measured: int, told: str) -> None:
        super().__init__(measured, told)
        self.measured, self.told = measured, told
