"""`nnpatch show`: what a run has found, from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnpatch_core.cli.outcomes import read_outcome
from nnpatch_core.cli.output import say
from nnpatch_core.results import bars_told

_FOLDER = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, or an outcome.")]
_TOP = Annotated[int, typer.Option(min=1, metavar="N", help="How many rows.")]
_METRIC = Annotated[
    str | None, typer.Option(metavar="NAME", help="The metric; by default the first.")
]
_LEVEL = Annotated[float, typer.Option(metavar="X", help="The level of the intervals.")]
_SITES = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Of these sites alone; may be repeated.")
]


def show(
    folder: _FOLDER,
    *,
    top: _TOP = 10,
    metric: _METRIC = None,
    sites: _SITES = None,
    level: _LEVEL = 0.95,
) -> bool:
    """Print the strongest cells of a run, how sure they are, and how they were measured."""
    outcome = read_outcome(folder, metric)
    say(repr(outcome))
    say()
    found = outcome.top(top, sites or None, level=level)
    say("\n".join([str(found), *bars_told(found)]))
    say()
    width = max(map(len, outcome.info))
    for name, words in outcome.info.items():
        if name != "nodes":
            say(f"{name:<{width}}  {words}")
    return True
