"""The bench of `train_subspace` against pyvene. `nox -s subspaces`, or by hand a part of it.

    python tests/bench/subspaces.py --pyvene-python PATH --jobs 'capitals-*' --epochs 2

Needs nnpatch with all extras, and the Python of an environment with pyvene.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contestants import LEARNERS
from jobs import SMOLLM2
from lessons import JOBS, Job
from render import DOCS, PUBLISHED, publish, save
from run import OUT, at_least, describe, matches, say
from tables import number, ratio, table
from workers import Worker

SCRIPT = Path(__file__).with_name("lesson_worker.py")
RESULTS, TABLES = "subspaces.json", "subspaces.md"
OWN, PEER = "nnpatch", "pyvene"
#: What the JSON of a run leaves out once it has been compared.
COMPARED = ("batches", "slope", "basis")


def main() -> None:
    """Measure, write the results down, and render them."""
    arguments = parse()
    folder = PUBLISHED if arguments.publish else arguments.out.resolve()
    if not arguments.render:
        learn(arguments, folder)
    say(f"\n{rendered(folder)}\n\nWritten to {os.path.relpath(folder)}")


def learn(arguments: argparse.Namespace, folder: Path) -> None:
    """Learn every subspace, and keep the results in a folder."""
    jobs = [job for job in JOBS if matches(job.name, arguments.jobs)]
    if not jobs:
        raise SystemExit(f"no job is named {' or '.join(arguments.jobs)}")
    results: dict[str, Any] = {"about": {}, "lessons": []}
    settings = {"model": SMOLLM2, "device": "cpu", "dtype": "float32"}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in LEARNERS:
            worker = Worker(name, settings, arguments.pyvene_python, script=SCRIPT)
            workers[name] = stack.enter_context(worker)
            # One after the other: the first may have to convert the model for all.
            told = workers[name].ask("about")
            results["about"].setdefault("loading", {})[name] = told.pop("loading")
            results["about"].setdefault("libraries", {})[name] = told["libraries"]
        results["about"] |= about(arguments)
        for job, seed in rounds(jobs):
            if arguments.seeds is not None and seed not in arguments.seeds:
                continue
            found = contest(arguments, job, seed, workers)
            results["lessons"].append({"job": asdict(job), "seed": seed, **found})
            save(results, folder, RESULTS)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    told = "the Python of an environment with pyvene"
    parser.add_argument("--pyvene-python", type=Path, metavar="PATH", help=told)
    told = f"patterns of names such as {JOBS[0].name} (default: all)"
    parser.add_argument("--jobs", nargs="+", metavar="PATTERN", default=["*"], help=told)
    told = "only those of a job's seeds (default: all)"
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help=told)
    told = "pairs that are learned from, that are held out, and that test (default: 64 12 32)"
    count = at_least(2)
    parser.add_argument("--pairs", nargs=3, type=count, default=[64, 12, 32], help=told)
    told = "of learning (default: %(default)s)"
    parser.add_argument("--epochs", type=at_least(1), default=4, metavar="N", help=told)
    parser.add_argument("--batch-size", type=at_least(1), default=16, metavar="N")
    parser.add_argument("--lr", type=float, default=0.02, help="the highest (default: %(default)s)")
    told = "where results and tables go (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=told)
    told = "put them into the docs instead"
    parser.add_argument("--publish", action="store_true", help=told)
    told = "write the tables of the results that there are, without a run"
    parser.add_argument("--render", action="store_true", help=told)
    arguments = parser.parse_args()
    if arguments.pyvene_python is None and not arguments.render:
        parser.error("--pyvene-python is needed")
    return arguments


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the page says about the run."""
    given = argparse.Namespace(
        model=SMOLLM2, device="cpu", dtype="float32", sample=None, repeat=None
    )
    found = describe(given, {})
    asked = ("pairs", "epochs", "batch_size", "lr")
    return {
        **{name: found[name] for name in ("date", "model", "dtype", "cpu", "cores")},
        **{name: getattr(arguments, name) for name in asked},
    }


