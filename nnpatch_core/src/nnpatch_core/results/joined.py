"""Outcomes of batches of prompts, joined to one: each prompt kept, or means and moments alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core.results.moments import Moments, products_unpatched
from nnpatch_core.results.parts import Baseline, Cells, Prompts
from nnpatch_core.results.provenance import Merged
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

Keep: TypeAlias = Literal["prompts", "means"]
#: A cell on the axes; a position is counted from the end, where batches of other widths agree.
_Key: TypeAlias = tuple[int, ...]
_MASKS = ("present", "elided", "unread")


def means_of(outcome: Outcome) -> Outcome:
    """An outcome with the means of its prompts alone."""
    joined = Joined("means")
    joined.add(outcome)
    return joined.outcome()


class Joined:
    """Outcomes of one sweep in batch after batch of prompts, as far as they have come.

    Args:
        keep: `"prompts"` keeps the numbers of each; `"means"` means and moments, so that memory
            does not grow with their number.
    """

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._first: Outcome | None = None
        self._count = 0
        self._width = 0
        self._grids: dict[str, _Grid] = {}
        self._baselines: dict[str, list[Baseline]] = {}
        self._unpatched: dict[str, Tensor] = {}
        self._prompts: list[Prompts] = []
        self._info = Merged()

    def add(self, outcome: Outcome) -> None:
        """Add the outcome of the next batch."""
        count, width = outcome.prompts.target_tokens.shape
        first = self._first is None
        if first:
            # Of its numbers nothing is kept.
            self._first = attrs.evolve(outcome, raw={}, baselines={}, cells={})
            self._grids = {name: _Grid(self._keep, outcome) for name in outcome.cells}
        moments = Moments.of(outcome)
        for name, grid in self._grids.items():
            grid.add(outcome, name, moments, self._unpatched, self._count)
        for metric, unpatched in moments.unpatched.items():
            before = self._unpatched.get(metric, torch.zeros_like(unpatched))
            self._unpatched[metric] = _mean(before, self._count, unpatched, count)
        if self._keep == "prompts":
            for metric, baseline in outcome.baselines.items():
                self._baselines.setdefault(metric, []).append(baseline)
        if self._keep == "prompts" or first:
            self._prompts.append(outcome.prompts)
        self._info.add(outcome.info, outcome.cells.values())
        self._count += count
        self._width = max(self._width, width)

    def outcome(self) -> Outcome:
        """The outcome of all batches that were added, of which there is one at least."""
        assert self._first is not None
        info = self._info.info()
        cells = {name: grid.cells(self._count, self._width) for name, grid in self._grids.items()}
        if self._keep == "prompts":
            baselines = {
                metric: Baseline(
                    torch.cat([each.source for each in parts]),
                    torch.cat([each.target for each in parts]),
                )
                for metric, parts in self._baselines.items()
            }
            raw = {
                metric: {
                    name: grid.raw(metric, baseline.target) for name, grid in self._grids.items()
                }
                for metric, baseline in baselines.items()
            }
            prompts = _padded(self._prompts, self._width)
            return attrs.evolve(
                self._first, cells=cells, raw=raw, baselines=baselines, prompts=prompts, info=info
            )
        patched = {
            metric: {name: grid.products(metric) for name, grid in self._grids.items()}
            for metric in self._unpatched
        }
        of_first = _padded([_one(self._prompts[0])], self._width)
        return attrs.evolve(
            self._first,
            cells=cells,
            raw={
                metric: {
                    name: grid.mean(metric, self._unpatched[metric], self._first.magnitude)
                    for name, grid in self._grids.items()
                }
                for metric in self._unpatched
            },
            baselines={
                metric: Baseline(unpatched[:1], unpatched[1:2])
                for metric, unpatched in self._unpatched.items()
            },
            prompts=of_first,
            info=info,
            moments=Moments(self._count, patched, self._unpatched),
        )


class _Grid:
    """The cells of one site name, as far as they were met in some batch."""

    def __init__(self, keep: Keep, outcome: Outcome) -> None:
        self._keep = keep
        self._rows: dict[_Key, int] = {}
        self._axes: tuple[Axis, ...] = ()
        self._exact: list[bool] = []
        #: Of each batch: its rows, its number of prompts, its numbers and masks.
        self._batches: list[tuple[list[int], int, Mapping[str, Tensor], Mapping[str, Tensor]]] = []
        self._products: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    def add(
        self,
        outcome: Outcome,
        name: str,
        moments: Moments,
        unpatched: Mapping[str, Tensor],
        before: int,
    ) -> None:
        """Add a batch.

        Args:
            outcome: of the batch.
            name: the site name.
            moments: of the batch.
            unpatched: the moments of the unpatched runs of all earlier batches.
            before: how many prompts these had.
        """
        cells = outcome.cells[name]
        self._axes = cells.axes
        numbers, count = self._numbers(cells, before), cells.present.shape[1]
        if self._keep == "prompts":
            raw = {metric: by_name[name] for metric, by_name in outcome.raw.items()}
            masks = {mask: getattr(cells, mask) for mask in _MASKS}
            self._batches.append((numbers, count, raw, masks))
            return
        for metric, by_name in moments.patched.items():
            target = products_unpatched(moments.unpatched[metric])
            # A cell that only other batches have is the target run in this one.
            here = target.expand(len(self._rows), -1).clone()
            here[numbers] = by_name[name]
            earlier = unpatched.get(metric)
            known = self._products.get(metric, here.new_zeros(0, 4))
            if earlier is not None:
                known = _grown(known, len(self._rows), products_unpatched(earlier))
            else:
                known = torch.zeros_like(here)
            self._products[metric] = _mean(known, before, here, count)
            moved = here.new_zeros(len(self._rows))
            own = outcome.raw[metric][name].double() - outcome.baselines[metric].target.double()
            moved[numbers] = own.abs().mean(1)
            known = _grown(
                self._moved.get(metric, here.new_zeros(0)), len(self._rows), here.new_zeros(())
            )
            self._moved[metric] = _mean(known, before, moved, count)
        self._note_masks(cells, numbers)

    def _note_masks(self, cells: Cells, numbers: list[int]) -> None:
        """In any prompt present; in all of them elided, or unread."""
        size = len(self._rows)
        for mask in _MASKS:
            some = mask == "present"
            values = getattr(cells, mask)
            here = torch.full((size,), not some, dtype=torch.bool, device="cpu")
            here[numbers] = values.any(1) if some else values.all(1)
            if mask == "unread":
                absent = torch.ones(size, dtype=torch.bool, device="cpu")
                absent[numbers] = False
                here = here & ~absent
            known = self._masks.get(mask)
            if known is None:
                self._masks[mask] = here
                continue
            known = _grown(known, size, torch.tensor(mask == "elided", device="cpu"))
            self._masks[mask] = known | here if some else known & here

    def _numbers(self, cells: Cells, before: int) -> list[int]:
        """The row of each cell of a batch; new ones get one, and are estimates if they are here."""
        shift = [len(axis.labels) if axis.name == "position" else 0 for axis in cells.axes]
        numbers = []
        for place, exact in zip(cells.index.tolist(), cells.exact.tolist(), strict=True):
            key = tuple(at - by for at, by in zip(place, shift, strict=True))
            number = self._rows.setdefault(key, len(self._rows))
            numbers.append(number)
            if number == len(self._exact):
                self._exact.append(exact)
            self._exact[number] = self._exact[number] and exact
        return numbers

    def cells(self, count: int, width: int) -> Cells:
        """The cells, in the order of their places."""
        axes = tuple(
            Axis(axis.name, tuple(range(width))) if axis.name == "position" else axis
            for axis in self._axes
        )
        shift = [width if axis.name == "position" else 0 for axis in axes]
        index = [[at + by for at, by in zip(key, shift, strict=True)] for key in self._order]
        masks = self._masks
        if self._keep == "prompts":
            fills = {"present": False, "elided": True, "unread": False}
            masks = {mask: self._laid(mask, fills[mask], count) for mask in _MASKS}
        else:
            masks = {mask: values[self._sorted][:, None] for mask, values in masks.items()}
        exact = torch.tensor(self._exact, device="cpu")[self._sorted]
        places = torch.tensor(index, dtype=torch.int64, device="cpu").reshape(-1, len(axes))
        return Cells(axes, places, masks["present"], masks["elided"], masks["unread"], exact)

    def raw(self, metric: str, target: Tensor) -> Tensor:
        """`[cells, batch]`: a prompt whose batch lacks a cell is as in the target run."""
        parts = [raw[metric] for _, _, raw, _ in self._batches]
        kind = parts[0].dtype
        whole = target.to(kind).expand(len(self._rows), -1).clone()
        for (numbers, _, raw, _), columns in zip(self._batches, self._columns(), strict=True):
            whole[numbers, columns] = raw[metric]
        return whole[self._sorted]

    def products(self, metric: str) -> Tensor:
        """`[cells, 4]`; see `Moments`."""
        return self._products[metric][self._sorted]

    def mean(self, metric: str, unpatched: Tensor, magnitude: bool) -> Tensor:
        """`[cells, 1]`: the mean of the patched runs, or the target's and how far they moved."""
        if magnitude:
            means = unpatched[1] + self._moved[metric]
        else:
            # What is elided is the target run, to the last digit.
            means = torch.where(self._masks["elided"], unpatched[1], self._products[metric][:, 0])
        return means[self._sorted][:, None]

    def _laid(self, mask: str, fill: bool, count: int) -> Tensor:
        whole = torch.full((len(self._rows), count), fill, dtype=torch.bool, device="cpu")
        for (numbers, _, _, masks), columns in zip(self._batches, self._columns(), strict=True):
            whole[numbers, columns] = masks[mask]
        return whole[self._sorted]

    def _columns(self) -> Iterator[slice]:
        first = 0
        for _, count, _, _ in self._batches:
            yield slice(first, first + count)
            first += count

    @property
    def _order(self) -> list[_Key]:
        return sorted(self._rows)

    @property
    def _sorted(self) -> list[int]:
        return [self._rows[key] for key in self._order]


