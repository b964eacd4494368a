"""Control rows: unpatched runs among the patched ones, which must come out as the target run did.

A model, or a hook on it, may treat a row by its number, or a pass by its tokens, in a way of its
own. So they stand where nothing else is special: not all in the first row, nor of the prompt that
has the same number there as in the target run.
"""

from __future__ import annotations

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.engine.cone.patched_runs import PatchedRuns
from nnpatch_core.engine.cone.plan import Bucket, Plan


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
