"""Control rows: unpatched runs among the patched ones, which must come out as the target run did.

A model, or a hook on it, may treat a row by its number, or a pass by its tokens, in a way of its
own. So they stand where nothing else is special: not all in the first row, nor of the prompt that
has the same number there as in the target run.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._rounding import rounding
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.engine.cone.patched_runs import PatchedRuns
from nnpatch_core.engine.cone.plan import Plan
from nnpatch_core.engine.cone.target import TargetRun
from nnpatch_core.errors import EngineError


@attrs.frozen(eq=False)
class Controls:
    """The control rows of a bucket.

    Args:
        runs: the rows, by the stage at which they enter; their cell is -1.
        before: `[controls]`, which of the bucket's rows each stands before.
    """

    runs: PatchedRuns
    before: Integers

    def __len__(self) -> int:
        return len(self.runs)

    def within(self, runs: PatchedRuns) -> tuple[PatchedRuns, Booleans]:
        """The bucket's rows with these among them, and `[rows]`, bool: which are these."""
        both = runs.then(self.runs)
        places = np.concatenate([np.arange(len(runs)), self.before - 0.5])
        order = np.argsort(places, kind="stable")
        return both.take(order), order >= len(runs)


def controls_of(plan: Plan, number: int, bucket: Bucket, lengths: Integers) -> Controls | None:
    """The control rows of a bucket; None where it needs none.

    The first bucket has one of every prompt, since a model may treat any of them in a way of its
    own: the first row is one, of the last prompt, one is the last of all, of the first prompt, and
    the others stand amid those that enter lowest. A pass of a single token has as many, as they
    cost nearly nothing. Of every other number of tokens one bucket has one, of the prompt with
    most padding, which begins as low as any row.

    Args:
        plan: the sweep's plan.
        number: the bucket's number in it.
        bucket: the bucket.
        lengths: `[batch]`, the tokens of each prompt.
    """
    if number not in plan.controlled:
        return None
    stage, cell = bucket.runs.stage, bucket.runs.cell
    lowest = int(np.searchsorted(stage, stage[0], side="right"))
    shortest, last = int(lengths.argmin()), len(lengths) - 1
    amid = (lowest + 1) // 2
    if number != min(plan.controlled) and bucket.start < plan.seq_len - 1:
        places, prompts = [amid], [shortest]
    else:
        others = range(last)
        places = [0, *(amid for _ in others or (0,)), len(cell)]
        prompts = [last, *(others or (0,)), 0]
    before = np.array(places)
    entering = stage[np.clip(before, 0, len(cell) - 1)]
    # Amid the lowest stage there may be no row after it.
    entering = np.where(before <= lowest, stage[0], entering)
    none, numbers = np.full(len(before), -1), np.array(prompts)
    return Controls(PatchedRuns(none, numbers, np.full_like(none, bucket.start), entering), before)


def check_unpatched(
    target: TargetRun,
    runs: PatchedRuns,
    logits: Tensor,
    ids: Tensor | None,
    weight: Tensor,
) -> None:
    """Raise `EngineError` unless the logits of unpatched rows are those of the target run.

    Args:
        target: the recorded target run.
        runs: the rows.
        logits: `[rows, ids]` or `[rows, places, ids]`, of these.
        ids: which ids of the vocabulary they are of; None is all.
        weight: one of the model's, by which it is known how it rounds.
    """
    whole = target.logits[torch.from_numpy(runs.prompt)]
    if target.batch.read is not None:
        read = target.batch.read.shape[1]
        nothing = whole.isnan() & logits.isnan() if ids is None else whole.isnan()
        # Logits have none but at padding; an activation is not as wide as the vocabulary.
        padding = target.batch.read_padding[torch.from_numpy(runs.prompt), :, None]
        nothing[:, :read] = padding
        whole = whole.masked_fill(nothing, 0.0)
        if ids is not None:
            nothing = nothing[..., ids]
        logits = logits.masked_fill(nothing, 0.0)
    expected = whole if ids is None else whole[..., ids]
    largest = whole.abs().flatten(1).amax(1)
    allowed = rounding(weight) * largest
    gaps = (logits - expected).abs().flatten(1).amax(1)
    wrong = ~(gaps <= allowed)
    if wrong.any():
        worst = int(gaps.nan_to_num(torch.inf).where(wrong, -1.0).argmax())
        raise EngineError(
            "run from the middle of a prompt, the model gives other logits than run as a "
            f"whole: off by {float(gaps[worst]):.3g}, where rounding explains "
            f"{float(allowed[worst]):.3g}"
        )
