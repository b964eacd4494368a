"""One table of several results, such as those of a GPU: the fastest run of each contestant.

python tests/bench/compact.py docs/_static/bench/gpu/*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from contestants import CONTESTANTS, WHOLE
from summary import Summary
from tables import number, ratio, table


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="as run.py has written them")
    given = parser.parse_args().results
    found = [Summary(json.loads(path.read_text(encoding="utf-8"))) for path in given]
    names = [name for name in CONTESTANTS if any(name in each.contestants for each in found)]
    titles = [CONTESTANTS[name].title for name in names]
    base = next(name for name in names if name in WHOLE)
    own = [f"{title} / {CONTESTANTS[base].title}" for title in titles[1:]]
    header = ["model", "type", "job", "cells", *titles, *own]
    rows = [row for each in found for row in _times(each, names, base)]
    sys.stdout.write(f"{table(header, rows)}\n\n")
    own = [f"{CONTESTANTS[base].title} - {title}" for title in titles[1:]]
    header = ["model", "type", "job", "bound", "with the model's own layers", "peak, GiB", *own]
    rows = [row for each in found for row in _others(each, names, base)]
    sys.stdout.write(f"{table(header, rows)}\n")


def _times(found: Summary, names: list[str], base: str) -> Iterator[list[str]]:
    for job in found.jobs(1):
        seconds = {name: found.fastest(job, 1, name, found.clock) for name in names}
        yield [
            *(found.about["model"], found.about["dtype"], job.name),
            f"{len(job.cells(found.shape)):,}",
            *map(number, seconds.values()),
            *(ratio(seconds[name], seconds[base]) for name in names if name != base),
        ]


def _others(found: Summary, names: list[str], base: str) -> Iterator[list[str]]:
    for job in found.jobs(1):
        least = job.token_layers(found.shape)
        more = least + job.recorded_token_layers(found.shape)
        peak = found.peak(job, 1, base)
        gaps = [found.difference(job, 1, base, name) for name in names if name != base]
        yield [
            *(found.about["model"], found.about["dtype"], job.name),
            number(least * found.token_layer(job, 1, found.clock)),
            number(more * found.token_layer(job, 1, found.clock, "own")),
            number(None if peak is None else peak / 2**30),
            *("" if gap is None else f"{gap:.0e}" for gap in gaps),
        ]


if __name__ == "__main__":
    main()
