"""What contestants learn subspaces from: pairs of prompts, where, and by which steps.

Needs torch alone, for this is imported where a peer lives.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Countries and their capitals; those of several tokens are left out.
CAPITALS = {
    "France": "Paris", "Japan": "Tokyo", "Germany": "Berlin", "Greece": "Athens", "Italy": "Rome",
    "Spain": "Madrid", "Russia": "Moscow", "Egypt": "Cairo", "China": "Beijing", "India": "Delhi",
    "Portugal": "Lisbon", "Austria": "Vienna", "Ireland": "Dublin", "Norway": "Oslo",
    "Sweden": "Stockholm", "Denmark": "Copenhagen", "Finland": "Helsinki", "Poland": "Warsaw",
    "Cuba": "Havana", "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "Turkey": "Ankara",
    "Canada": "Ottawa", "Chile": "Santiago", "Belgium": "Brussels", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Australia": "Canberra", "England": "London", "Scotland": "Edinburgh",
}  # fmt: skip
STORIES = ("novel", "film", "dream", "play")
NAMES = (
    "Mary", "John", "Tom", "Anna", "Paul", "Sarah", "Mark", "Lucy", "James", "Emma", "Peter",
    "Jane", "David", "Laura", "George", "Alice", "Robert", "Kate", "Henry", "Julia",
)  # fmt: skip
SCENES = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "Then {a} and {b} had a long day, and {s} sent a letter to",
    "After {a} and {b} came to the park, {s} threw a ball to",
)


class Texts(NamedTuple):
    """A pair of prompts, and the answer to each."""

    source: str
    target: str
    source_answer: str
    target_answer: str


@dataclass(frozen=True)
class Job:
    """Subspaces to learn: one for each seed.

    Args:
        task: `capitals` or `objects`.
        layer: `resid` of that layer.
        last: at so many of the last positions, which share the basis; 0 is all.
        rank: how many directions.
        seeds: of the pairs' order and of the first basis.
        everyone: whether the peer's faster variants run too, with the first seed.
    """

    task: str
    layer: int
    last: int = 1
    rank: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    everyone: bool = True

    @property
    def name(self) -> str:
        """As it stands in the tables."""
        where = {0: "all", 1: "last"}.get(self.last, f"last{self.last}")
        return f"{self.task}-L{self.layer}-{where}-rank{self.rank}"


JOBS = (
    Job("capitals", 24),
    Job("capitals", 6),
    Job("capitals", 20, everyone=False),
    Job("objects", 6, last=0, seeds=(0, 1), everyone=False),
    Job("capitals", 24, rank=8, seeds=(0, 1), everyone=False),
    Job("objects", 24, seeds=(0, 1), everyone=False),
    Job("objects", 24, last=0, seeds=(0,), everyone=False),
    Job("objects", 6, seeds=(0,), everyone=False),
)


def texts(task: str, seed: int = 0) -> list[Texts]:
    """Pairs of a task, in an order drawn at random.

    `capitals`: the source prompt asks for what was just said, the target prompt for what is known.
    `objects`: the second person said again is the other one, and so is the one who is left.
    """
    if task == "capitals":
        rows = [
            Texts(
                f"{said} the {story}, the capital of {country} is",
                f"{said} reality, the capital of {country} is",
                f" {other}",
                f" {capital}",
            )
            for country, capital in CAPITALS.items()
            for other in CAPITALS.values()
            if other != capital
            for story in STORIES
            for said in [f"In the {story}, the capital of {country} is {other}. In"]
        ]
    else:
        rows = [
            Texts(scene.format(a=a, b=b, s=b), scene.format(a=a, b=b, s=a), f" {a}", f" {b}")
            for scene in SCENES
            for a in NAMES
            for b in NAMES
            if a != b
        ]
    random.Random(seed).shuffle(rows)
    return rows


@dataclass(frozen=True, eq=False)
class Lesson:
    """One subspace to learn, as a peer is given it.

    Args:
        tokens: by `source` and `target`, `[pairs, seq]`, left-padded to one width.
        masks: the same, 1 for a token.
        answers: the same, `[pairs]`.
        train, held_out, test: numbers of pairs. Those held out choose the epoch; test pairs are
            seen by nobody before the end.
        initial: `[width, rank]`, the first basis.
    """

    layer: int
    last: int
    rank: int
    seed: int
    epochs: int
    batch_size: int
    lr: float
    warmup: float
    tokens: dict[str, Tensor]
    masks: dict[str, Tensor]
    answers: dict[str, Tensor]
    train: Tensor
    held_out: Tensor
    test: Tensor
    initial: Tensor

    @property
    def positions(self) -> list[int]:
        """The positions of the site, counted from the left of the padded prompts."""
        width = self.tokens["target"].shape[1]
        return list(range(width - (self.last or width), width))

    @property
    def steps(self) -> int:
        """The steps of one epoch."""
        return -(-len(self.train) // self.batch_size)

    def orders(self) -> Iterator[list[Tensor]]:
        """Epoch by epoch the mini-batches: numbers of pairs."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = self.train[torch.randperm(len(self.train), generator=generator)]
            yield [some.sort().values for some in torch.split(order, self.batch_size)]

    def rate(self, step: int) -> float:
        """The learning rate of a step: up over the warmup, then down to 0."""
        total = self.epochs * self.steps
        rise = self.warmup * total
        if step + 1 < rise:
            return self.lr * (step + 1) / rise
        return self.lr * min((total - step) / max(total - rise, 1.0), 1.0)


def lesson_from(fields: dict[str, Any]) -> Lesson:
    """A lesson out of its JSON."""
    both = {
        name: {run: torch.tensor(rows) for run, rows in fields[name].items()}
        for name in ("tokens", "masks", "answers")
    }
    parts = {name: torch.tensor(fields[name]) for name in ("train", "held_out", "test", "initial")}
    return Lesson(**{**fields, **both, **parts})


class Laps:
    """CPU seconds of the parts of one learning, from the moment when this is made.

    `before` is all before the first step but the pairs held out, `step` and `held_out` are one
    number each time, `total` is until `stop`. What is only done to compare is `aside`, and in none
    of the others.
    """

    def __init__(self) -> None:
        gc.collect()
        self._begun = time.process_time()
        self.parts: dict[str, Any] = {"before": None, "step": [], "held_out": [], "aside": []}

    @contextmanager
    def lap(self, part: str) -> Iterator[None]:
        """Time what is done inside as a part of that name."""
        begun = time.process_time()
        if part == "step" and self.parts["before"] is None:
            self.parts["before"] = begun - self._begun - sum(self.parts["held_out"]) - self._aside
        yield
        self.parts[part].append(time.process_time() - begun)

    def stop(self) -> None:
        """No more is timed."""
        self.parts["total"] = time.process_time() - self._begun - self._aside

    @property
    def _aside(self) -> float:
        return float(sum(self.parts["aside"]))
