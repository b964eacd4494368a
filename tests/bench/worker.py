"""The process of one contestant: it loads the model once, then answers requests, a line each.

Started by `workers.Worker`, with the Python of the environment in which the contestant lives.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch
from bound import own_seconds_per_token_layer, seconds_per_token_layer
from clock import Seconds, timed
from contestants import BOUND, WHOLE, make
from jobs import Job, job_from
from memory import peak_bytes
from subject import Subject, load, prompts

LIBRARIES = ("torch", "transformers", "nnsight", "nnpatch-core", "transformer-lens", "pyvene")


class Answers:
    """What a worker does when it is asked; each method is a request, its arguments JSON."""

    def __init__(self, name: str, subject: Subject) -> None:
        self.name, self.subject = name, subject
        self.contestant: Any = None if name == BOUND else make(name, subject)

    def about(self) -> dict[str, Any]:
        """What the tables tell about the model and the libraries."""
        device = self.subject.device
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {"shape": list(self.subject.shape), "libraries": versions(), **gpu}

    def bound(self, threads: int) -> dict[str, dict[str, float]]:
        """Seconds per token-layer, by matrix products and by the model's own layers."""
        torch.set_num_threads(threads)
        products = seconds_per_token_layer(self.subject)
        own = own_seconds_per_token_layer(self.subject)
        return {"seconds": products._asdict(), "own": own._asdict()}

    def sweep(self, job: dict[str, Any], threads: int, sample: int, seed: int) -> dict[str, Any]:
        """Time a job, and give the values of a sample of its cells."""
        torch.set_num_threads(threads)
        wanted, shape = job_from(job), self.subject.shape
        run = self._sweep_grid if self.name in WHOLE else self._sweep_sample
        found: dict[str, Any] = {"cells": len(wanted.cells(shape))}

        def work() -> None:
            found.update(run(wanted, wanted.sample(shape, sample, seed), seed))

        if self.subject.device.type == "cuda":
            found["peak"] = peak_bytes(work, self.subject.device)
        else:
            # Here it can only be measured in a process that has done nothing else.
            work()
        return found

    def memory(self, job: dict[str, Any], threads: int, budget: int | None, seed: int) -> Any:
        """The memory that a whole sweep takes, and its time; asked of a fresh process."""
        torch.set_num_threads(threads)
        wanted = job_from(job)
        given = prompts(wanted, self.subject, seed)
        self._warm_up(wanted, seed)
        taken: list[Seconds] = []

        def work() -> None:
            def run() -> object:
                return self.contestant.sweep_grid(given, wanted, budget)

            taken.append(timed(run, self.subject.device)[1])

        peak = peak_bytes(work, self.subject.device)
        return {"peak": peak, "total": taken[0]._asdict()}

    def _sweep_grid(self, job: Job, chosen: list[Any], seed: int) -> dict[str, Any]:
        from contestants.nnpatch_engine import values_at

        given = prompts(job, self.subject, seed)
        self._warm_up(job, seed)
        out, total = timed(lambda: self.contestant.sweep_grid(given, job), self.subject.device)
        return {"total": total._asdict(), "values": values_at(out, chosen)}

    def _sweep_sample(self, job: Job, chosen: list[Any], seed: int) -> dict[str, Any]:
        """Where cells share no work: the sample, and from it what all cells would take.

        It is run with one cell and with all of its cells, so that what a sweep takes besides its
        cells, the source run for one, is counted once.
        """
        given, device = prompts(job, self.subject, seed), self.subject.device
        # Libraries prepare things when they are first used.
        self.contestant.sweep(given, chosen[:2])
        _, one = timed(lambda: self.contestant.sweep(given, chosen[:1]), device)
        values, some = timed(lambda: self.contestant.sweep(given, chosen), device)
        clocks = zip(one, some, strict=True)
        each = Seconds(*((many - single) / (len(chosen) - 1) for single, many in clocks))
        others = len(job.cells(self.subject.shape)) - 1
        total = Seconds(*(single + others * cost for single, cost in zip(one, each, strict=True)))
        return {
            "total": total._asdict(),
            "each": each._asdict(),
            "ran": len(chosen),
            "values": values,
        }

    def _warm_up(self, job: Job, seed: int) -> None:
        small = replace(job, positions="last", layers=2)
        self.contestant.sweep_grid(prompts(small, self.subject, seed), small)


def versions() -> dict[str, str]:
    """Of the libraries that are installed here."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return found


def serve(answers_of: Callable[[str, Subject], Any]) -> None:
    """Answer until the input ends.

    Args:
        answers_of: given the contestant's name and the model, an object whose methods answer.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    arguments = parser.parse_args()
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_grad_enabled(False)
    worker = answers_of(arguments.name, load(arguments.model, arguments.device, arguments.dtype))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(Answers)
