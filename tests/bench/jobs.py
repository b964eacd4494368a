"""What is measured: grids of cells, and what such a grid must cost at least.

The standard library alone, for this is imported where a peer lives, which need not have more.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

#: Groups of components that are swept together.
GROUPS = {
    "resid": ("resid",),
    "blocks": ("attn", "mlp"),
    "heads": ("q", "k", "v", "o"),
    "stream": ("resid", "attn", "mlp"),
    "o": ("o",),
}
#: How many of the last positions are swept, one by one; None is all of them.
POSITIONS = {"last": 1, "last10": 10, "each": None}
#: The model by default; `subject.load` knows it.
SMOLLM2 = "smollm2"
#: Tokens of the prompts in the tables.
LENGTHS = (32, 64)


class Cell(NamedTuple):
    """One run of a sweep: one component at one position, of one head where there are heads."""

    component: str
    layer: int
    position: int
    head: int | None


class Shape(NamedTuple):
    """The numbers of a model that decide which cells there are."""

    n_layers: int
    n_heads: int
    n_kv_heads: int

    def heads(self, component: str) -> Sequence[int | None]:
        """Each head of a component, or one None where it has none."""
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads, "o": self.n_heads}
        return range(counts[component]) if component in counts else [None]


@dataclass(frozen=True)
class Job:
    """One sweep.

    Args:
        positions: one of `POSITIONS`.
        group: one of `GROUPS`.
        length: tokens of each prompt.
        layers: how many of the last layers are swept; None is all.
        prompts: how many pairs of prompts.
    """

    positions: str
    group: str
    length: int
    layers: int | None = None
    prompts: int = 1

    @property
    def name(self) -> str:
        """Such as `each-heads-32`; the charts' jobs have layers and prompts in theirs."""
        parts = [self.positions, self.group, str(self.length)]
        parts += [] if self.layers is None else [f"{self.layers}layers"]
        parts += [] if self.prompts == 1 else [f"{self.prompts}prompts"]
        return "-".join(parts)

    @property
    def components(self) -> tuple[str, ...]:
        """What is swept."""
        return GROUPS[self.group]

    @property
    def divergence(self) -> int:
        """Where source and target differ: in this one token."""
        return self.length // 4

    def swept_layers(self, shape: Shape) -> range:
        """The layers of the sweep."""
        return range(shape.n_layers - (self.layers or shape.n_layers), shape.n_layers)

    def swept_positions(self) -> range:
        """The positions of the sweep."""
        return range(self.length - (POSITIONS[self.positions] or self.length), self.length)

    def cells(self, shape: Shape) -> list[Cell]:
        """Every cell, component by component and from the first layer up."""
        return [
            Cell(component, layer, position, head)
            for component in self.components
            for layer in self.swept_layers(shape)
            for position in self.swept_positions()
            for head in shape.heads(component)
        ]

    def token_layers(self, shape: Shape) -> int:
        """How often the sweep must at least take one token through one layer.

        A patch reaches its own position and those to the right, in its own layer (unless it
        replaces what that layer gives) and those above. Left of where the prompts differ both runs
        are the same, so nothing need run there.
        """
        return self.prompts * sum(
            (self.length - cell.position)
            * (shape.n_layers - cell.layer - (cell.component == "resid"))
            for cell in self.cells(shape)
            if cell.position >= self.divergence
        )

    def recorded_token_layers(self, shape: Shape) -> int:
        """The same for the two runs that are recorded: source and target, whole."""
        return 2 * self.prompts * self.length * shape.n_layers

    def sample(self, shape: Shape, count: int, seed: int) -> list[Cell]:
        """Some cells, at random, one out of each of `count` equal strips of the grid."""
        cells = self.cells(shape)
        if len(cells) <= count:
            return cells
        draw = random.Random(f"{seed} {self.name}")
        edges = [strip * len(cells) // count for strip in range(count + 1)]
        return [cells[draw.randrange(low, high)] for low, high in pairwise(edges)]


def job_from(fields: dict[str, Any]) -> Job:
    """What `dataclasses.asdict` took apart, as JSON brings it back."""
    return Job(**fields)


def job_named(name: str) -> Job | None:
    """The job of a name such as `each-resid-200`, of whatever length; None if there is none."""
    found = re.fullmatch(rf"({'|'.join(POSITIONS)})-({'|'.join(GROUPS)})-([1-9]\d*)", name)
    return Job(found[1], found[2], int(found[3])) if found else None


def table_jobs() -> list[Job]:
    """The rows of the tables: every position of every group, and two sweeps that many make."""
    grid = [
        Job(positions, group, length)
        for length in LENGTHS
        for group in ("resid", "blocks", "heads")
        for positions in POSITIONS
    ]
    # The longest last: what was measured before is kept if it is broken off.
    most = Job("each", "heads", max(LENGTHS))
    grid.remove(most)
    shortest = min(LENGTHS)
    return [Job("last", "stream", shortest), Job("each", "o", shortest), *grid, most]


#: The three series of the scaling chart: what is varied, and its jobs. Each is small enough to
#: be run in a minute, and large enough for its cells to be what it costs.
SCALING = {
    "tokens in the prompt": [
        (length, Job("each", "resid", length, layers=5)) for length in (16, 32, 64, 128, 256)
    ],
    "layers swept, from the last down": [
        (layers, Job("each", "resid", 32, layers=layers)) for layers in (5, 10, 20, 30)
    ],
    "pairs of prompts": [
        (prompts, Job("each", "resid", 32, layers=10, prompts=prompts)) for prompts in (1, 2, 4, 8)
    ],
}
#: What the memory chart sweeps: all of its rows at once would take gigabytes.
MEMORY_JOB = Job("each", "resid", 32, layers=10, prompts=8)
#: In bytes; None is whatever the engine takes when it is not told.
BUDGETS = (None, *(2**power for power in (24, 25, 26, 27, 28, 29)))
