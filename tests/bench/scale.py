"""The bench of workers: a sweep by processes of Ray, beside one process.

    python tests/bench/scale.py --layers 6

SmolLM2-135M, prompts of 64 tokens, `o` by head at each position; each process has one thread.
Ratios are of one round, in which one process is measured first and last; their median is told.
CPU is that of the driver and the workers; the processes of Ray itself are told apart. Needs
nnpatch-core[ray], and a machine of two cores that nobody else uses: the load is told.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from jobs import SMOLLM2, Job
from run import say
from subject import Prompts, load, prompts

from nnpatch_core import Sites, activation_patching
from nnpatch_core.scale import RayWorkers

LENGTH = 64


def model() -> Any:
    """The model, as each worker loads it."""
    torch.set_num_threads(1)
    return load(SMOLLM2, "cpu", "float32").model


def main() -> None:
    """Measure, and print a JSON of what was found."""
    arguments = parse()
    torch.set_num_threads(1)
    subject = load(SMOLLM2, "cpu", "float32")
    here, asked = subject.model, prompts(Job("each", "o", LENGTH), subject, 0)
    layers = [round(each * 29 / max(arguments.layers - 1, 1)) for each in range(arguments.layers)]
    sites = Sites("o", layers, seq_pos_type="each")

    def sweep(nnmodel: Any) -> Any:
        return swept(nnmodel, sites, asked, arguments.budget)

    found: dict[str, Any] = {
        "machine": platform.processor(),
        "cores": os.cpu_count(),
        "layers": layers,
        "rounds": [],
    }
    for _ in range(arguments.rounds):
        own: dict[str, Any] = {"load before": [round(each, 2) for each in os.getloadavg()]}
        one, own["one process"] = clocked(lambda: sweep(here))
        own["cells"] = sum(each.numel() for each in one.values())
        for workers in (1, 2):
            begun = time.perf_counter()
            with RayWorkers(model, workers=workers) as pool:
                opened = time.perf_counter() - begun
                for time_of_it in ("first", "second"):
                    out, seconds = clocked(lambda: sweep(pool))
                    own[f"{workers} workers, {time_of_it}"] = seconds
                    own["equal"] = all(out[name].equal(one[name]) for name in one)
                own[f"{workers} workers"] = {"opened": opened}
        again, own["one process again"] = clocked(lambda: sweep(here))
        del again
        own["load after"] = [round(each, 2) for each in os.getloadavg()]
        found["rounds"].append(own | ratios(own))
        say(json.dumps(found["rounds"][-1], indent=1))
    for name in ("wall", "cpu"):
        found[name] = statistics.median(each[name] for each in found["rounds"])
    say(json.dumps(found, indent=1))


def ratios(own: dict[str, Any]) -> dict[str, float]:
    """How much faster two workers are, and how much dearer one is."""
    before, after = own["one process"], own["one process again"]
    wall, cpu = ((before[name] + after[name]) / 2 for name in ("wall", "cpu"))
    return {
        "wall": wall / own["2 workers, second"]["wall"],
        "cpu": own["1 workers, second"]["cpu"] / cpu,
        "cpu with ray": (own["1 workers, second"]["cpu"] + own["1 workers, second"]["ray"]) / cpu,
        "cpu of two": own["2 workers, second"]["cpu"] / cpu,
    }


def swept(nnmodel: Any, sites: Any, asked: Prompts, budget: str) -> Any:
    """The sweep, by one process or by workers."""
    return activation_patching(
        nnmodel, None, sites, asked.source, asked.target, asked.source_answer, asked.target_answer,
        memory_budget=budget, progress=False,
    )  # fmt: skip


def clocked(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What work gives, and what it took: wall and CPU seconds, of us and of Ray's processes."""
    before, begun = _spent(), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - begun, _spent()
    return result, {
        "wall": wall,
        "cpu": after[0] - before[0],
        "ray": after[1] - before[1],
    }


def _spent() -> tuple[float, float]:
    """CPU seconds of this process and its workers, and of the other processes of Ray."""
    ours, theirs = time.process_time(), 0.0
    for each in psutil.Process().children(recursive=True):
        try:
            spent, words = sum(each.cpu_times()[:2]), " ".join(each.cmdline())
        except psutil.NoSuchProcess:
            continue
        if words.startswith("ray::Worker"):
            ours += spent
        else:
            theirs += spent
    return ours, theirs


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="how many, spread over all 30")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", default="1 GiB", help="memory_budget of each process")
    return parser.parse_args()


if __name__ == "__main__":
    main()
