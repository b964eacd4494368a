"""Metrics of many kinds, each of which a checkpoint must know again in another process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from nnpatch_core import MetricContext, reads_tokens

WEIGHTS = torch.tensor([1.0, 2.0])
SCALE = 3.0
#: Of the order of a set nothing may depend, and it differs with the seed of hashes.
NAMES = {"alpha", "beta", "gamma", "delta", "epsilon"}


def helper(value: torch.Tensor) -> torch.Tensor:
    return value * SCALE


def plain(logits: Tensor, context: MetricContext | type[Any]) -> torch.Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


def by_global(logits: Tensor) -> torch.Tensor:
    return logits[:, 0] * SCALE


def by_helper(logits: Tensor) -> torch.Tensor:
    return helper(logits[:, 0])


def by_tensor(logits: Tensor) -> Tensor:
    return logits[:, :2] @ WEIGHTS


def by_set(logits: Tensor) -> Tensor:
    return logits[:, len(NAMES)] if "alpha" in {"x", "y", "alpha", "zeta"} else logits[:, 0]


def with_default(logits: Tensor, *, column: Any = 0) -> torch.Tensor:
    return logits[:, column]


def closing_over(value: Any) -> Callable[[Tensor], Tensor]:
    def metric(logits: Tensor) -> Tensor:
        return (lambda column: logits[:, column] * value)(0)

    return metric


@reads_tokens(lambda context: context.source_answer_index[:, None])
def declared(logits: Tensor, context: Any) -> Tensor:
    return logits.gather(1, context.source_answer_index[:, None])[:, 0]


@torch.no_grad()
def decorated(logits: Tensor) -> Tensor:
    return logits[:, 0]


@functools.wraps(plain)
def wrapped(*arguments: Any) -> Any:
    return plain(*arguments)


class Scaled:
    factor = 1.0

    def __init__(self, by: float, names: Any = ()) -> None:
        self.by, self.names = by, list(names)

    def __call__(self, logits: Tensor) -> Tensor:
        return self.part(logits) * self.by * self.factor

    def part(self, logits: Tensor) -> Tensor:
        return logits[:, 0]


@attrs.frozen(eq=False)
class Slotted:
    weights: torch.Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return logits[:, :2] @ self.weights


class Probe(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear, self.by = nn.Linear(2, 1), by
        with torch.no_grad():
            self.linear.weight[:] = torch.tensor([[0.5, 0.25]])
            self.linear.bias.zero_()

    def forward(self, logits: Tensor) -> Tensor:
        return self.linear(logits[:, :2])[:, 0] * self.by


def recursive(depth: Any) -> Any:
    return recursive(depth - 1) if depth else 0


METRICS = {
    "plain": plain,
    "by_global": by_global,
    "by_helper": by_helper,
    "by_tensor": by_tensor,
    "by_set": by_set,
    "with_default": with_default,
    "closure": closing_over(2.0),
    "declared": declared,
    "decorated": decorated,
    "wrapped": wrapped,
    "instance": Scaled(2.0, ["a"]),
    "method": Scaled(2.0).part,
    "slotted": Slotted(torch.tensor([1.0, 2.0])),
    "module": Probe(1.5),
    "partial": functools.partial(with_default, column=1),
    "numpy": functools.partial(with_default, column=np.int64(1)),
    "recursive": recursive,
    "class": Scaled,
    "lambda": lambda logits: torch.nn.functional.softmax(logits, -1)[:, 0],
}