def rounds(jobs: Sequence[Job]) -> list[tuple[Job, int]]:
    """Every job with each of its seeds: all with the first, then all with the second, and so on.

    So the seeds of a job lie far apart in time, as what slows a machine down comes and goes.
    """
    most = max(len(job.seeds) for job in jobs)
    return [(job, job.seeds[turn]) for turn in range(most) for job in jobs if turn < len(job.seeds)]


def contest(
    arguments: argparse.Namespace, job: Job, seed: int, workers: dict[str, Worker]
) -> dict[str, Any]:
    """One subspace, learned by each contestant right after the other, and what they differ in."""
    fields = workers[OWN].ask("prepare", job=asdict(job), seed=seed, sizes=arguments.pairs)
    rows = fields.pop("rows")
    lesson = {
        **{"layer": job.layer, "last": job.last, "rank": job.rank, "seed": seed, "warmup": 0.1},
        **{name: getattr(arguments, name) for name in ("epochs", "batch_size", "lr")},
        **fields,
    }
    everyone = job.everyone and seed == job.seeds[0]
    names = list(LEARNERS) if everyone else [OWN, PEER]
    found = {}
    for name in names:
        found[name] = workers[name].ask("learn", lesson=lesson, rows=rows)
        found[name]["agreement"] = agreement(found[OWN], found[name], fields["initial"])
        report(job, seed, name, found[name])
    for answer in found.values():
        for key in COMPARED:
            del answer[key]
    return {"tokens": len(fields["tokens"]["target"][0]), "runs": found}


def agreement(own: dict[str, Any], other: dict[str, Any], first: Any) -> dict[str, Any]:
    """How far two learnings that begin with the same basis are the same."""
    initial = torch.tensor(first).double()
    bases = [torch.tensor(each["basis"]).double() for each in (own, other)]
    slopes = [along(torch.tensor(each["slope"]).double(), initial) for each in (own, other)]
    losses = [torch.tensor(each["losses"]) for each in (own, other)]
    apart = (losses[0] - losses[1]).abs()
    return {
        "batches": own["batches"] == other["batches"],
        "first_loss": float(apart[0]),
        "last_loss": float(apart[-1]),
        "slope": float((slopes[0] - slopes[1]).norm() / slopes[0].norm()),
        # The cosine of the largest angle between the two subspaces.
        "cosine": float(torch.linalg.svdvals(bases[0].T @ bases[1]).min()),
    }


