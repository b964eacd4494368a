"""Distributed alignment search: a basis is learned by patching it, step by step.

Geiger, Wu, Potts, Icard & Goodman, "Finding Alignments Between Interpretable Causal Variables and
Distributed Neural Representations" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core.errors import SubspaceError
from nnpatch_core.spaces import Space
from nnpatch_core.subspace.basis import Basis
from nnpatch_core.subspace.interchange import Interchange
from nnpatch_core.subspace.losses import answer_losses, rest_losses
from nnpatch_core.subspace.options import Split, Training


@attrs.frozen
class Epoch:
    """One pass over the pairs that are learned from.

    Args:
        epoch: its number; 0 is before anything is learned.
        steps: how many steps there were up to its end.
        loss: the mean loss of the pairs as they were learned from, in nats; nan in epoch 0.
        accuracy: the interchange accuracy of these as they were learned from; nan in epoch 0.
        held_out_loss: the mean loss of the pairs held out, at its end.
        held_out_accuracy: their interchange accuracy.
        lr: the learning rate at its end.
    """

    epoch: int
    steps: int
    loss: float
    accuracy: float
    held_out_loss: float
    held_out_accuracy: float
    lr: float


@attrs.define(eq=False)
class State:
    """How far learning has come.

    Args:
        basis: what is learned.
        optimizer: moves it.
        generator: draws the order of the pairs.
        history: the epochs so far.
        best: `[width, rank]`, the basis of the best epoch so far.
    """

    basis: Basis
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    history: list[Epoch]
    best: Tensor

    @property
    def best_epoch(self) -> Epoch:
        """The epoch with the lowest loss held out; of equals the first."""
        return min(self.history, key=lambda each: each.held_out_loss)

    def is_over(self, training: Training) -> bool:
        """Whether all epochs were run, or the last ones have gained nothing."""
        if not self.history:
            return False
        last = self.history[-1].epoch
        waited = last - self.best_epoch.epoch
        return last >= training.epochs or (
            training.patience is not None and waited >= training.patience
        )


def begin(initial: Tensor, training: Training) -> State:
    """Learning that has not begun.

    Args:
        initial: `[width, rank]`, orthonormal, where the activations are.
        training: how it is learned.
    """
    basis = Basis(initial)
    optimizer = torch.optim.AdamW(
        [basis.parameter], lr=training.lr, weight_decay=training.weight_decay
    )
    generator = torch.Generator().manual_seed(training.seed)
    return State(basis, optimizer, generator, [], initial.clone())


class Learner:
    """Learns one basis.

    Args:
        interchange: the pairs.
        answers: `[pairs]`, the tokens that patched runs are to give.
        split: which pairs are learned from.
        training: how.
        tick: called after each step with the number of steps, and the last loss and accuracy.
    """

    def __init__(
        self,
        interchange: Interchange,
        answers: Tensor,
        split: Split,
        training: Training,
        tick: Callable[[int, float, float], None],
    ) -> None:
        self.interchange = interchange
        self.answers = answers.cpu()
        self.split = split
        self.training = training
        self.tick = tick
        self._at_once = interchange.at_once(True, training.batch_size)

    @property
    def steps(self) -> int:
        """The steps of one epoch."""
        return -(-len(self.split.train) // self.training.batch_size)

    def run(self, state: State, kept: Callable[[State], None]) -> None:
        """Learn until all epochs were run, or nothing is gained any more.

        Args:
            state: how far it has come.
            kept: called after each epoch.

        Raises:
            SubspaceError: the loss, of these pairs or of those held out, is not finite.
        """
        if not state.history:
            self._note(state, 0, torch.nan, torch.nan)
            kept(state)
        while not state.is_over(self.training):
            loss, accuracy = self._epoch(state)
            self._note(state, state.history[-1].epoch + 1, loss, accuracy)
            kept(state)

    def _epoch(self, state: State) -> tuple[float, float]:
        """Every pair once; the mean loss, and the accuracy, as they were learned from."""
        training, pairs = self.training, self.split.train
        order = pairs[torch.randperm(len(pairs), generator=state.generator, device="cpu")]
        done = (state.history[-1].epoch) * self.steps
        losses, hits = 0.0, 0
        for number, some in enumerate(torch.split(order, training.batch_size)):
            for group in state.optimizer.param_groups:
                group["lr"] = self.rate(done + number)
            loss, right = self.step(state, some.sort().values)
            losses, hits = losses + loss * len(some), hits + right
            self.tick(done + number + 1, loss, right / len(some))
        return losses / len(pairs), hits / len(pairs)

    def rate(self, step: int) -> float:
        """The learning rate of a step: up over the warmup, then down to 0, along straight lines."""
        total = self.training.epochs * self.steps
        rise = self.training.warmup * total
        share = (
            (step + 1) / max(rise, 1.0)
            if step + 1 < rise
            else (total - step) / max(total - rise, 1.0)
        )
        return self.training.lr * min(share, 1.0)

    def step(self, state: State, pairs: Tensor) -> tuple[float, int]:
        """One step of the optimiser; the mean loss before it, and how many pairs were right.

        Raises:
            SubspaceError: the loss is not finite, so that the step is not made.
        """
        loss, gradient, right = self.gradient(state.basis, pairs)
        if not (torch.isfinite(loss) and torch.isfinite(gradient).all()):
            raise _not_finite(state.history[-1].epoch + 1, float(loss))
        state.basis.parameter.grad = gradient
        # The optimiser makes tensors of its own, on the default device.
        with torch.device("cpu"):
            state.optimizer.step()
        state.basis.parameter.grad = None
        return float(loss), right

    def gradient(self, basis: Basis, pairs: Tensor) -> tuple[Tensor, Tensor, int]:
        """The mean loss of some pairs, its gradient `[width, rank]`, and how many are right."""
        parameter = basis.parameter
        total = torch.zeros_like(parameter)
        loss = torch.zeros((), dtype=torch.float64, device="cpu")
        right = 0
        for some in torch.split(pairs, self._at_once):
            with torch.enable_grad():
                logits = self.interchange.logits(some, basis.now(), gradients=True)
                each = self.losses(logits, some).sum() / len(pairs)
                (own,) = torch.autograd.grad(each, [parameter])
            total += own
            loss += each.detach().cpu().double()
            right += int((logits.detach().argmax(-1).cpu() == self.answers[some]).sum())
        return loss, total, right

    def losses(self, logits: Tensor, pairs: Tensor) -> Tensor:
        """`[pairs]`: the loss of each, of patched runs' logits `[pairs, vocab]`."""
        losses = answer_losses(logits, self.answers[pairs])
        if not self.training.kl:
            return losses
        unpatched, runs = self.interchange.unpatched, self.interchange.runs
        assert unpatched is not None
        both = self.answers[pairs], runs.target_answers.cpu()[pairs]
        return losses + self.training.kl * rest_losses(logits, unpatched[pairs], both)

    def _note(self, state: State, epoch: int, loss: float, accuracy: float) -> None:
        held = self.split.held_out
        with torch.no_grad():
            space = state.basis.now()
            losses, tops = self.measure(space, held)
        right = float((tops == self.answers[held]).double().mean())
        steps, rate = epoch * self.steps, self.rate(max(epoch * self.steps - 1, 0))
        mean = float(losses.mean())
        if not math.isfinite(mean):
            raise _not_finite(epoch, mean)
        better = not state.history or mean < state.best_epoch.held_out_loss
        state.history.append(Epoch(epoch, steps, loss, accuracy, mean, right, rate))
        if better:
            state.best = space.basis.detach().clone()

    def measure(self, space: Space | None, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and most likely tokens, of patched runs, `[pairs]` each, on the CPU."""
        losses, tops = [], []
        for some in torch.split(pairs, self._at_once):
            logits = self.interchange.logits(some, space)
            losses.append(self.losses(logits, some).cpu().double())
            tops.append(logits.argmax(-1).cpu())
        return torch.cat(losses), torch.cat(tops)


def _not_finite(epoch: int, loss: float) -> SubspaceError:
    return SubspaceError(
        f"the loss is {loss:g} in epoch {epoch}, or its gradient is not finite: the model gives "
        "logits that are not finite, or kl= is too large"
    )


def tops_of(interchange: Interchange, pairs: Tensor, space: Any) -> Tensor:
    """The most likely tokens of patched runs of some pairs, `[pairs]`, on the CPU."""
    at_once = interchange.at_once(False, len(pairs))
    parts = [
        interchange.logits(some, space).argmax(-1).cpu() for some in torch.split(pairs, at_once)
    ]
    return torch.cat(parts)
