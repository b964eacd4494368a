"""The tally of a sweep: all that it has measured so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import attrs
import torch
from torch import Tensor

from nnpatch_core.results import Baseline


@attrs.frozen(eq=False)
class Tally:
    """All that a sweep has measured so far; it is filled as the sweep goes on.

    Args:
        values: metric to `[cells, batch]`; where nothing was run, the unpatched run's.
        done: `[cells, batch]`, bool: what was run, and measured by every metric.
        elided: `[cells, batch]`, bool: what is the unpatched run itself, and need not be run.
        unread: `[cells, batch]`, bool: where nothing that the answer depends on reads what is put.
        engines: the engines that ran, in order.
        fallbacks: why others than the one that was wanted.
        groups: which cells ran one after the other, if not all together.
        estimated: whether values are what gradients tell, by how much each metric changes, in
            float64; `elided` and `unread` are known where that is done.
    """

    values: Mapping[str, Tensor]
    done: Tensor
    elided: Tensor
    unread: Tensor
    engines: list[str] = attrs.field(factory=list)
    fallbacks: list[str] = attrs.field(factory=list)
    groups: list[slice] = attrs.field(factory=list)
    estimated: bool = False

    @classmethod
    def empty(cls, cells: int, baseline: Mapping[str, Baseline]) -> Tally:
        """Nothing was run yet."""
        values = {name: runs.target.repeat(cells, 1) for name, runs in baseline.items()}
        nothing = torch.zeros_like(next(iter(values.values())), dtype=torch.bool)
        return cls(values, nothing, nothing.clone(), nothing.clone())

    @classmethod
    def of_estimates(cls, metrics: Iterable[str], rows: int, batch: int) -> Tally:
        """Nothing was estimated yet."""
        numbers = torch.zeros(rows, batch, dtype=torch.float64, device="cpu")
        nothing = torch.zeros(rows, batch, dtype=torch.bool, device="cpu")
        values = {name: numbers.clone() for name in metrics}
        return cls(values, nothing, nothing.clone(), nothing.clone(), estimated=True)

    @property
    def known(self) -> Tensor:
        """`[cells, batch]`, bool: what is known to change no answer, without a run."""
        return self.elided | self.unread

    def note(self, engine: str, fallback: str | None) -> None:
        """Note which engine ran, and why, each once."""
        if engine not in self.engines:
            self.engines.append(engine)
        if fallback is not None and fallback not in self.fallbacks:
            self.fallbacks.append(fallback)