def along(slope: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The part of a gradient along which an orthonormal basis can move, `[width, rank]`."""
    inside = basis.T @ slope
    return slope - basis @ (inside + inside.T) / 2


def report(job: Job, seed: int, name: str, answer: dict[str, Any]) -> None:
    """A line for each learning, for whoever waits."""
    seconds = answer["seconds"]
    say(
        f"{job.name}, seed {seed}, {name}: accuracy {answer['accuracy']:.3f}, CPU "
        f"{seconds['before']:.2f} s before the first step, {median(seconds['step']):.3f} s a step, "
        f"{seconds['total']:.1f} s in all; {answer['agreement']}"
    )


def rendered(folder: Path) -> str:
    """The tables of the results in a folder; those of the docs go into the page."""
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    parts = [described(results)]
    for title, of in (("cost", costs), ("accuracy", answers), ("agreement", alike)):
        parts += [f"### Learning: {title}", of(results)]
    text = "\n\n".join(parts)
    if folder == PUBLISHED:
        told = (folder / RESULTS).relative_to(DOCS).as_posix()
        text += f"\n\nEvery measurement is in {{download}}`{RESULTS} <{told}>`."
        publish(text, "subspaces")
    else:
        (folder / TABLES).write_text(f"{text}\n", encoding="utf-8")
    return text


def described(results: dict[str, Any]) -> str:
    """The run, in words."""
    about = results["about"]
    train, held_out, test = about["pairs"]
    versions = {
        name: ", ".join(f"{library} {version}" for library, version in own.items())
        for name, own in about["libraries"].items()
    }
    loading = ", ".join(
        f"{number(seconds)} ({LEARNERS[name].title})" for name, seconds in about["loading"].items()
    )
    return "\n".join(
        [
            f"{about['model']}, {about['dtype']}, on {about['cpu']}, {about['cores']} cores, "
            f"{about['date']}.",
            f"nnpatch: {versions[OWN]}.",
            f"pyvene: {versions[PEER]}.",
            f"{train} pairs learned from, {held_out} held out and {test} for the test; "
            f"{about['epochs']} epochs in batches of {about['batch_size']}, learning rate "
            f"{about['lr']:g}. CPU seconds of one thread; medians of epochs, means over seeds.",
            f"Importing the libraries and loading the model took, in CPU seconds: {loading}. That "
            "is in none of the tables.",
        ]
    )


def costs(results: dict[str, Any]) -> str:
    """What it cost: each contestant a row, beside the first one."""
    header = ["job", "contestant", "seeds", "before the first step", "an epoch"]
    header += ["pairs held out, each time", "in all"]
    header += [f"{told} / {LEARNERS[OWN].title}" for told in ("an epoch", "in all")]
    rows = []
    for job, lessons in by_job(results):
        for name in LEARNERS:
            own = [each for each in lessons if name in each["runs"]]
            if not own:
                continue
            parts = [cost(each["runs"][name], results) for each in own]
            base = [cost(each["runs"][OWN], results) for each in own]
            mine, yours = (
                [mean(column) for column in zip(*each, strict=True)] for each in (parts, base)
            )
            against = [ratio(mine[1], yours[1]), ratio(mine[3], yours[3])]
            rows.append(
                [job.name, LEARNERS[name].title, str(len(own)), *map(number, mine), *against]
            )
    return table(header, rows)


def cost(run: dict[str, Any], results: dict[str, Any]) -> tuple[float, float, float, float]:
    """CPU seconds before the first step, of an epoch's steps, of the pairs held out, and in all."""
    seconds, epochs = run["seconds"], results["about"]["epochs"]
    steps = seconds["step"]
    size = len(steps) // epochs
    each = [sum(steps[begin : begin + size]) for begin in range(0, len(steps), size)]
    return seconds["before"], median(each), median(seconds["held_out"]), seconds["total"]


def answers(results: dict[str, Any]) -> str:
    """How often the patched run gave the source answer, in pairs that nobody learned from."""
    header = ["job", "seeds", "nnpatch", "pyvene", "random subspace", "whole component"]
    rows = []
    for job, lessons in by_job(results):
        own = [each["runs"][OWN] for each in lessons]
        peer = [each["runs"][PEER] for each in lessons]
        rows.append(
            [
                *(job.name, str(len(own))),
                *(shares(run["accuracy"] for run in runs) for runs in (own, peer)),
                *(
                    shares(run["controls"][name] for run in own)
                    for name in ("random subspace", "whole component")
                ),
            ]
        )
    return table(header, rows)


def alike(results: dict[str, Any]) -> str:
    """How far the two computed the same."""
    header = ["job", "same batches", "first loss", "first gradient", "last loss", "cosine"]
    rows = []
    for job, lessons in by_job(results):
        found = [
            run["agreement"]
            for each in lessons
            for name, run in each["runs"].items()
            if name != OWN
        ]
        same = all(each["batches"] for each in found)
        most = [max(each[key] for each in found) for key in ("first_loss", "slope", "last_loss")]
        least = min(each["cosine"] for each in found)
        numbers = [*(f"{value:.1e}" for value in most), f"{least:.5f}"]
        rows.append([job.name, "yes" if same else "no", *numbers])
    return table(header, rows)


def by_job(results: dict[str, Any]) -> list[tuple[Job, list[dict[str, Any]]]]:
    """The lessons of each job."""
    found: dict[Job, list[dict[str, Any]]] = {}
    for each in results["lessons"]:
        job = Job(**{**each["job"], "seeds": tuple(each["job"]["seeds"])})
        found.setdefault(job, []).append(each)
    return list(found.items())


def mean(values: Sequence[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)


def shares(values: Iterable[float]) -> str:
    """Each of them, or one if they are all the same."""
    told = [f"{value:.2f}" for value in values]
    return told[0] if len(set(told)) == 1 else ", ".join(told)


if __name__ == "__main__":
    main()
