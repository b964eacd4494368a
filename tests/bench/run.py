"""The bench: engines of nnpatch against its peers. `nox -s bench`, or by hand a part of it.

    python tests/bench/run.py --jobs 'last-*-32' --contestants full hooks --no-charts

Needs nnpatch with all extras and, for TransformerLens, the Python of an environment that has it.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from contestants import APART, BOUND, CHARTED, CONTESTANTS, WHOLE
from jobs import BUDGETS, MEMORY_JOB, SCALING, SMOLLM2, Job, job_named, table_jobs
from render import PUBLISHED, render, save
from workers import Resident, Together, Worker

OUT = Path("build") / "bench"
#: Tells glibc to give memory back as soon as it is freed.
KEEP_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
SEED = 0


class Task(NamedTuple):
    """A job with so many threads, and who does it."""

    job: Job
    threads: int
    contestants: tuple[str, ...]


def main() -> None:
    """Measure, write the results down, and render them."""
    arguments = parse()
    folder = PUBLISHED if arguments.publish else arguments.out.resolve()
    names = [name for name in CONTESTANTS if name in arguments.contestants]
    for name in [name for name in names if name in APART and not arguments.together]:
        if (
            arguments.transformerlens_python is None
            or not arguments.transformerlens_python.exists()
        ):
            say(f"{name} is left out: --transformerlens-python names no Python that has it")
            names.remove(name)
    tasks = plan(arguments, names)
    if not tasks:
        raise SystemExit(f"no job is named {' or '.join(arguments.jobs)}, or no contestant is left")
    results: dict[str, Any] = {"about": {}, "sweeps": [], "bounds": [], "memory": []}
    with ExitStack() as stack:
        workers: dict[str, Worker | Resident] = {}
        together = Together(settings(arguments)) if arguments.together else None
        for name in (BOUND, *names):
            worker: Worker | Resident
            if together:
                worker = together.worker(name)
            else:
                worker = Worker(name, settings(arguments), arguments.transformerlens_python)
            stack.enter_context(worker)
            workers[name] = worker
            # One after the other: the first may have to convert the model for all.
            told = workers[name].ask("about")
            if name == BOUND:
                results["about"] = describe(arguments, told)
            elif name in APART and not together:
                results["about"]["apart"][name] = told["libraries"]
        contest(arguments, tasks, workers, results, folder)
    if arguments.charts and not arguments.together and set(names) & set(WHOLE):
        for budget in BUDGETS:
            for keeps in (True, False) if arguments.device == "cpu" else (True,):
                results["memory"] += memory(arguments, budget, keeps)
                save(results, folder)
    say(f"\n{render(folder)}\n\nWritten to {os.path.relpath(folder)}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    told = "patterns of names such as each-heads-32 (default: all), or a name of any length"
    parser.add_argument("--jobs", nargs="+", metavar="PATTERN", default=["*"], help=told)
    parser.add_argument(
        "--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="who runs"
    )
    told = "cells that are timed where one costs what another does (default: %(default)s)"
    parser.add_argument("--sample", type=at_least(2), default=24, metavar="N", help=told)
    told = "how often everything is measured (default: %(default)s)"
    parser.add_argument("--repeat", type=at_least(1), default=3, metavar="N", help=told)
    told = "a job that a whole sweep takes longer for is not repeated (default: %(default)s)"
    parser.add_argument("--long", type=float, default=200.0, metavar="SECONDS", help=told)
    told = "jobs measured with all threads too (default: %(default)s)"
    parser.add_argument(
        "--all-threads", nargs="*", metavar="PATTERN", default=["each-resid-32"], help=told
    )
    told = "neither scaling nor memory"
    parser.add_argument("--no-charts", dest="charts", action="store_false", help=told)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    told = "a folder of a model with Llama's modules; without weights they are random"
    parser.add_argument("--model", default=SMOLLM2, metavar="FOLDER", help=told)
    told = "the Python of an environment with TransformerLens"
    parser.add_argument("--transformerlens-python", type=Path, metavar="PATH", help=told)
    told = "all contestants in this one process, with three copies of the model; no memory chart"
    parser.add_argument("--together", action="store_true", help=told)
    told = "where results, charts and tables go (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=told)
    told = "put them into the docs instead"
    parser.add_argument("--publish", action="store_true", help=told)
    return parser.parse_args()


def at_least(least: int) -> Any:
    """A type of argument."""

    def count(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return count


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """What every worker is started with."""
    return {"model": arguments.model, "device": arguments.device, "dtype": arguments.dtype}


def plan(arguments: argparse.Namespace, names: Sequence[str]) -> list[Task]:
    """What is measured, in order."""
    every = table_jobs()
    named = [job_named(pattern) for pattern in arguments.jobs]
    every += [job for job in named if job is not None and job not in every]
    found = [job for job in every if matches(job.name, arguments.jobs)]
    tasks = [Task(job, 1, tuple(names)) for job in found]
    if arguments.device == "cpu":
        threads = len(os.sched_getaffinity(0))
        tasks += [
            Task(job, threads, tuple(names))
            for job in found
            if threads > 1 and matches(job.name, arguments.all_threads)
        ]
    charted = tuple(name for name in names if name in CHARTED)
    if arguments.charts and charted:
        # A job of two series, or of a series and a table, is measured once.
        done = {task.job for task in tasks if task.threads == 1}
        extra = dict.fromkeys(job for points in SCALING.values() for _, job in points)
        tasks += [Task(job, 1, charted) for job in extra if job not in done]
    return [task for task in tasks if task.contestants]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns fits."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def contest(
    arguments: argparse.Namespace,
    tasks: Sequence[Task],
    workers: dict[str, Worker | Resident],
    results: dict[str, Any],
    folder: Path,
) -> None:
    """Measure everything, and again: contestants of a job right after each other.

    So whatever slows the machine down for a while slows all of them, and a median of runs that
    lie far apart in time drops it.
    """
    long: set[Task] = set()
    for repeat in range(arguments.repeat):
        for task in tasks:
            if task in long:
                continue
            entry = {"job": asdict(task.job), "threads": task.threads}
            found = workers[BOUND].ask("bound", threads=task.threads)
            results["bounds"].append({**entry, **found})
            for name in task.contestants:
                answer = workers[name].ask("sweep", **entry, sample=arguments.sample, seed=SEED)
                report(repeat, task, name, answer)
                if name in WHOLE and answer["total"]["wall"] > arguments.long:
                    long.add(task)
                if repeat:
                    del answer["values"]  # the same again
                results["sweeps"].append({**entry, "contestant": name, **answer})
                # Hours of work are not lost to the last minute.
                save(results, folder)


def memory(arguments: argparse.Namespace, budget: int | None, keeps: bool) -> list[dict[str, Any]]:
    """The memory of a sweep under a budget, in a process of its own; nothing if it is refused.

    Args:
        arguments: the command line.
        budget: in bytes, or None for the engine's own.
        keeps: whether the allocator may keep what has been freed, as it does by default.
    """
    entry = {"job": asdict(MEMORY_JOB), "budget": budget}
    with Worker(WHOLE[0], settings(arguments), environment={} if keeps else KEEP_NOTHING) as worker:
        try:
            answer = worker.ask("memory", **entry, threads=1, seed=SEED)
        except RuntimeError as error:
            if "MemoryBudgetError" not in str(error):
                raise
            say(f"budget {budget}: refused, it is too small for one prompt")
            return []
    told = "" if keeps else ", the allocator keeps nothing"
    say(f"budget {budget}{told}: peak {answer['peak']:,} bytes, CPU {answer['total']['cpu']:.1f} s")
    return [{**entry, "keeps": keeps, **answer}]


def describe(arguments: argparse.Namespace, told: dict[str, Any]) -> dict[str, Any]:
    """What the page says about the run: the machine by its kind, never by its name."""
    name = "SmolLM2-135M-Instruct" if arguments.model == SMOLLM2 else Path(arguments.model).name
    return {
        "date": datetime.date.today().isoformat(),
        "model": name,
        "device": arguments.device,
        "dtype": arguments.dtype,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "sample": arguments.sample,
        "repeat": arguments.repeat,
        "apart": {},
        **told,
    }


def processor() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(repeat: int, task: Task, name: str, answer: dict[str, Any]) -> None:
    """A line for each measurement, for whoever waits."""
    cell = answer["total"]["cpu"] / answer["cells"]
    say(
        f"{repeat + 1}: {task.job.name}, {task.threads} thread{'s' * (task.threads > 1)}, {name}: "
        f"CPU {answer['total']['cpu']:.2f} s, wall {answer['total']['wall']:.2f} s for "
        f"{answer['cells']} cells, {cell * 1e3:.1f} ms each"
    )


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
