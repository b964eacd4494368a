"""The estimates of a sweep as they are made: which are there, and which are another's to make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core.results import Baseline
from nnpatch_core.sweep.checkpoint import Checkpoint
from nnpatch_core.sweep.parts import Parts
from nnpatch_core.sweep.share import ShareMeasured
from nnpatch_core.sweep.tally import Tally


@attrs.frozen(eq=False)
class Ledger:
    """The estimates that are made so far, and those that are to be made here.

    Args:
        parts: what the estimate is made up of.
        chunks: the prompts that run together.
        tally: of its rows: by how much each metric changes, which rows are made, and what is known
            of these without a run.
        left: `[chunks, parts]`: what is to be made here, and is not made yet.
        others: the same, what other shares make.
        checkpoint: where it is kept.
    """

    parts: Parts
    chunks: Sequence[slice]
    tally: Tally
    left: Booleans
    others: Booleans
    checkpoint: Checkpoint | None

    @classmethod
    def of(
        cls,
        parts: Parts,
        chunks: Sequence[slice],
        metrics: Iterable[str],
        checkpoint: Checkpoint | None,
    ) -> Ledger:
        """Nothing is made but what a checkpoint has.

        Args:
            parts: what the estimate is made up of.
            chunks: the prompts that run together.
            metrics: the names of the metrics.
            checkpoint: where it is kept, opened.

        Raises:
            CheckpointError: its file does not have what is estimated.
        """
        left = np.zeros((len(chunks), len(parts.work)), dtype=np.bool_)
        others = np.zeros_like(left)
        tally = Tally.of_estimates(metrics, len(parts.owner), chunks[-1].stop)
        if checkpoint is not None:
            checkpoint.restore(tally)
            if checkpoint.share is not None:
                share = checkpoint.share
                others = parts.shared_out(chunks, share.count) != share.number - 1
        for number, chunk in enumerate(chunks):
            done = tally.done[:, chunk].all(1).numpy()
            left[number, parts.owner[~done]] = True
        return cls(parts, chunks, tally, left & ~others, others, checkpoint)

    def to_make(self, chunk: int, some: Sequence[int]) -> list[int]:
        """Which of some parts are to be made here, in a chunk by its number."""
        return [part for part in some if self.left[chunk, part]]

    def note(
        self,
        chunk: int,
        parts: Sequence[int],
        changes: Mapping[str, Tensor],
        elided: Tensor,
        unread: Tensor,
    ) -> None:
        """Some parts of a chunk are made.

        Args:
            chunk: its number.
            parts: which.
            changes: for each metric `[rows, prompts]`, of which theirs are taken.
            elided: `[cells, prompts]`, bool: what is the unpatched run itself.
            unread: the same, where nothing that the answer depends on reads what is put.
        """
        rows = torch.from_numpy(self.parts.rows(parts).nonzero()[0])
        prompts, tally = self.chunks[chunk], self.tally
        for name, change in changes.items():
            tally.values[name][rows, prompts] = change[rows]
        # There may be several rows of each cell.
        cells = rows % len(elided)
        tally.elided[rows, prompts], tally.unread[rows, prompts] = elided[cells], unread[cells]
        tally.done[rows, prompts] = True
        self.left[chunk, parts] = False
        if self.checkpoint is not None:
            self.checkpoint.save(tally)
            self.checkpoint.tell(self._known)

    def close(self) -> None:
        """All that is to be made here is made.

        Raises:
            ShareMeasured: that is a share, and kept.
            CheckpointError: it cannot be.
        """
        if self.checkpoint is None:
            return
        if self.checkpoint.share is None:
            self.checkpoint.save(self.tally, at_once=True)
            return
        self.checkpoint.finish(self.tally)
        count, others = int(self.tally.done.sum()), self.others[:, self.parts.there]
        told = f"{count} estimates are made"
        if others.all():
            parts = f"{others.size} part{'s' * (others.size != 1)}"
            told = (
                f"it has nothing to do: the estimate has {parts} that can be made apart, and other "
                "shards have all of them"
            )
        raise ShareMeasured(count, told)

    def total(
        self,
        baseline: Mapping[str, Baseline],
        folded: Callable[[Tensor], Tensor] = lambda rows: rows,
    ) -> Tally:
        """All estimates, as an outcome has them.

        Args:
            baseline: the metrics of the unpatched runs.
            folded: makes `[cells, batch]` of the rows, where each cell has several.
        """
        first = next(iter(self.tally.values.values()))
        cells = len(folded(first))
        tally = Tally.empty(cells, baseline)
        tally.elided[:], tally.unread[:] = self.tally.elided[:cells], self.tally.unread[:cells]
        zero = tally.known
        values = {
            name: value.double() + torch.where(zero, 0.0, folded(self.tally.values[name]))
            for name, value in tally.values.items()
        }
        tally.note("gradient", None)
        return attrs.evolve(tally, values=values)

    @property
    def _known(self) -> float:
        """The share of all work that is done, or another's."""
        costs = self.parts.costs(self.chunks)
        return 1 - float(costs[self.left].sum()) / float(costs.sum())
