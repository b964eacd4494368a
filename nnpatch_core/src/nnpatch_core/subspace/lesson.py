"""A lesson: one basis after another is learned from the same pairs, in the same way."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core.spaces import Space, Subspace
from nnpatch_core.subspace.checkpoint import TrainingFile
from nnpatch_core.subspace.controls import Control
from nnpatch_core.subspace.interchange import Interchange
from nnpatch_core.subspace.learning import Epoch, Learner, State, begin, tops_of
from nnpatch_core.subspace.options import Split, Training
from nnpatch_core.subspace.proportion import Proportion


@attrs.frozen(eq=False)
class Lesson:
    """How bases are learned.

    Args:
        training: the options.
        split: which pairs they are learned from.
        start: where learning begins; None is at random.
        file: where its state is kept; None is nowhere.
        bar: counts the steps.
    """

    training: Training
    split: Split
    start: Subspace | None
    file: TrainingFile | None
    bar: Any

    def learn(self, name: str, interchange: Interchange, answers: Tensor) -> Learned:
        """Learn a basis.

        Args:
            name: what it is called, in the bar and in the file.
            interchange: the pairs.
            answers: `[pairs]`, the tokens that patched runs are to give.
        """
        training = self.training
        start = self.start
        if start is None:
            start = Subspace.random(interchange.width, training.rank, training.seed)
        state = begin(interchange.like(start.basis), training)
        if self.file is not None:
            self.file.restore(name, state)
        begun = self.bar.n
        self.bar.set_description_str(f"learning {name}", refresh=False)
        learner = Learner(interchange, answers, self.split, training, self._tick(begun))
        if state.history:
            self.bar.n = begun + state.history[-1].steps
        learner.run(state, self._keep(name))
        best = Subspace(orthonormal(state.best))
        measured = self.measured(interchange, best, answers)
        return Learned(best.basis, tuple(state.history), measured, interchange.named)

    def measured(
        self, interchange: Interchange, space: Space, answers: Tensor
    ) -> tuple[Proportion, Proportion]:
        """On the pairs held out: how many give the answers, and how many the target answers."""
        held = self.split.held_out
        tops = tops_of(interchange, held, space)
        target = interchange.runs.target_answers.cpu()
        return Proportion.of(tops == answers[held]), Proportion.of(tops == target[held])

    def _tick(self, begun: int) -> Any:
        def tick(steps: int, loss: float, accuracy: float) -> None:
            self.bar.set_postfix_str(f"loss {loss:.3f}, accuracy {accuracy:.2f}", refresh=False)
            self.bar.update(begun + steps - self.bar.n)

        return tick

    def _keep(self, name: str) -> Any:
        def keep(state: State) -> None:
            if self.file is not None:
                self.file.save(name, state)

        return keep


@attrs.frozen(eq=False)
class Learned:
    """A basis that was learned.

    Args:
        basis: `[width, rank]`.
        history: the epochs.
        measured: on the pairs held out, the shares of its own answers, and of target answers.
        site: where, as the user named it.
    """

    basis: Tensor
    history: tuple[Epoch, ...]
    measured: tuple[Proportion, Proportion]
    site: Any

    def control(self, answers: dict[int, int] | None) -> Control:
        """The same as a control, learned for these answers."""
        accuracy, target = self.measured
        return Control(Subspace(self.basis, site=self.site), accuracy, target, answers)


def orthonormal(basis: Tensor) -> Tensor:
    """`[width, rank]` on the CPU, without the rounding that many reflections leave."""
    kind = torch.promote_types(basis.dtype, torch.float32)
    own = basis.detach().to("cpu", torch.float64)
    # The nearest orthonormal basis, by the polar decomposition.
    left, _, right = torch.linalg.svd(own, full_matrices=False)
    found: Tensor = (left @ right).to(kind)
    return found
