"""The outcome of a sweep over edges: a mapping from an edge's name to its value."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._printable import shown
from nnpatch_core.edges.nodes import ARROW, Nodes
from nnpatch_core.edges.sites import EDGE
from nnpatch_core.errors import EdgeError, OutcomeError
from nnpatch_core.report import Facts, Reports, Study
from nnpatch_core.results import (
    Agreement,
    Baseline,
    Interval,
    Outcome,
    Top,
    facts_of,
    study_of,
)

if TYPE_CHECKING:
    import pandas

#: Under this name an outcome's `info` has the nodes of its model.
NODES = "nodes"


@attrs.frozen(eq=False, repr=False)
class EdgeOutcome(Reports, Mapping[str, Any]):
    """The outcome of a sweep over edges: a mapping from `"a0.h1->m3"` to its value.

    A value is (mean patched - mean target) / (mean source - mean target), as of any cell; where
    positions were changed one by one it is a tensor, one number for each. All that an `Outcome`
    tells of its cells, `outcome` tells of these: its one name is `"edge"`, and its axes are sender
    and receiver.

    Args:
        outcome: the outcome as any sweep has it.
        nodes: the nodes of the model.

    Examples:
        >>> import torch
        >>> from nnpatch_core import edge_patching
        >>> from nnpatch_core.testing import tiny_model
        >>> source, target = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9, 7]])
        >>> edges = edge_patching(
        ...     tiny_model(), None, source, target, torch.tensor([1]), torch.tensor([2]),
        ...     progress=False,
        ... )
        >>> edges
        EdgeOutcome(edge, logit_difference: 190 edges, all measured)
        >>> round(edges["m1->logits"], 3) == round(edges.matrix[10, -1].item(), 3)
        True
    """

    outcome: Outcome
    nodes: Nodes

    @classmethod
    def of(cls, outcome: Outcome, nodes: Nodes) -> EdgeOutcome:
        """The outcome of a sweep over the edges between some nodes."""
        layers = [list(nodes.query), list(nodes.key_value), list(map(int, nodes.parallel))]
        info = {**outcome.info, NODES: json.dumps(layers)}
        return cls(attrs.evolve(outcome, info=info), nodes)

    def __getitem__(self, edge: str) -> Any:
        sender, receiver = self.nodes.place(edge)
        if not bool(self._swept[sender, receiver].any()):
            raise EdgeError(f"edge {shown(edge)} was not swept")
        values = self._matrix[sender, receiver]
        return values.clone() if values.ndim else values.item()

    def __iter__(self) -> Iterator[str]:
        senders, receivers = self.nodes.sender_names, self.nodes.receiver_names
        pairs = dict.fromkeys(map(tuple, self.outcome.cells[EDGE].index[:, :2].tolist()))
        for sender, receiver in pairs:
            yield f"{senders[sender]}{ARROW}{receivers[receiver]}"

    def __len__(self) -> int:
        cells = self.outcome.cells[EDGE].index
        return len(torch.unique(cells[:, :2], dim=0))

    def __contains__(self, edge: object) -> bool:
        try:
            sender, receiver = self.nodes.place(edge)
        except EdgeError:
            return False
        return bool(self._swept[sender, receiver].any())

    def __repr__(self) -> str:
        exact = self.outcome.cells[EDGE].exact
        count = int(exact.sum())
        told = "all measured" if count == len(exact) else f"{count:,} measured"
        # An edge has a cell for each group of positions.
        size = f"{len(self):,} edges" + (f", {len(exact):,} cells" * (len(exact) > len(self)))
        return f"EdgeOutcome({self.outcome.kind}, {self.outcome.metric}: {size}, {told})"

    def _repr_html_(self) -> str:
        return self.top(10)._repr_html_()

    @property
    def matrix(self) -> Tensor:
        """`[senders, receivers]`, and positions if they were changed one by one.

        nan where there is no edge, or none was swept.
        """
        return self._matrix.clone()

    @cached_property
    def _swept(self) -> Tensor:
        return self.outcome.swept(EDGE)

    @cached_property
    def _matrix(self) -> Tensor:
        # Once, as a mapping is asked for each of its values.
        return self.outcome[EDGE].masked_fill(~self._swept, torch.nan)

    @property
    def exact(self) -> Tensor:
        """Which edges were measured, bool, of the shape of `matrix`; the others are estimates."""
        return self.outcome.exact(EDGE)

    @property
    def per_prompt(self) -> Tensor:
        """The value of each prompt, `[senders, receivers, ..., batch]`; see `Outcome`."""
        return self.outcome.per_prompt(EDGE)

    @property
    def baseline(self) -> Baseline:
        """The metric of the unpatched runs."""
        return self.outcome.baseline

    @property
    def info(self) -> Mapping[str, str]:
        """Where the numbers come from, in words."""
        return self.outcome.info

    def interval(self, level: float = 0.95, seed: int = 0) -> Interval:
        """The interval of each edge over prompts, of the shape of `matrix`."""
        return self.outcome.interval(EDGE, level=level, seed=seed)

    def top(self, n: int = 20, *, level: float = 0.95) -> Top:
        """The strongest edges as a table that says how sure each is, and which are estimates."""
        return self.outcome.top(n, distinct=False, level=level)

    def agreement(self, exact: EdgeOutcome, top_k: int = 20) -> Agreement:
        """How well these values, as estimates, tell those that were measured.

        Raises:
            OutcomeError: they are of other edges.
        """
        if not isinstance(exact, EdgeOutcome):
            raise OutcomeError(f"exact must be the outcome of edge_patching, got {shown(exact)}")
        return self.outcome.agreement(exact.outcome, top_k)

    def for_metric(self, metric: str) -> EdgeOutcome:
        """The same edges, seen through another of the metrics."""
        return attrs.evolve(self, outcome=self.outcome.for_metric(metric))

    def to_dataframe(self) -> pandas.DataFrame:
        """A frame with a row for each edge that was swept, or for each of its positions.

        Raises:
            OutcomeError: pandas is not installed.
        """
        frame = self.outcome.to_dataframe()
        return frame[self._swept.flatten().tolist()].reset_index(drop=True)

    def _study(self, level: float) -> Study:
        # Of thousands of edges the strongest alone can be seen.
        return study_of(self.outcome, level=level, distinct=False, kind="bars", mark=0)

    def _report_facts(self, width: float, level: float) -> Facts:
        return facts_of(self.outcome, width, level, distinct=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one file, which `EdgeOutcome.load` reads."""
        self.outcome.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EdgeOutcome:
        """Read what `save` has written.

        Raises:
            OutcomeError: the file is damaged, or holds no edges.
        """
        outcome, nodes = Outcome.load(path), None
        # What a file says of nodes counts if its tensor is of these nodes.
        axes = outcome.axes(EDGE)[:2] if EDGE in outcome else ()
        labels = [each.labels for each in axes]
        with contextlib.suppress(KeyError, ValueError, TypeError, RecursionError):
            query, key_value, parallel = json.loads(outcome.info[NODES])
            if sum(query) < len(labels[0]):
                nodes = Nodes(query, key_value, map(bool, parallel))
        if nodes is None or labels != [nodes.sender_names, nodes.receiver_names]:
            raise OutcomeError(f"{os.fspath(path)} holds no edges of a model")
        return cls(outcome, nodes)
