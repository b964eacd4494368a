"""The loss of a patched run, and whether it gives the answer that was called for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax


def answer_losses(logits: Tensor, answers: Tensor) -> Tensor:
    """`[rows]`: -log p of the answers `[rows]`, over the whole vocabulary of `[rows, vocab]`."""
    return cross_entropy(logits, answers.to(logits.device), reduction="none")


def rest_losses(logits: Tensor, unpatched: Tensor, answers: tuple[Tensor, Tensor]) -> Tensor:
    """`[rows]`: how far the rest of the next token's distribution has moved, in nats.

    It is the Kullback-Leibler divergence from the target run to the patched run, of the tokens
    other than the two answers.

    Args:
        logits: `[rows, vocab]`, patched.
        unpatched: the same of the target run.
        answers: `[rows]`, those of the source and of the target prompt.
    """
    unpatched = unpatched.to(logits)
    both = torch.stack([each.to(logits.device) for each in answers], 1)
    before, after = (
        log_softmax(each.scatter(1, both, -torch.inf), -1) for each in (unpatched, logits)
    )
    # Of what has no probability in either there is nothing to add up.
    before, after = (each.scatter(1, both, 0.0) for each in (before, after))
    terms = kl_div(after, before, reduction="none", log_target=True)
    return terms.scatter(1, both, 0.0).sum(-1)
