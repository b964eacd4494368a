"""Prompts that run in several versions, each with another answer appended, become one again."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from torch import Tensor

from nnpatch_core.metrics import Metric, Reading, answers_followed
from nnpatch_core.results import Baseline
from nnpatch_core.sweep.sweep import Sweep
from nnpatch_core.sweep.tally import Tally


@attrs.frozen(eq=False)
class Versions:
    """The versions of a sweep's prompts.

    Args:
        names: of the answers that are appended, in order; nothing where none is.
        metrics: by name.
    """

    names: tuple[str, ...]
    metrics: Mapping[str, Metric]

    @classmethod
    def of(cls, sweep: Sweep, reading: Reading | None) -> Versions:
        """Those of a sweep, by what its metrics read."""
        return cls(() if reading is None else reading.versions, sweep.metrics)

    def joined(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each metric's `[..., versions * batch]` as `[..., batch]`."""
        if len(self.names) < 2:
            return dict(values)
        found = {}
        for name, value in values.items():
            parts = dict(zip(self.names, value.chunk(len(self.names), -1), strict=True))
            own = answers_followed(self.metrics[name]) or self.names[:1]
            found[name] = parts[own[0]] if len(own) == 1 else parts[own[0]] - parts[own[1]]
        return found

    def baselines(self, baseline: Mapping[str, Baseline]) -> dict[str, Baseline]:
        """Those of the prompts, each once."""
        source = self.joined({name: each.source for name, each in baseline.items()})
        target = self.joined({name: each.target for name, each in baseline.items()})
        return {name: Baseline(source[name], target[name]) for name in baseline}

    def tally(self, tally: Tally) -> Tally:
        """That of the prompts, each once."""
        if len(self.names) < 2:
            return tally
        every = {
            name: getattr(tally, name).view(len(tally.done), len(self.names), -1).all(1)
            for name in ("done", "elided", "unread")
        }
        return attrs.evolve(tally, values=self.joined(tally.values), **every)

    def sweep(self, sweep: Sweep) -> Sweep:
        """That of the prompts, each once, for labels."""
        if len(self.names) < 2:
            return sweep
        once = slice(0, sweep.batch // len(self.names))
        return attrs.evolve(sweep.rows(once), target=sweep.target.rows(once))

    def mask(self, mask: Tensor) -> Tensor:
        """`[batch, seq]` of the prompts, each once."""
        return mask[: len(mask) // max(len(self.names), 1)]
