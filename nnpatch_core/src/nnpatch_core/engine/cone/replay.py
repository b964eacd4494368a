"""One cell patched over and over, in the cone engine: what the patch cannot reach is kept."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Integers
from nnpatch_core._host_memory import joined
from nnpatch_core._upstream import KeysValues
from nnpatch_core.batch import Batch
from nnpatch_core.engine.cone.ascent import Ascent
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.engine.cone.controls import check_unpatched
from nnpatch_core.engine.cone.patched_runs import NEVER, PatchedRuns, first_layer
from nnpatch_core.engine.cone.readback import joined_pairs
from nnpatch_core.engine.cone.target import TargetRun, record_target
from nnpatch_core.engine.cone.unembedding import find_unembedding
from nnpatch_core.engine.replay import ValuesOf, last_logits, within
from nnpatch_core.errors import EngineError
from nnpatch_core.spaces import Space
from nnpatch_core.tracing import Intervention, Patches

#: How many unpatched runs are compared with the target run.
_CONTROLS = 4


@attrs.frozen(eq=False)
class ConeReplay:
    """Each time the layers above the site, from the first token that the patch changes on.

    Args:
        patches: the cell, which has one site.
        target: the recorded target run of all prompts.
        intervention: what is put there.
        starts: `[prompts]`, the first position of each at which the patch changes anything.
    """

    patches: Patches
    target: TargetRun
    intervention: Intervention
    starts: Integers
    name: str = attrs.field(default="cone", init=False)

    def logits(self, prompts: Tensor, space: Space | None, *, gradients: bool = False) -> Tensor:
        """See `Replay.logits`."""
        return self._run(prompts.numpy(), within(self.patches, space), 0, gradients)

    def _run(
        self, prompts: Integers, patches: Patches, cell: int, gradients: bool = False
    ) -> Tensor:
        stage = patches.cells[0].sites[0].place.stage
        starts = self.starts[prompts]
        runs = PatchedRuns(
            np.full_like(prompts, cell), prompts, starts, np.full_like(prompts, stage)
        )
        bucket = Bucket(int(starts.min()), runs, 0, len(runs))
        unembedding = find_unembedding(patches.model)
        ascent = Ascent(patches, self.intervention, self.target, unembedding, bucket, None)
        return ascent.run(last_logits(), gradients=gradients)

    def check(self) -> None:
        """Raise `EngineError` unless unpatched runs come out as the target run did."""
        # Of those that begin furthest left and right.
        order = np.argsort(self.starts, kind="stable")
        half = _CONTROLS // 2
        some = np.unique(np.concatenate([order[:half], order[-half:]]))
        try:
            logits = self._run(some, self.patches, -1).to("cpu", torch.float32)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise EngineError(
                "the model does not run from the middle of a prompt: "
                f"{type(error).__name__}: {error}"
            ) from error
        none = np.zeros_like(some)
        runs = PatchedRuns(none - 1, some, none, none)
        weight = next(self.patches.model.parameters())
        check_unpatched(self.target, runs, logits, None, weight)


def open_cone_replay(
    patches: Patches,
    target: Batch,
    values: ValuesOf,
    chunks: Sequence[slice],
    store: torch.device | None,
) -> tuple[ConeReplay, Tensor]:
    """Record `target`, and keep what runs that are patched at the one site of a cell need.

    Args:
        patches: the cell.
        target: the prompts.
        values: what is put there.
        chunks: the prompts that run together.
        store: where what is kept lies; None is where it was computed.

    Returns:
        The replay, and the logits `[prompts, vocab]` of the unpatched runs, which it does not keep.

    Raises:
        EngineError: the model cannot be recorded, or run from the middle of a prompt.
    """
    # Later it is patched within one space or another, so that any change counts.
    whole = within(patches, None)
    (site,) = whole.cells[0].sites
    lowest = int(first_layer(np.array([site.place.stage]))[0])
    parts, begins = [], []
    for chunk in chunks:
        numbers = torch.arange(chunk.start, chunk.stop, device="cpu")
        own = whole.rows(numbers)
        run = record_target(own, target.rows(chunk), values(numbers), store, whole.first)
        kept = [None if layer < lowest else pair for layer, pair in enumerate(run.kept)]
        parts.append(attrs.evolve(run, kept=kept))
        begins.append(_starts(run, own))
    starts = np.concatenate(begins)
    most = int(starts.max())
    everyone = torch.arange(len(target), device="cpu")
    replay = ConeReplay(patches, _joined(parts, target, most), values(everyone), starts)
    replay.check()
    logits = replay.target.logits
    none = logits[:0].clone()
    return attrs.evolve(replay, target=attrs.evolve(replay.target, logits=none)), logits


def _joined(parts: Sequence[TargetRun], target: Batch, most: int) -> TargetRun:
    """The recorded runs of several chunks as one, with keys and values of the first tokens."""
    first = parts[0]

    def layers(name: str) -> dict[int, Tensor]:
        return {
            layer: joined([getattr(part, name)[layer] for part in parts])
            for layer in getattr(first, name)
        }

    kept: list[KeysValues] = []
    for pairs in zip(*(part.kept for part in parts), strict=True):
        some = [pair for pair in pairs if pair is not None]
        kept.append(joined_pairs(some, most) if some else None)
    return attrs.evolve(
        first,
        batch=target,
        logits=torch.cat([part.logits for part in parts]),
        inputs=layers("inputs"),
        outputs=layers("outputs"),
        kept=kept,
    )


def _starts(run: TargetRun, patches: Patches) -> Integers:
    """`[prompts]`: the first position of each at which the patch changes anything.

    Left of it source and target run are the same. Where nothing changes it is the last one.
    """
    (site,) = patches.cells[0].sites
    at = site.positions.at.expand(len(run.batch), -1).numpy()
    found = run.changed.starts(patches.cells, 0)[0]
    starts: Integers = np.where(found < NEVER, found, np.maximum(at.max(1), 0)).astype(np.int64)
    return starts
