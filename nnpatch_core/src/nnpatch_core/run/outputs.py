"""The files of a run: what each kind of result is written as."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from nnpatch_core._extras import extra
from nnpatch_core._files import write_whole
from nnpatch_core.circuits import Circuit, FoundCircuit
from nnpatch_core.edges import EdgeOutcome
from nnpatch_core.errors import OutcomeError, SettingsError
from nnpatch_core.results import Outcome, bars_told
from nnpatch_core.run.folder import OUTCOME
from nnpatch_core.subspace import SubspaceSweep

#: A file's name, or a folder's, and its writer.
Writers: TypeAlias = "Mapping[str, Callable[[Path], object]]"
#: Words of an outcome that another run of the same command has otherwise.
_VOLATILE = ("started", "seconds", "resumed")
_EDGES = 60


@attrs.frozen(eq=False)
class Outputs:
    """The files of a result.

    Args:
        data: name to writer, in the order in which they are written.
        pictures: the same of pictures and pages, without which the data are whole.
        pages: those of them that are interactive pages, with what a link says.
        table: what is printed.
    """

    data: Writers
    pictures: Writers
    pages: Mapping[str, str]
    table: str


def outputs_of(result: Any, level: float) -> Outputs:
    """The files of a result, by its kind.

    Args:
        result: of `run_sweep`.
        level: of intervals in tables.
    """
    for kind, make in _KINDS.items():
        if isinstance(result, kind):
            return make(result, level)
    raise TypeError(f"no files are known for {type(result).__name__}")


def check_extras() -> None:
    """Raise `SettingsError` unless the libraries are there that files are written with."""
    for module in ("matplotlib", "plotly", "pandas", "pyarrow"):
        extra(module, "run", SettingsError)


def _outcome(result: Outcome, level: float) -> Outputs:
    pictures: dict[str, Callable[[Path], object]] = {}
    pages: dict[str, str] = {}
    for number, metric in enumerate(result.metrics):
        # One for each metric: together they would be longer than any screen.
        name = f"heatmap-{re.sub(r'[^A-Za-z0-9_-]+', '-', metric)}" if number else "heatmap"
        seen = result.for_metric(metric)
        pictures[f"{name}.png"] = partial(_figure, partial(seen.plot, mute=level))
        pictures[f"{name}.html"] = partial(_page, partial(seen.plot, interactive=True, mute=level))
        told = f" of {metric}" if len(result.metrics) > 1 else ""
        pages[f"{name}.html"] = f"The heatmaps{told}, with a value under the pointer"
    top = result.top(10, level=level)
    return Outputs(
        {OUTCOME: steady(result).save, "cells.parquet": partial(result.to_parquet, level=level)},
        pictures,
        pages,
        "\n".join([str(top), *bars_told(top)]),
    )


def _edges(result: EdgeOutcome, level: float) -> Outputs:
    outcome = result.outcome
    circuit = partial(Circuit.from_edges, result, n=min(_EDGES, len(result)), pruned=False)
    data: Writers = {
        OUTCOME: EdgeOutcome(steady(outcome), result.nodes).save,
        "cells.parquet": partial(outcome.to_parquet, level=level),
    }
    if outcome.cells["edge"].index.shape[1] > 2:
        # A circuit has no positions.
        return Outputs(data, {}, {}, str(result.top(10, level=level)))
    pictures: Writers = {
        "edges.png": partial(_figure, lambda: circuit().plot(edges=_EDGES)),
        "edges.html": lambda path: circuit().page(path),
    }
    return Outputs(
        data,
        pictures,
        {"edges.html": "The strongest edges as a graph, with a value under the pointer"},
        str(result.top(10, level=level)),
    )


def _circuit(result: FoundCircuit, level: float) -> Outputs:
    return Outputs(
        {"circuit.json": result.circuit.to_json, **_edges(result.edges, level).data},
        {
            "circuit.png": partial(_figure, result.circuit.plot),
            "circuit.html": result.circuit.page,
        },
        {"circuit.html": "The circuit as a graph, with a value under the pointer"},
        str(result),
    )


def _subspaces(result: SubspaceSweep, _: float) -> Outputs:
    files: dict[str, Callable[[Path], object]] = {
        f"subspace-{number}": each.save_pretrained
        for number, each in enumerate(result.learned.values())
    }
    files["cells.parquet"] = partial(_frame, result.to_dataframe)
    pictures: Writers = {"accuracy.png": partial(_figure, result.plot)}
    rows = [
        f"{f'subspace-{number}':<12}  {label:<24}  {each.accuracy}"
        for number, (label, each) in enumerate(result.learned.items())
    ]
    return Outputs(files, pictures, {}, "\n".join(["accuracy on pairs held out, of 95 %", *rows]))


_KINDS: Mapping[type, Callable[[Any, float], Outputs]] = {
    Outcome: _outcome,
    EdgeOutcome: _edges,
    FoundCircuit: _circuit,
    SubspaceSweep: _subspaces,
}


def steady(outcome: Outcome) -> Outcome:
    """The same outcome without the time that it took, so that two runs give the same bytes."""
    info = {name: words for name, words in outcome.info.items() if name not in _VOLATILE}
    return attrs.evolve(outcome, info=info)


def _figure(make: Callable[[], Any], path: Path) -> None:
    figure = make()
    write_whole(path, lambda part: figure.savefig(part, format="png"), OutcomeError)


def _page(make: Callable[[], Any], path: Path) -> None:
    figure = make()
    write_whole(path, lambda part: figure.write_html(str(part)), OutcomeError)


def _frame(make: Callable[[], Any], path: Path) -> None:
    frame = make()
    write_whole(path, lambda part: frame.to_parquet(part, index=False), OutcomeError)
