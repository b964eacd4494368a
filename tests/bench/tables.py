"""The tables of the page, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from contestants import CONTESTANTS, WHOLE
from jobs import Job, job_named
from summary import Summary

CLOCKS = {"cpu": "CPU time", "wall": "wall time"}
NONE = ""


def tables(found: Summary) -> str:
    """Every table, each under a heading of its own."""
    parts = [_about(found)]
    for threads in found.threads:
        # Those of the charts sweep some layers, or several pairs of prompts.
        rows = [job for job in found.jobs(threads) if job == job_named(job.name)]
        if not rows:
            continue
        told = f"{threads} thread{'s' * (threads > 1)}"
        other = "wall" if found.clock == "cpu" else "cpu"
        parts += [f"### {told}: {CLOCKS[found.clock]}", _times(found, rows, threads, found.clock)]
        parts += [f"### {told}: {CLOCKS[other]}", _times(found, rows, threads, other)]
        parts += [f"### {told}: against the bound", _bounds(found, rows, threads)]
        parts += [f"### {told}: agreement", _agreement(found, rows, threads)]
        if found.has_peaks:
            parts += [f"### {told}: peak memory, in GiB", _peaks(found, rows, threads)]
    return "\n\n".join(parts)


def _about(found: Summary) -> str:
    about, whole = found.about, [name for name in found.contestants if name in WHOLE]
    where = about.get("gpu") or f"{about['cpu']}, {about['cores']} cores"
    told = [
        f"{about['model']}, {about['dtype']}, on {where}, {about['date']}.",
        f"{_libraries(about['libraries'])}.",
        *(f"{CONTESTANTS[name].title}: {_libraries(own)}." for name, own in about["apart"].items()),
        "Seconds for the whole job, medians of as many runs as `runs` says.",
        f"{_listed(name for name in found.contestants if name not in whole)} ran as many cells as "
        "`ran` says; their seconds are that time, times the number of cells.",
    ]
    if whole:
        told.append(f"{_listed(whole)} ran them all.")
    return "\n".join(told)


def _libraries(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _listed(names: Iterable[str]) -> str:
    titles = [CONTESTANTS[name].title for name in names]
    return " and ".join(filter(None, (", ".join(titles[:-1]), *titles[-1:])))


def _times(found: Summary, jobs: Sequence[Job], threads: int, clock: str) -> str:
    names, whole = found.contestants, [name for name in found.contestants if name in WHOLE]
    ratios = [(name, base) for base in whole for name in names if name != base]
    header = ["job", "cells", "ran", "runs", *(CONTESTANTS[name].title for name in names)]
    header += [f"{CONTESTANTS[name].title} / {CONTESTANTS[base].title}" for name, base in ratios]
    rows = []
    for job in jobs:
        seconds = {name: found.seconds(job, threads, name, clock) for name in names}
        runs = min(len(found.runs(job, threads, name)) for name in names)
        ran = found.sampled(job, threads)
        rows.append(
            [
                job.name,
                f"{len(job.cells(found.shape)):,}",
                str(ran or NONE),
                str(runs),
                *(number(seconds[name]) for name in names),
                *(ratio(seconds[name], seconds[base]) for name, base in ratios),
            ]
        )
    return table(header, rows)


def _bounds(found: Summary, jobs: Sequence[Job], threads: int) -> str:
    names = [name for name in found.contestants if name in WHOLE] or found.contestants
    titles = [CONTESTANTS[name].title for name in names]
    header = ["job", "token-layers", "us each", "bound"]
    header += [f"{title} / bound" for title in titles]
    header += ["bound with recorded runs", *(f"{title} / that" for title in titles)]
    header += ["with the model's own layers", *(f"{title} / that" for title in titles)]
    rows = []
    for job in jobs:
        each = found.token_layer(job, threads, found.clock)
        cone = job.token_layers(found.shape)
        least = cone * each
        recorded = job.recorded_token_layers(found.shape)
        more = least + recorded * each
        own = (cone + recorded) * found.token_layer(job, threads, found.clock, "own")
        seconds = [found.seconds(job, threads, name, found.clock) for name in names]
        rows.append(
            [
                *(job.name, f"{cone:,}", f"{each * 1e6:.1f}", number(least)),
                *(ratio(taken, least) for taken in seconds),
                number(more),
                *(ratio(taken, more) for taken in seconds),
                number(own),
                *(ratio(taken, own) for taken in seconds),
            ]
        )
    return table(header, rows)


def _agreement(found: Summary, jobs: Sequence[Job], threads: int) -> str:
    pairs = list(combinations(found.contestants, 2))
    header = ["job", "lowest value", "highest value"]
    header += [f"{CONTESTANTS[one].title} - {CONTESTANTS[other].title}" for one, other in pairs]
    rows = []
    for job in jobs:
        values = next(found.values(job, threads, name) for name in reversed(found.contestants))
        gaps = [found.difference(job, threads, one, other) for one, other in pairs]
        rows.append(
            [
                *(job.name, f"{min(values):.3f}", f"{max(values):.3f}"),
                *(NONE if gap is None else f"{gap:.1e}" for gap in gaps),
            ]
        )
    return table(header, rows)


def _peaks(found: Summary, jobs: Sequence[Job], threads: int) -> str:
    names = found.contestants
    header = ["job", *(CONTESTANTS[name].title for name in names)]
    rows = []
    for job in jobs:
        peaks = [found.peak(job, threads, name) for name in names]
        rows.append([job.name, *(number(peak if peak is None else peak / 2**30) for peak in peaks)])
    return table(header, rows)


def number(seconds: float | None) -> str:
    """Three digits, or all of those before the point."""
    if seconds is None:
        return NONE
    decimals = 0 if seconds >= 100 else 1 if seconds >= 10 else 2 if seconds >= 1 else 3
    return f"{seconds:,.{decimals}f}"


def ratio(one: float | None, other: float | None) -> str:
    """How many times the other, in the same way."""
    # The bound is 0 where no patch reaches any further layer.
    return number(one / other) if one is not None and other else NONE


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, the first column of which is of words."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
