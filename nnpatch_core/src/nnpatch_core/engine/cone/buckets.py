"""Buckets: patched runs that share a trace; of all of a sweep as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.engine.cone.patched_runs import PatchedRuns
from nnpatch_core.memory import in_units


def counted(count: int, what: str) -> str:
    """A number of things.

    Examples:
        >>> counted(1, "row"), counted(2, "row")
        ('1 row', '2 rows')
    """
    return f"{count} {what}" + "s" * (count != 1)


@attrs.frozen(eq=False, repr=False)
class Bucket:
    """Patched runs that share a trace, from one token on.

    Args:
        start: the first position that is run.
        runs: the patched runs, in the order in which they enter: each is a row of the trace.
        peak: bytes in use while it runs, those of the recorded runs among them.
        fitting: how many such runs memory has room for at once.
    """

    start: int
    runs: PatchedRuns
    peak: int
    fitting: int

    def __repr__(self) -> str:
        rows = counted(len(self.runs), "row")
        return f"Bucket({rows} from token {self.start} on, peak {in_units(self.peak)})"

    def halves(self) -> tuple[Bucket, Bucket]:
        """Two buckets of half the runs."""
        middle = len(self.runs) // 2
        first, second = self.runs.take(slice(middle)), self.runs.take(slice(middle, None))
        most = len(second)
        return (
            Bucket(self.start, first, self.peak, most),
            Bucket(self.start, second, self.peak, most),
        )


@attrs.frozen(eq=False)
class Buckets(Sequence[Bucket]):
    """The buckets of a sweep, each made when it is asked for.

    Args:
        runs: the runs of all buckets, one bucket after another.
        ends: `[buckets + 1]`: bucket `n` has the runs from `ends[n]` to `ends[n + 1]`.
        start: `[buckets]`, the first position that is run.
        peak: `[buckets]`, bytes in use while it runs.
        fitting: `[buckets]`, how many such runs memory has room for at once.
    """

    runs: PatchedRuns
    ends: Integers
    start: Integers
    peak: Integers
    fitting: Integers

    @classmethod
    def of(cls, buckets: Iterable[Bucket]) -> Buckets:
        """Buckets that are there already."""
        if isinstance(buckets, cls):
            return buckets
        given = list(buckets)
        numbers = [(each.start, each.peak, each.fitting, len(each.runs)) for each in given]
        start, peak, fitting, sizes = np.array(numbers, dtype=np.int64).reshape(-1, 4).T
        runs = PatchedRuns.joined([each.runs for each in given])
        return cls(runs, np.concatenate([[0], np.cumsum(sizes)]), start, peak, fitting)

    @classmethod
    def joined(cls, parts: Sequence[Buckets]) -> Buckets:
        """The buckets of several, one after another."""
        sizes = np.concatenate([part.sizes for part in parts])
        columns = ([getattr(part, name) for part in parts] for name in ("start", "peak", "fitting"))
        return cls(
            PatchedRuns.joined([part.runs for part in parts]),
            np.concatenate([[0], np.cumsum(sizes)]),
            *map(np.concatenate, columns),
        )

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, index: int) -> Bucket: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Bucket]: ...

    def __getitem__(self, index: int | slice) -> Bucket | Sequence[Bucket]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        first, last = self.ends[number : number + 2].tolist()
        return Bucket(
            int(self.start[number]),
            self.runs.take(slice(first, last)),
            int(self.peak[number]),
            int(self.fitting[number]),
        )

    def __iter__(self) -> Iterator[Bucket]:
        return (self[number] for number in range(len(self)))

    @property
    def sizes(self) -> Integers:
        """`[buckets]`: how many runs each has."""
        return np.diff(self.ends)

    @property
    def bucket_of_runs(self) -> Integers:
        """`[runs]`: the bucket of each."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def any_run(self, flags: Booleans) -> Booleans:
        """`[runs]` as `[buckets]`: whether any run of a bucket has a flag."""
        if not len(self):
            return np.zeros(0, dtype=np.bool_)
        found: Booleans = np.logical_or.reduceat(flags, self.ends[:-1])
        return found
