"""Pairs of prompts of several lengths, for edges: left-padded for nnpatch, bare for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core import edge_patching
from tests.helpers.edge_oracle import EdgeOracle, Value

Prompt = tuple[int, ...]


@attrs.frozen(eq=False)
class Pairs:
    """Source and target prompts, and for each its answer."""

    sources: Sequence[Prompt]
    targets: Sequence[Prompt]
    answers: tuple[Sequence[int], Sequence[int]]

    @property
    def width(self) -> int:
        return max(map(len, [*self.sources, *self.targets]))

    def arguments(self) -> dict[str, Any]:
        """As `edge_patching` takes them."""
        found: dict[str, Any] = {}
        for name, prompts in (("source", self.sources), ("target", self.targets)):
            spare = [self.width - len(each) for each in prompts]
            found[f"{name}_tokens"] = torch.tensor(
                [[0] * none + [*each] for none, each in zip(spare, prompts, strict=True)]
            )
            found[f"{name}_attention_mask"] = torch.tensor(
                [[0] * none + [1] * (self.width - none) for none in spare]
            )
        right, wrong = map(torch.tensor, self.answers)
        return {**found, "source_answer_index": right, "target_answer_index": wrong}

    def some(self, *rows: int) -> Pairs:
        """Some of them."""
        right, wrong = ([each[row] for row in rows] for each in self.answers)
        sources, targets = ([each[row] for row in rows] for each in (self.sources, self.targets))
        return Pairs(sources, targets, (right, wrong))

    def difference(self, logits: Tensor, row: int) -> float:
        """The default metric, of `[vocab]`."""
        right, wrong = (each[row] for each in self.answers)
        return float(logits[right] - logits[wrong])


#: The first is as long in both runs; of the others one run's is longer.
UNEVEN = Pairs(
    [(5, 6, 7, 8, 9, 24), (8, 27, 6), (9, 4, 3, 12, 3, 5, 6)],
    [(5, 9, 7, 8, 9, 4), (9, 8, 7, 16, 1), (9, 4, 13, 12, 6)],
    ((1, 2, 3), (5, 6, 7)),
)
#: All as long in both runs.
EVEN = Pairs(
    [(5, 6, 7, 8, 9, 24), (9, 27, 6, 4), (9, 4, 3, 12, 3)],
    [(5, 9, 7, 8, 9, 4), (9, 7, 16, 4), (9, 4, 13, 12, 6)],
    ((1, 2, 3), (5, 6, 7)),
)


def patched(model: Any, pairs: Pairs, api: Any = None, **options: Any) -> Any:
    """The edges of a model in these pairs."""
    return edge_patching(model, api, **{**pairs.arguments(), "progress": False, **options})


def raw(edges: Any, metric: str | None = None) -> Tensor:
    """`[cells, batch]`, the metric of each patched run."""
    metric = edges.outcome.metric if metric is None else metric
    return edges.outcome.raw[metric]["edge"].double()


def numbers(edges: Any, metric: str | None = None) -> dict[Any, Tensor]:
    """By edge, or by edge and the place of its positions: the metric of each prompt."""
    cells = edges.outcome.cells["edge"].index.tolist()
    senders, receivers = edges.nodes.sender_names, edges.nodes.receiver_names
    found: dict[Any, Tensor] = {}
    for (sender, receiver, *place), value in zip(cells, raw(edges, metric), strict=True):
        edge = f"{senders[sender]}->{receivers[receiver]}"
        found[(edge, *place) if place else edge] = value
    return found


def from_oracle(
    oracle: EdgeOracle,
    pairs: Pairs,
    edge: str,
    row: int,
    positions: Sequence[int] | None = None,
    value: Value = "source",
) -> float:
    """What the metric of an edge is in one pair, positions counted from the end."""
    source, target = tuple(pairs.sources[row]), tuple(pairs.targets[row])
    logits = oracle.edge(source, target, *edge.split("->"), positions=positions, value=value)
    return pairs.difference(logits, row)


def means(oracle: EdgeOracle, prompts: Sequence[Prompt]) -> Callable[[Any], Tensor]:
    """For a sender its mean over all tokens."""
    return lambda node: torch.cat([oracle._value(tuple(each), node) for each in prompts]).mean(
        0, keepdim=True
    )


def means_by_place(
    oracle: EdgeOracle, prompts: Sequence[Prompt], length: int
) -> Callable[[Any], Tensor]:
    """For a sender its mean at each place from the end, for a prompt of a length."""

    def of(node: Any) -> Tensor:
        rows = []
        for back in range(length, 0, -1):
            values = [oracle._value(tuple(each), node) for each in prompts if len(each) >= back]
            rows.append(torch.stack([value[-back] for value in values]).mean(0))
        return torch.stack(rows)

    return of
