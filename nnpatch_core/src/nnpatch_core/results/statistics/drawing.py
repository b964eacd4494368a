"""Random draws of prompts and of signs, block by block, the same for every cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from nnpatch_core.results.statistics.samples import Floats

#: Numbers of an array that is held at a time: 32 MiB of float64.
HELD = 2**22
#: Numbers of a block of draws.
_BLOCK = 2**19


def counts(prompts: int, draws: int, seed: int, stream: int) -> Iterator[Floats]:
    """Blocks `[some draws, prompts]`: how often each prompt is in a draw of as many, with return.

    Args:
        prompts: the number of prompts.
        draws: the number of draws.
        seed: of all draws.
        stream: another number draws others by the same seed.
    """
    for random, size in _blocks(prompts, draws, seed, stream):
        chosen = random.integers(0, prompts, (size, prompts), dtype=np.int64)
        chosen += np.arange(size)[:, None] * prompts
        each = np.bincount(chosen.ravel(), minlength=size * prompts)
        yield each.reshape(size, prompts).astype(np.float64)


def signs(prompts: int, draws: int, seed: int, stream: int) -> Iterator[Floats]:
    """Blocks `[some draws, prompts]` of 1 and -1, each as likely as the other."""
    for random, size in _blocks(prompts, draws, seed, stream):
        yield 2.0 * random.integers(0, 2, (size, prompts)).astype(np.float64) - 1.0


def side_by_side(streams: Sequence[Iterator[Floats]], draws: int) -> Iterator[list[Floats]]:
    """Blocks of several streams of draws, cut to equal length: `[some draws, prompts]` each."""
    waiting: list[Floats] = [np.empty((0, 0)) for _ in streams]
    done = 0
    while done < draws:
        waiting = [
            each if len(each) else next(stream)
            for each, stream in zip(waiting, streams, strict=True)
        ]
        size = min(len(each) for each in waiting)
        yield [each[:size] for each in waiting]
        waiting = [each[size:] for each in waiting]
        done += size


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of `count` things, each with so many numbers, that are held at a time."""
    step = max(1, HELD // max(size, 1))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def _blocks(
    prompts: int, draws: int, seed: int, stream: int
) -> Iterator[tuple[np.random.Generator, int]]:
    step = max(1, _BLOCK // prompts)
    for number, first in enumerate(range(0, draws, step)):
        yield np.random.default_rng((seed, stream, number)), min(step, draws - first)
