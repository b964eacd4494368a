"""`nnpatch compare`: the differences of two runs, with intervals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from nnpatch_core.cli.outcomes import read_outcome
from nnpatch_core.cli.output import say, say_aside

_RUN = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or an outcome.")]
_TOP = Annotated[int, typer.Option(min=1, metavar="N", help="How many rows.")]
_METRIC = Annotated[
    str | None, typer.Option(metavar="NAME", help="The metric; by default the first.")
]
_SITES = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Of these sites alone; may be repeated.")
]


def compare(
    one: _RUN, other: _RUN, *, top: _TOP = 10, metric: _METRIC = None, sites: _SITES = None
) -> bool:
    """Print where two runs differ most, with the intervals of the differences."""
    first, second = (read_outcome(each, metric) for each in (one, other))
    if sites:
        first, second = first.sel(site=sites), second.sel(site=sites)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = (first - second).top(top)
        same = all(row["value"] == 0 for row in found)
        table = "No value differs." if same else str(found)
    for words in dict.fromkeys(str(each.message) for each in heard):
        say_aside(words)
    say(f"{one} - {other}")
    say()
    say(table)
    return True
