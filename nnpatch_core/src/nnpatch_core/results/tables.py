"""Tables: rows, data frames and labelled arrays of cells.

A `Block` is the cells of one site name with columns of numbers. Whatever has cells is made into
blocks by a function here; rows and data frames are made of blocks alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import attrs
import torch

from nnpatch_core._extras import extra
from nnpatch_core.results.axes import AXES, LABELS, NUMBERED
from nnpatch_core.results.columns import sure_columns
from nnpatch_core.results.statistics import Figured, cell_values, prompt_values
from nnpatch_core.sites import Axis

if TYPE_CHECKING:
    import pandas
    import xarray

    from nnpatch_core.results.agreement import Agreement
    from nnpatch_core.results.outcome import Outcome

_NAN = float("nan")


@attrs.frozen(eq=False)
class Block:
    """Some cells of one site name, one a table row.

    Args:
        name: the site name.
        axes: the axes of its grid.
        places: for each row its place, one number an axis.
        columns: column name to the number of each row.
    """

    name: str
    axes: tuple[Axis, ...]
    places: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]

    @property
    def labels(self) -> list[str]:
        """The columns that name a cell."""
        columns = [AXES[axis.name].column for axis in self.axes]
        return ["site", *columns, *(["token"] if "position" in columns else [])]


def rows(blocks: Iterable[Block], tokens: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Table rows: the labels of each cell, then the numbers of its block's columns.

    Args:
        blocks: the cells.
        tokens: a label for each position.
    """
    for block in blocks:
        labels = [(AXES[axis.name].column, axis.labels) for axis in block.axes]
        for place, *numbers in zip(block.places, *block.columns.values(), strict=True):
            row: dict[str, Any] = {"site": block.name}
            for (column, names), number in zip(labels, place, strict=True):
                row[column] = names[number]
            if "position" in row:
                row["token"] = tokens[row["position"]]
            row.update(zip(block.columns, numbers, strict=True))
            yield row


def frame(blocks: Iterable[Block], tokens: Sequence[str]) -> pandas.DataFrame:
    """A data frame of table rows.

    Args:
        blocks: the cells.
        tokens: a label for each position.

    Raises:
        OutcomeError: pandas is not installed.
    """
    module = extra("pandas", "pandas")
    blocks = list(blocks)
    used = {column for block in blocks for column in block.labels}
    labels = [column for column in LABELS if column in used]
    numbers = dict.fromkeys(column for block in blocks for column in block.columns)
    made: pandas.DataFrame = module.DataFrame(
        list(rows(blocks, tokens)), columns=[*labels, *numbers]
    )
    # A column of numbers that some rows lack stays one of integers.
    return made.astype({column: "Int64" for column in labels if column in NUMBERED})


def cell_blocks(
    outcome: Figured,
    places: Mapping[str, Sequence[Sequence[int]]] | None = None,
    level: float | None = None,
) -> Iterator[Block]:
    """An outcome's cells with their values; `exact` says which are none, if some are estimates.

    Args:
        outcome: the outcome, or a combination.
        places: site name to the places of some cells; None is the whole grid of every site name.
        level: of intervals, which have columns then, beside p-values.
    """
    estimated = outcome.estimated
    names = list(outcome.cells if places is None else places)
    sure = {} if level is None else sure_columns(outcome, names, level)
    for name in names:
        cells = outcome.cells[name]
        chosen = _every_place(cells.axes) if places is None else places[name]
        places_of = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        index = tuple(places_of.reshape(-1, len(cells.axes)).T)
        figures = {"value": cell_values(outcome, name)}
        figures |= {column: torch.from_numpy(each) for column, each in sure.get(name, {}).items()}
        columns: dict[str, list[Any]] = {}
        if estimated:
            columns["exact"] = cells.place(cells.exact, False)[index].tolist()
        for column, figure in figures.items():
            columns[column] = cells.place(figure, _NAN)[index].tolist()
        yield Block(name, cells.axes, chosen, columns)


def prompt_blocks(outcome: Outcome) -> Iterator[Block]:
    """An outcome's cells with a row for each prompt: its value, and the metric of three runs."""
    baseline, estimated = outcome.baseline, outcome.estimated
    batch = len(baseline.target)
    for name in outcome:
        places = _every_place(outcome.axes(name))
        count = len(places)
        columns: dict[str, list[Any]] = {}
        if estimated:
            columns["exact"] = outcome.exact(name).flatten().repeat_interleave(batch).tolist()
        columns["prompt"] = list(range(batch)) * count
        columns["value"] = outcome.per_prompt(name).flatten().tolist()
        columns["patched"] = outcome.patched(name).flatten().tolist()
        columns["source"] = baseline.source.tolist() * count
        columns["target"] = baseline.target.tolist() * count
        each = [place for place in places for _ in range(batch)]
        yield Block(name, outcome.axes(name), each, columns)


def compared_blocks(agreement: Agreement) -> Iterator[Block]:
    """An agreement's cells with both of their values."""
    for name, one in agreement.sites.items():
        columns = {"estimate": one.estimate.tolist(), "exact": one.exact.tolist()}
        yield Block(name, one.axes, one.index.tolist(), columns)


def dataset(outcome: Outcome, per_prompt: bool) -> xarray.Dataset:
    """An outcome as labelled arrays, one a site name.

    Args:
        outcome: the outcome.
        per_prompt: whether each prompt has a value of its own, along a last axis.

    Raises:
        OutcomeError: xarray is not installed.
    """
    module = extra("xarray", "xarray")
    arrays = {}
    for name, cells in outcome.cells.items():
        values = prompt_values(outcome, name) if per_prompt else cell_values(outcome, name)
        dims = [_dimension(axis, name) for axis in cells.axes] + ["prompt"] * bool(per_prompt)
        coords = {_dimension(axis, name): list(axis.labels) for axis in cells.axes}
        array = module.DataArray(cells.place(values, _NAN).numpy(), dims=dims, coords=coords)
        if "position" in dims:
            array = array.assign_coords(token=("position", list(outcome.tokens)))
        arrays[name] = array
    about = {
        "kind": outcome.kind,
        "scale": outcome.scale,
        "metric": outcome.metric,
        "magnitude": int(outcome.magnitude),
        "prompts": outcome.count,
    }
    made: xarray.Dataset = module.Dataset(arrays, attrs={**about, **outcome.info})
    return made


def _every_place(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    return list(product(*(range(len(axis.labels)) for axis in axes)))


def _dimension(axis: Axis, name: str) -> str:
    # Lists of sites differ in length from name to name, so each has a dimension of its own.
    return f"site_{name}" if axis.name == "site" else axis.name
