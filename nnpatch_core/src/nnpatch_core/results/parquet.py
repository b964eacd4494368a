"""An outcome as a Parquet file: one row a patch, one column a metric."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnpatch_core._extras import extra
from nnpatch_core._files import check_file, write_whole
from nnpatch_core._parts import clean_up
from nnpatch_core._printable import shown
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.axes import AXES, LABELS, NUMBERED
from nnpatch_core.results.columns import sure_columns
from nnpatch_core.results.statistics import cell_values, prompt_values

if TYPE_CHECKING:
    from nnpatch_core.results.outcome import Outcome

#: What the metadata of a file's schema calls ours.
_KEY = "nnpatch"
_FORMAT = "nnpatch cells 1"
#: A column, with nothing where a row has no such label.
_Column = NDArray[Any]
_SHORT = {"low": "low", "high": "high", "p_value": "p"}


def write(
    path: str | os.PathLike[str], outcome: Outcome, per_prompt: bool, level: float | None
) -> None:
    """Write the cells that were swept, whole or not at all; see `Outcome.to_parquet`.

    Raises:
        OutcomeError: pyarrow is not installed, the file cannot be written, or two columns have one
            name.
    """
    arrow, files = extra("pyarrow", "parquet"), extra("pyarrow.parquet", "parquet")
    target = check_file(path, OutcomeError)
    parts = list(_parts(outcome, per_prompt, level))
    numbers = dict.fromkeys(name for part in parts for name in part)
    columns = {}
    for name in [*(label for label in LABELS if label in numbers), *numbers]:
        if name not in columns:
            given = [part.get(name) for part in parts]
            columns[name] = arrow.chunked_array(
                [
                    arrow.nulls(len(part["site"]), _kind(arrow, name))
                    if each is None
                    else arrow.array(each, _kind(arrow, name))
                    for part, each in zip(parts, given, strict=True)
                ],
                _kind(arrow, name),
            )
    about = {_KEY: json.dumps(_about(outcome, level, per_prompt))}
    table = arrow.table(columns).replace_schema_metadata(about)
    clean_up(target.parent)
    write_whole(path, lambda part: files.write_table(table, part), OutcomeError)


def _about(outcome: Outcome, level: float | None, per_prompt: bool) -> dict[str, Any]:
    """The words of the file on what its numbers are of."""
    return {
        "format": _FORMAT,
        "kind": outcome.kind,
        "scale": outcome.scale,
        "magnitude": outcome.magnitude,
        "metrics": list(outcome.metrics),
        "prompts": outcome.count,
        "level": None if per_prompt else level,
        "info": dict(outcome.info),
    }


def _parts(outcome: Outcome, per_prompt: bool, level: float | None) -> Iterator[dict[str, _Column]]:
    """The columns of each site name's cells."""
    seen = {metric: outcome.for_metric(metric) for metric in outcome.metrics}
    sure = {}
    if level is not None and not per_prompt:
        sure = {metric: sure_columns(each, list(outcome), level) for metric, each in seen.items()}
    for name, cells in outcome.cells.items():
        count, batch = len(cells.index), len(outcome.baseline.target)
        rows = np.repeat(np.arange(count), batch if per_prompt else 1)
        columns = {column: each[rows] for column, each in _labels(outcome, name).items()}
        if per_prompt:
            columns["prompt"] = np.tile(np.arange(batch), count)
        columns["exact"] = cells.exact.numpy()[rows]
        elided = cells.elided.flatten() if per_prompt else cells.elided.all(-1)
        columns["elided"] = elided.numpy()
        for metric, each in seen.items():
            found = _per_prompt(each, name) if per_prompt else _per_cell(each, name)
            for column, values in sure.get(metric, {}).get(name, {}).items():
                found[f"_{_SHORT[column]}"] = values
            for ending, values in found.items():
                _add(columns, metric + ending, metric, values)
        yield columns


def _per_cell(outcome: Outcome, name: str) -> dict[str, _Column]:
    return {"": cell_values(outcome, name).double().numpy()}


def _per_prompt(outcome: Outcome, name: str) -> dict[str, _Column]:
    """Ending of a metric's column to its numbers, `[cells * batch]`."""
    raw, baseline = outcome.raw[outcome.metric][name].double(), outcome.baseline
    return {
        "": prompt_values(outcome, name).double().flatten().numpy(),
        "_patched": raw.flatten().numpy(),
        "_source": baseline.source.double().expand_as(raw).flatten().numpy(),
        "_target": baseline.target.double().expand_as(raw).flatten().numpy(),
    }


def _add(columns: dict[str, _Column], name: str, metric: str, values: _Column) -> None:
    if name in columns or name in LABELS:
        raise OutcomeError(
            f"metric {shown(metric)} would have a column {shown(name)}, and so has something else: "
            "sweep it under another name, as metric={'name': metric}"
        )
    columns[name] = values


def _labels(outcome: Outcome, name: str) -> Mapping[str, _Column]:
    """The labels of each cell, `[cells]`."""
    cells = outcome.cells[name]
    columns: dict[str, _Column] = {"site": np.full(len(cells.index), name, dtype=object)}
    for axis, places in zip(cells.axes, cells.index.T.numpy(), strict=True):
        kind = AXES[axis.name]
        labels = np.array(axis.labels, dtype=np.int64 if kind.numbered else object)
        columns[kind.column] = labels[places]
        if kind.column == "position":
            columns["token"] = np.array(outcome.tokens, dtype=object)[places]
    return columns


def _kind(arrow: Any, column: str) -> Any:
    if column in NUMBERED or column == "prompt":
        return arrow.int64()
    if column in LABELS:
        return arrow.string()
    return arrow.bool_() if column in ("exact", "elided") else arrow.float64()
