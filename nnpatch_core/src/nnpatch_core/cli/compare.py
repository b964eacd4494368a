"""`nnpatch compare`: the differences of two runs, with intervals."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import attrs
import typer

from nnpatch_core._printable import printable
from nnpatch_core.cli.outcomes import read_outcome
from nnpatch_core.cli.output import UsageError, say, say_aside, say_table
from nnpatch_core.errors import OutcomeError
from nnpatch_core.results import Combination, Outcome, bars_told, legend

_RUN = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or an outcome.")]
_TOP = Annotated[int, typer.Option(min=1, metavar="N", help="How many rows.")]
_METRIC = Annotated[
    str | None, typer.Option(metavar="NAME", help="The metric; by default the first.")
]
_LEVEL = Annotated[float, typer.Option(metavar="X", help="The level of the intervals.")]
_SITES = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Of these sites alone; may be repeated.")
]
#: The end of an error that advises a call of Python.
_ADVICE = re.compile(r"[:.] [Cc]hoose [^:]*\([^)]*\)$")


def compare(
    one: _RUN,
    other: _RUN,
    *,
    top: _TOP = 10,
    metric: _METRIC = None,
    sites: _SITES = None,
    level: _LEVEL = 0.95,
) -> bool:
    """Print where two runs differ most, with the intervals of the differences."""
    runs = str(one), str(other)
    first, second = (read_outcome(each, metric) for each in (one, other))
    if metric is None and first.metric in second.metrics:
        second = second.for_metric(first.metric)
    if sites:
        first, second = first.sel(site=sites), second.sel(site=sites)
    _check_sites(first, second, runs)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            difference = first - second
        except OutcomeError as error:
            raise UsageError(_in_runs(str(error), runs)) from error
        found = difference.top(top, level=level)
        same = all(row["value"] == 0 for row in found)
        table = str(attrs.evolve(found, title=_title(difference, first, second)))
    for words in dict.fromkeys(str(each.message) for each in heard):
        say_aside(words)
    say(f"{one} - {other}: each value of the first run minus that of the second")
    say_table(
        ("run", "method", "metric", "prompts"),
        [
            (name, run.kind, run.metric, run.count)
            for name, run in zip(runs, (first, second), strict=True)
        ],
        "  ",
    )
    say()
    say("No value differs." if same else "\n".join([table, *bars_told(found)]))
    return True


def _check_sites(first: Outcome, second: Outcome, runs: Sequence[str]) -> None:
    """Raise `UsageError` unless both runs have the same sites."""
    shared = [name for name in first if name in second]
    if len(shared) == len(first) == len(second):
        return
    told = ", ".join(list(first)), ", ".join(list(second))
    options = " ".join(f"--sites {name}" for name in shared)
    way = f"{options} compares what both have" if shared else "they have none in common"
    raise UsageError(f"{runs[0]} has the sites {told[0]}, and {runs[1]} {told[1]}: {way}")


def _title(difference: Combination, first: Outcome, second: Outcome) -> str:
    """The title of the table: it says of which values the differences are."""
    cells = sum(len(each.index) for each in difference.cells.values())
    of = f"the {legend(first.scale, first.magnitude, first.metric)}"
    if first.scale == "restored" and not first.magnitude:
        of = "the share that is restored (0 target, 1 source)"
    if difference.paired:
        prompts = f"the same {first.count} prompts"
    else:
        prompts = f"different prompts, {first.count} and {second.count}"
    return printable(f"The largest differences in {cells} cells, of {of}; {prompts}")


def _in_runs(words: str, runs: Sequence[str]) -> str:
    """An error of two outcomes with the names of the runs, and advice that a command can follow."""
    told = words.replace("one outcome", runs[0]).replace("the other", runs[1])
    way = "--metric NAME takes one that both have"
    if "for_metric" not in words:
        way = "run both with the same sites, layers, heads and positions"
    return _ADVICE.sub(f": {way}", told)
