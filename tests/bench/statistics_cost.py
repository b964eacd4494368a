"""What statistics cost: CPU seconds of each, and memory, by the number of draws.

The outcome is of random numbers: 30 layers, 32 positions and 9 heads in 32 prompts. Each figure is
of a process of its own, whose peak of memory is told beside that before it was asked.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nnpatch_core import Outcome
from nnpatch_core.results import Baseline, Cells, Prompts
from nnpatch_core.sites import Axis

PAGE = Path(__file__).resolve().parents[2] / "docs" / "statistics-measured.md"
BEGIN, END = "<!-- cost: begin -->", "<!-- cost: end -->"
LAYERS, POSITIONS, HEADS, PROMPTS = 30, 32, 9, 32
DRAWS = (1_000, 10_000, 100_000)
ASKED: dict[str, Callable[[Outcome, int], Any]] = {
    "`interval`": lambda out, draws: out.interval("o", resamples=draws),
    "`band`": lambda out, draws: out.band("o", flips=draws),
    "`pvalues`, Holm": lambda out, draws: out.pvalues("o", "holm", flips=draws),
    "`pvalues`, max-T": lambda out, draws: out.pvalues("o", "max_t", flips=draws),
    "`stability`": lambda out, draws: out.stability(20, "o", resamples=draws),
}


def outcome() -> Outcome:
    """Effects of a few cells, and noise."""
    chance = torch.Generator().manual_seed(0)
    shape = (LAYERS, POSITIONS, HEADS)
    cells = LAYERS * POSITIONS * HEADS
    target = -3 + torch.randn(PROMPTS, generator=chance)
    source = 3 + torch.randn(PROMPTS, generator=chance)
    sizes = torch.randn(cells, 1, generator=chance) ** 5 / 100
    noise = 1 + torch.randn(cells, PROMPTS, generator=chance)
    mask = torch.ones(cells, PROMPTS, dtype=torch.bool)
    names = ("layer", "position", "head")
    axes = tuple(Axis(name, tuple(range(size))) for name, size in zip(names, shape, strict=True))
    index = torch.cartesian_prod(*(torch.arange(size) for size in shape))
    tokens = torch.arange(2 * PROMPTS * POSITIONS).reshape(2, PROMPTS, POSITIONS)
    whole = torch.ones(PROMPTS, POSITIONS, dtype=torch.int64)
    return Outcome(
        "activation",
        "restored",
        {"o": Cells(axes, index, mask, ~mask, ~mask, torch.ones(cells, dtype=torch.bool))},
        {"random": {"o": target + (source - target) * sizes * noise}},
        {"random": Baseline(source, target)},
        Prompts(tokens[0], whole, tokens[1], whole),
        "random",
        {},
    )


def peak() -> float:
    """The most memory that this process has had so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, draws: int) -> None:
    """Ask once, and print seconds and MiB as JSON."""
    torch.set_num_threads(1)
    out = outcome()
    # What is imported on first use, and is the same for any number.
    ASKED[name](out.by_group([0] * 4 + [1] * (PROMPTS - 4))[1], 100)
    before, begun = peak(), time.process_time()
    ASKED[name](out, draws)
    seconds = time.process_time() - begun
    sys.stdout.write(json.dumps({"seconds": seconds, "before": before, "peak": peak()}))


def rows() -> Iterator[tuple[str, ...]]:
    """What each figure costs."""
    for name in ASKED:
        for draws in DRAWS:
            command = [sys.executable, __file__, "--only", name, str(draws)]
            told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            sizes = (f"{told[key]:.0f} MiB" for key in ("before", "peak"))
            row = (name, f"{draws:,}", f"{told['seconds']:.1f} s", *sizes)
            sys.stderr.write(f"{' '.join(row)}\n")
            yield row


def main() -> None:
    """Measure each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="put the table into the docs")
    parser.add_argument("--only", nargs=2, metavar=("NAME", "DRAWS"), help="in this process")
    arguments = parser.parse_args()
    if arguments.only:
        measure(arguments.only[0], int(arguments.only[1]))
        return
    heads = ("", "draws", "CPU", "memory before", "memory at most")
    lines = [heads, ("---",) * len(heads), *rows()]
    report = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sys.stdout.write(f"{report}\n")
    if arguments.publish:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
