"""An outcome as one safetensors file: tensors, and the rest as JSON in its header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from nnpatch_core._parts import clean_up
from nnpatch_core._safetensors import check_file, read_file, write_file
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results.parts import PROMPT_TENSORS, Baseline, Cells, Prompts, Scale
from nnpatch_core.results.screening import Screening
from nnpatch_core.results.whole import check_header, check_tensors
from nnpatch_core.sites import Axis

_FORMAT = "nnpatch outcome 2"


def write(
    path: str | os.PathLike[str],
    *,
    kind: str,
    scale: Scale,
    magnitude: bool,
    cells: Mapping[str, Cells],
    raw: Mapping[str, Mapping[str, Tensor]],
    baselines: Mapping[str, Baseline],
    prompts: Prompts,
    metric: str,
    info: Mapping[str, str],
    screening: Screening | None,
) -> None:
    """Write an outcome's fields, whole or not at all.

    Raises:
        OutcomeError: it cannot be written, or not be read again; a file that was there is as it
            was.
    """
    header = {
        "format": _FORMAT,
        "kind": kind,
        "scale": scale,
        "magnitude": magnitude,
        "metric": metric,
        "metrics": list(raw),
        "axes": {
            name: [[axis.name, list(axis.labels)] for axis in swept.axes]
            for name, swept in cells.items()
        },
        "strings": {str(token): text for token, text in prompts.strings.items()},
        "info": dict(info),
        "screening": None if screening is None else attrs.asdict(screening),
    }
    tensors = {f"prompts/{field}": getattr(prompts, field) for field in PROMPT_TENSORS}
    # Numbered, not named: a user's name may hold anything, a slash too.
    for place, swept in enumerate(cells.values()):
        tensors |= {f"cells/{place}": swept.index, f"present/{place}": swept.present}
        tensors |= {f"elided/{place}": swept.elided, f"exact/{place}": swept.exact}
    for number, (name, baseline) in enumerate(baselines.items()):
        tensors |= {f"source/{number}": baseline.source, f"target/{number}": baseline.target}
        tensors |= {f"raw/{number}/{place}": raw[name][site] for place, site in enumerate(cells)}
    try:
        check_header(header)
        check_tensors(header, tensors)
    except OutcomeError as error:
        raise OutcomeError(f"the outcome cannot be saved: {error}") from error
    clean_up(check_file(path, OutcomeError).parent)
    write_file(path, header, tensors, OutcomeError)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields that `write` wrote.

    Raises:
        OutcomeError: the file is not an outcome, not of this version, damaged, or its parts do not
            fit together.
    """
    header, tensors = read_file(path, _FORMAT, "an outcome", OutcomeError)
    try:
        check_header(header)
        check_tensors(header, tensors)
    except OutcomeError as error:
        raise OutcomeError(f"{os.fspath(path)} is no whole outcome: {error}") from error
    return _fields(header, tensors)


def _fields(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    cells = {
        name: Cells(
            tuple(Axis(axis, tuple(labels)) for axis, labels in axes),
            tensors[f"cells/{place}"],
            tensors[f"present/{place}"],
            tensors[f"elided/{place}"],
            tensors[f"elided/{place}"] & False,
            tensors[f"exact/{place}"],
        )
        for place, (name, axes) in enumerate(header["axes"].items())
    }
    return {
        "kind": header["kind"],
        "scale": header["scale"],
        "magnitude": header["magnitude"],
        "cells": cells,
        "raw": {
            name: {site: tensors[f"raw/{number}/{place}"] for place, site in enumerate(cells)}
            for number, name in enumerate(header["metrics"])
        },
        "baselines": {
            name: Baseline(tensors[f"source/{number}"], tensors[f"target/{number}"])
            for number, name in enumerate(header["metrics"])
        },
        "prompts": Prompts(
            **{field: tensors[f"prompts/{field}"] for field in PROMPT_TENSORS},
            strings={int(token): text for token, text in header["strings"].items()},
        ),
        "metric": header["metric"],
        "info": header["info"],
        "screening": None if header["screening"] is None else Screening(**header["screening"]),
    }
