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
        groups: the numbers of the samples that are of the same prompts, in the same order, so that
            these are drawn together; empty where all are.
    """

    parts: tuple[Sample, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    @property
    def paired(self) -> bool:
        """Whether all are of the same prompts."""
        return len(self.groups) < 2

    @property
    def drawn(self) -> tuple[tuple[Sample, ...], ...]:
        """The samples, those that are drawn together side by side."""
        groups = self.groups or (tuple(range(len(self.parts))),)
        return tuple(tuple(self.parts[number] for number in group) for group in groups)

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
        """`[cells]`, bool: whether some prompt's effect is more than rounding; of paired samples.

        Statistics of what is rounding would be about the machine, and other ones by each engine.
        """
        (least,) = self._roundings()
        found: NDArray[np.bool_] = np.abs(self.effects()).max(1) > least
        return found

    def varies(self) -> NDArray[np.bool_]:
        """`[cells]`, bool: whether prompts differ in the value by more than rounding.

        A cell that is the source run does not.
        """
        found: NDArray[np.bool_] = np.logical_or.reduce(
            [
                np.abs(pulls).max(1) > least
                for pulls, least in zip(self.residuals(), self._roundings(), strict=True)
            ]
        )
        return found

    def _roundings(self) -> list[float]:
        """For each draw how far a prompt's part of the value may be off by rounding."""
        return [
            sum(_STILL * abs(part.weight * part.size / part.whole.mean()) for part in parts)
            for parts in self.drawn
        ]

    def residuals(self) -> list[Floats]:
        """For each draw `[cells, prompts]`, of mean 0: how far each prompt pulls the value."""
        return [_summed([part.residuals() for part in parts]) for parts in self.drawn]

    def standard_errors(self) -> Floats:
        """`[cells]`, by the delta method."""
        variances = [
            (pulls**2).sum(1) / (count * (count - 1))
            for pulls, count in zip(self.residuals(), self.counts, strict=True)
        ]
        return np.sqrt(_summed(variances))

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


def samples_of(figured: Figured, name: str, order: NDArray[np.int64] | None = None) -> Samples:
    """The samples of an outcome's site name, or of a combination's, `[swept cells]`.

    Prompts stand in an order of their own, so that the user's order changes no figure; or in
    `order`, where an outcome is set against another.
    """
    terms = figured.terms
    outcomes = [term.outcome for term in terms]
    groups = alike(outcomes)
    each: dict[int, NDArray[np.int64]] = {}
    for group in groups:
        found = [order] if order is not None else orders([outcomes[number] for number in group])
        assert found is not None
        each |= dict(zip(group, found, strict=True))
    parts = []
    for number, term in enumerate(terms):
        changes, whole = changes_of(term.outcome, name)
        changes = changes if term.rows is None else changes[term.rows[name].numpy()]
        size, own = size_of(term.outcome), each[number]
        parts.append(Sample(changes[:, own], whole[own], term.weight, size))
    return Samples(tuple(parts), groups)


def joined(samples: Sequence[Samples]) -> Samples:
    """The cells of several samples of the same prompts, as one."""
    parts = tuple(
        attrs.evolve(part, changes=np.concatenate([one.parts[number].changes for one in samples]))
        for number, part in enumerate(samples[0].parts)
    )
    return Samples(parts, samples[0].groups)


def alike(outcomes: Sequence[Outcome]) -> tuple[tuple[int, ...], ...]:
    """The numbers of the outcomes that are of the same prompts, in whatever order."""
    if len(outcomes) == 1:
        return ((0,),)
    groups: dict[bytes, list[int]] = {}
    for number, outcome in enumerate(outcomes):
        groups.setdefault(np.sort(_marks(outcome)).tobytes(), []).append(number)
    return tuple(map(tuple, groups.values()))


def shared(outcomes: Sequence[Outcome]) -> int:
    """How many prompts are in several of the outcomes, of those that are not of the same ones."""
    groups = alike(outcomes)
    if len(groups) == 1:
        return 0
    firsts = [np.unique(_marks(outcomes[group[0]])) for group in groups]
    _, times = np.unique(np.concatenate(firsts), return_counts=True)
    return int((times > 1).sum())


def orders(outcomes: Sequence[Outcome]) -> list[NDArray[np.int64]] | None:
    """For each outcome an order of its prompts, by which all have the same; None if they do not."""
    marks = [_marks(outcome) for outcome in outcomes]
    found = [_order(outcome, each) for outcome, each in zip(outcomes, marks, strict=True)]
    first, own = marks[0][found[0]], found[0]
    sides = list(zip(outcomes, marks, found, strict=True))
    if not all(np.array_equal(first, each[order]) for _, each, order in sides):
        return None
    in_place = all(np.array_equal(marks[0], each) for each in marks)
    # Prompts that occur twice, with other answers, are told by the metric of their runs alone.
    if in_place and (
        all(_agree(outcomes[0], own, each, own) for each in outcomes)
        or not all(_agree(outcomes[0], own, each, order) for each, _, order in sides)
    ):
        return [own] * len(outcomes)
    return found


def _agree(
    one: Outcome, first: NDArray[np.int64], other: Outcome, second: NDArray[np.int64]
) -> bool:
    """Tell whether the unpatched runs of two outcomes, each in an order, have the same metric."""
    if one.metric != other.metric:
        return False
    sides = (
        (one.baseline.source, other.baseline.source),
        (one.baseline.target, other.baseline.target),
    )
    return all(
        np.allclose(its.numpy()[first], others.numpy()[second], rtol=1e-3, equal_nan=True)
        for its, others in sides
    )


def _marks(outcome: Outcome) -> NDArray[np.uint64]:
    """`[batch]`: another number for another pair of prompts; padding of both does not count."""
    prompts = outcome.prompts
    masks = (prompts.target_mask.bool(), prompts.source_mask.bool())
    rows = (
        prompts.target_tokens * masks[0],
        prompts.source_tokens * masks[1],
        *masks,
    )
    numbers = np.stack([each.long().numpy() for each in rows])
    firsts = (masks[0] | masks[1]).int().argmax(1).tolist()
    digests = (
        hashlib.blake2b(numbers[:, row, first:].tobytes(), digest_size=8).digest()
        for row, first in enumerate(firsts)
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