def _mean(before: Tensor, count: int, here: Tensor, more: int) -> Tensor:
    """The mean over all, given two means and of how many they are."""
    return before + (here - before) * (more / (count + more))


def _grown(known: Tensor, size: int, fill: Tensor) -> Tensor:
    """Rows `[rows, ...]`, with more of them up to a size."""
    missing = fill.to(known.dtype).expand(size - len(known), *known.shape[1:])
    return torch.cat([known, missing])


def _one(prompts: Prompts) -> Prompts:
    """The first prompt alone."""
    return attrs.evolve(
        prompts,
        source_tokens=prompts.source_tokens[:1],
        source_mask=prompts.source_mask[:1],
        target_tokens=prompts.target_tokens[:1],
        target_mask=prompts.target_mask[:1],
        columns={},
        answers={run: texts[:1] for run, texts in prompts.answers.items()},
    )


def _padded(parts: list[Prompts], width: int) -> Prompts:
    """Prompts of several batches in one, padded on the left to one width."""

    def joined(name: str) -> Tensor:
        rows = [getattr(part, name) for part in parts]
        return torch.cat(
            [torch.nn.functional.pad(each, (width - each.shape[1], 0)) for each in rows]
        )

    def columns(field: str) -> dict[str, tuple[Any, ...]]:
        # A batch without a column lacks its values, which are missing then, and not lost.
        own = [(getattr(part, field), len(part.target_tokens)) for part in parts]
        return {
            name: tuple(value for each, count in own for value in each.get(name, (None,) * count))
            for name in dict.fromkeys(name for each, _ in own for name in each)
        }

    strings = {token: text for part in parts for token, text in part.strings.items()}
    return Prompts(
        joined("source_tokens"),
        joined("source_mask"),
        joined("target_tokens"),
        joined("target_mask"),
        strings,
        columns("columns"),
        columns("answers"),
    )
