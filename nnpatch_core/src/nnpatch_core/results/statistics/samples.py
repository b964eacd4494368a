"""Samples: the prompts of outcomes as numbers that can be drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core.results.statistics.values import Figured, changes_of, size_of

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

Floats: TypeAlias = NDArray[np.float64]
#: Of a difference, as a share of what is taken apart.
_ROUNDING = 1e-13
#: Logits in float32 that should be equal differ by less than this share of a metric.
_STILL = 1e-5


@attrs.frozen(eq=False)
class Sample:
    """Cells in some prompts: the value of a cell is `weight` x mean(changes) / mean(whole).

    Args:
        changes: `[cells, prompts]`, how far a patch moved the metric of the target run.
        whole: `[prompts]`, how far the source run is from it; 1 where values are changes.
        weight: of these prompts' value in a sum of several.
        size: of the metric, of which rounding is a share; 0 where nothing is known of it.
    """

    changes: Floats
    whole: Floats
    weight: float = 1.0
    size: float = 0.0

    def values(self) -> Floats:
        """`[cells]`."""
        values: Floats = self.weight * self.changes.mean(1) / self.whole.mean()
        return values

    def residuals(self) -> Floats:
        """`[cells, prompts]`, of mean 0: how far each prompt pulls the value."""
        own = self.changes.mean(1, keepdims=True) / self.whole.mean()
        pulls: Floats = self.changes - own * self.whole
        # Where all prompts have one value, what is left is rounding.
        pulls[np.abs(pulls) <= _ROUNDING * np.abs(self.changes)] = 0.0
        pulls *= self.weight / self.whole.mean()
        return pulls

    def without_each(self) -> Floats:
        """`[cells, prompts]`: the value without each of the prompts."""
        rest = self.changes.sum(1, keepdims=True) - self.changes
        values: Floats = self.weight * rest / (self.whole.sum() - self.whole)
        return values


@attrs.frozen(eq=False)
class Samples:
    """Samples whose values are summed up.

    Args:
        parts: the samples, of the same cells.
        paired: whether all are of the same prompts, in the same order, so that these are drawn
            together; each is drawn by itself otherwise.
    """

    parts: tuple[Sample, ...]
    paired: bool = True

    @property
    def drawn(self) -> tuple[tuple[Sample, ...], ...]:
        """The samples, those that are drawn together side by side."""
        return (self.parts,) if self.paired else tuple((part,) for part in self.parts)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of prompts of each draw."""
        return tuple(len(parts[0].whole) for parts in self.drawn)

    def cells(self, rows: NDArray[Any]) -> Samples:
        """The samples of some cells alone."""
        parts = tuple(attrs.evolve(part, changes=part.changes[rows]) for part in self.parts)
        return attrs.evolve(self, parts=parts)

    def values(self) -> Floats:
        """`[cells]`."""
        return _summed([part.values() for part in self.parts])

    def moves(self) -> NDArray[np.bool_]:
        """`[cells]`, bool: whether a patch moves the metric of some prompt by more than rounding.

        Statistics of what is rounding would be about the machine, and other ones by each engine.
        """
        found: NDArray[np.bool_] = np.logical_or.reduce(
            [np.abs(part.changes).max(1) > _STILL * part.size for part in self.parts]
        )
        return found

    def varies(self) -> NDArray[np.bool_]:
        """`[cells]`, bool: whether prompts differ in the value by more than rounding.

        A cell that is the source run does not.
        """
        found: NDArray[np.bool_] = np.logical_or.reduce(
            [
                np.abs(part.residuals()).max(1) * np.abs(part.whole.mean())
                > _STILL * np.abs(part.weight) * part.size
                for part in self.parts
            ]
        )
        return found

    def residuals(self) -> list[Floats]:
        """For each draw `[cells, prompts]`, of mean 0: how far each prompt pulls the value."""
        return [_summed([part.residuals() for part in parts]) for parts in self.drawn]

    def without_each(self) -> list[Floats]:
        """For each draw `[cells, prompts]`: its part of the value without each prompt."""
        return [_summed([part.without_each() for part in parts]) for parts in self.drawn]

    def effects(self) -> Floats:
        """`[cells, prompts]`: what each prompt adds to the mean that is the value; paired ones."""
        return _summed([part.weight * part.changes / part.whole.mean() for part in self.parts])

    def wholes(self) -> list[Samples]:
        """The mean of `whole` of each sample, as a sample of one cell."""
        return [
            Samples((Sample(part.whole[None], np.ones_like(part.whole)),)) for part in self.parts
        ]


def samples_of(figured: Figured, name: str) -> Samples:
    """The samples of an outcome's site name, or of a combination's, `[swept cells]`.

    Prompts stand in an order of their own, so that the user's order changes no figure.
    """
    terms = figured.terms
    together = orders([term.outcome for term in terms])
    each = together or [_order(term.outcome, _marks(term.outcome)) for term in terms]
    parts = []
    for term, order in zip(terms, each, strict=True):
        changes, whole = changes_of(term.outcome, name)
        changes = changes if term.rows is None else changes[term.rows[name].numpy()]
        size = size_of(term.outcome)
        parts.append(Sample(changes[:, order], whole[order], term.weight, size))
    return Samples(tuple(parts), together is not None)


def joined(samples: Sequence[Samples]) -> Samples:
    """The cells of several samples of the same prompts, as one."""
    parts = tuple(
        attrs.evolve(part, changes=np.concatenate([one.parts[number].changes for one in samples]))
        for number, part in enumerate(samples[0].parts)
    )
    return Samples(parts, samples[0].paired)


def orders(outcomes: Sequence[Outcome]) -> list[NDArray[np.int64]] | None:
    """For each outcome an order of its prompts, by which all have the same; None if they do not."""
    marks = [_marks(outcome) for outcome in outcomes]
    if all(np.array_equal(marks[0], each) for each in marks):
        return [_order(outcomes[0], marks[0])] * len(outcomes)
    found = [_order(outcome, each) for outcome, each in zip(outcomes, marks, strict=True)]
    first = marks[0][found[0]]
    same = all(np.array_equal(first, each[order]) for each, order in zip(marks, found, strict=True))
    return found if same else None


def _marks(outcome: Outcome) -> NDArray[np.uint64]:
    """`[batch]`: another number for another pair of prompts."""
    prompts = outcome.prompts
    tensors = (
        prompts.target_tokens * prompts.target_mask,
        prompts.source_tokens * prompts.source_mask,
        prompts.target_mask,
        prompts.source_mask,
    )
    digests = (
        hashlib.blake2b(b"".join(row.numpy().tobytes() for row in rows), digest_size=8).digest()
        for rows in zip(*(tensor.long() for tensor in tensors), strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _order(outcome: Outcome, marks: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The prompts in an order that depends on them alone."""
    baseline = outcome.baseline
    order: NDArray[np.int64] = np.lexsort((baseline.source.numpy(), baseline.target.numpy(), marks))
    return order


def _summed(arrays: Sequence[Floats]) -> Floats:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total
