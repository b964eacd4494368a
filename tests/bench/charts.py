"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from contestants import CHARTED, CONTESTANTS
from jobs import SCALING, Job
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from summary import Summary

COLOURS = {"cone": "#1f5fa8", "full": "#7a4fa3", "transformerlens": "#2f8f5b", "hooks": "#c8642a"}
GREY = "#808080"
MIB = 2**20
#: By whether the allocator keeps what has been freed: how it is told, and the line's style.
KEEPING = {
    True: ("resident, with what the allocator keeps", "o-"),
    False: ("resident, the allocator keeps nothing", "o:"),
}
CLOCKS = {"cpu": "CPU seconds, one thread", "wall": "seconds"}


def draw(found: Summary, folder: Path) -> list[Path]:
    """Draw what was measured; gives the files."""
    drawn = {}
    if _measured(found):
        drawn["scaling.svg"] = _scaling(found)
    if found.memory:
        drawn["memory.svg"] = _memory(found)
    for name, figure in drawn.items():
        # Text stays text, and nothing depends on the day: small files that can be compared.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nnpatch"}):
            figure.savefig(folder / name, metadata={"Date": None})
    return [folder / name for name in drawn]


def _measured(found: Summary) -> bool:
    done = found.jobs(1)
    return all(job in done for points in SCALING.values() for _, job in points)


def _scaling(found: Summary) -> Figure:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(SCALING), sharey=True)
    for axes, (what, points) in zip(panels, SCALING.items(), strict=True):
        values, jobs = [value for value, _ in points], [job for _, job in points]
        for name in CHARTED:
            seconds = [found.seconds(job, 1, name, found.clock) for job in jobs]
            if None in seconds:
                continue
            title = CONTESTANTS[name].title
            axes.plot(values, seconds, "o-", color=COLOURS[name], label=title)
        least = [_least(found, job) for job in jobs]
        axes.plot(values, least, "--", color=GREY, label="bound with recorded runs")
        axes.set(xlabel=what, xscale="log", yscale="log")
        _plain(axes, values)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_title(_same(jobs), fontsize=9)
    figure.axes[0].set_ylabel(CLOCKS[found.clock])
    figure.axes[0].legend(fontsize=8)
    return figure


def _least(found: Summary, job: Job) -> float:
    count = job.token_layers(found.shape) + job.recorded_token_layers(found.shape)
    return count * found.token_layer(job, 1, found.clock)


def _same(jobs: Sequence[Job]) -> str:
    """What the jobs of a panel have in common."""
    lengths, layers, pairs = (
        {getattr(job, field) for job in jobs} for field in ("length", "layers", "prompts")
    )
    fixed = ["resid at each position"]
    fixed += [f"{length} tokens" for length in lengths if len(lengths) == 1]
    fixed += [f"last {count} layers" for count in layers if len(layers) == 1]
    fixed += [f"{count} pair{'s' * (count > 1)}" for count in pairs if len(pairs) == 1]
    return ", ".join(fixed)


def _memory(found: Summary) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    peak, cost = figure.subplots(1, 2)
    for keeps, (label, style) in KEEPING.items():
        budgets, points = _budgets(found, keeps)
        if not points:
            continue
        peaks = [each["peak"] / MIB for each in points]
        peak.plot(budgets, peaks, style, color=COLOURS["cone"], label=label)
    budgets, points = _budgets(found, keeps=True)
    peak.plot(budgets, budgets, "--", color=GREY, label="peak = budget")
    for each in found.memory:
        if each["budget"] is None and each["keeps"]:
            told = f"no budget given: {each['peak'] / MIB:.0f} MiB"
            peak.axhline(each["peak"] / MIB, color=GREY, linestyle=":", label=told)
    peak.set(xlabel="memory_budget, MiB", ylabel="peak beyond what was there, MiB", yscale="log")
    peak.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    seconds = [each["total"][found.clock] for each in points]
    cost.plot(budgets, seconds, "o-", color=COLOURS["cone"])
    cost.set(xlabel="memory_budget, MiB", ylabel=CLOCKS[found.clock])
    cost.set_ylim(0, 1.1 * max(seconds))
    for axes in (peak, cost):
        axes.set_xscale("log")
        _plain(axes, budgets)
    peak.legend(fontsize=8)
    return figure


def _budgets(found: Summary, keeps: bool) -> tuple[list[float], list[dict[str, Any]]]:
    """Budgets in MiB, ascending, and what was measured under each."""
    points = [each for each in found.memory if each["budget"] and each["keeps"] == keeps]
    points.sort(key=lambda each: each["budget"])
    return [each["budget"] / MIB for each in points], points


def _plain(axes: Any, values: Sequence[float]) -> None:
    """Numbers as they are along a logarithmic axis, at the points alone."""
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
