"""Peak memory of a sweep over many prompts: `python many.py means 10000`.

The first word says how they run: in batches of 100, of which `means` or each of the `prompts` are
kept, or `whole`, as one batch. Prints MiB over what the process had before the sweep, and CPU
seconds.
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from nnpatch_core import PromptPairs, Sites, activation_patching
from nnpatch_core.testing import tiny_model, tiny_tokenizer

NAMES = ["Mary", "Sue", "Anne", "John", "Lee"]
TEMPLATE = "Then , {A} and {B} went to the shop and {B} gave a bar to"
TOKENIZER = tiny_tokenizer([" Then , Mary Sue Anne John Lee went to the shop and gave a bar"])
SITES = Sites(["resid", "attn", "mlp", "q"], seq_pos_type="each")
BATCH = 100


def pairs(count: int, draw: random.Random) -> PromptPairs:
    """Indirect objects of one template."""
    drawn = [draw.sample(NAMES, 2) for _ in range(count)]
    return PromptPairs.from_template(
        TEMPLATE,
        [{"A": a, "B": b} for a, b in drawn],
        [{"A": b, "B": a} for a, b in drawn],
        [f" {a}" for a, _ in drawn],
        [f" {b}" for _, b in drawn],
        TOKENIZER,
    )


def batches(count: int, draw: random.Random) -> Iterator[PromptPairs]:
    """So many pairs, made a batch at a time."""
    for _ in range(0, count, BATCH):
        yield pairs(BATCH, draw)


def main() -> None:
    """Run one sweep, and print what it took."""
    kind, count, draw = sys.argv[1], int(sys.argv[2]), random.Random(0)
    torch.set_num_threads(1)
    model = tiny_model("llama", vocab_size=8192)
    before, begun = psutil.Process().memory_info().rss, time.process_time()
    given: Any = pairs(count, draw) if kind == "whole" else batches(count, draw)
    keep: Any = "prompts" if kind == "whole" else kind
    out = activation_patching(model, None, SITES, given, keep=keep, progress=False)
    # In KiB, on Linux.
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.process_time() - begun
    sys.stdout.write(f"{kind}, {out.count} prompts: {peak / 2**20:.0f} MiB, {seconds:.1f} s\n")


if __name__ == "__main__":
    main()
