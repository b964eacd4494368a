"""A share of a sweep: which patched runs one of several processes measures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans
from nnpatch_core._printable import shown
from nnpatch_core.engine import Execution
from nnpatch_core.errors import ShardError

#: So many chunks for each share, and whole chunks are shared out: each opens its own alone.
_CHUNKS = 4
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

    def has_chunk(self, chunk: int, chunks: int) -> bool:
        """Whether it measures anything in a chunk of the prompts; there are so many."""
        return chunks < _CHUNKS * self.count or chunk % self.count == self.number - 1

    def others(self, execution: Execution, chunks: int) -> Booleans:
        """`[cells, batch]`: what other shares measure of a chunk that this one has.

        Args:
            execution: the chunk, opened.
            chunks: how many there are.
        """
        if chunks >= _CHUNKS * self.count:
            return np.zeros_like(execution.elided)
        theirs: Booleans = execution.shared_out(self.count) != self.number - 1
        return theirs

    def other_cells(self, cells: int) -> Booleans:
        """`[cells]`: which of so many others measure, where a cell waits for all of its prompts."""
        found: Booleans = np.arange(cells) * self.count // max(cells, 1) != self.number - 1
        return found


@attrs.frozen
class ShareFile(os.PathLike[str]):
    """The checkpoint of one share: a sweep that is given it measures that share, and stops.

    Args:
        path: the file.
        share: what is measured.
        told: is told, as the sweep goes on, how much of all is measured or another share's, from 0
            to 1.
    """

    path: Path
    share: Share
    told: Callable[[float], object] = attrs.field(default=float, eq=False)

    def __fspath__(self) -> str:
        return os.fspath(self.path)


class ShareMeasured(Exception):  # noqa: N818 - it is no error
    """A share is measured and kept: the sweep ends here, for an outcome needs all shares.

    Args:
        measured: how many patched runs this share has measured, or how many it has estimated.
        told: what it has done, in words.
    """

    def __init__(self, measured: int, told: str) -> None:
        super().__init__(measured, told)
        self.measured, self.told = measured, told
