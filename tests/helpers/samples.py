"""Prompts for tests that are about something else: tokens of both runs, and answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sample(NamedTuple):
    """`[batch, seq]` twice, and for each prompt the answer of its source and of its target."""

    source: Tensor
    target: Tensor
    answers: tuple[Tensor, Tensor]


def sample(
    source: list[list[int]], target: list[list[int]], answers: list[int], others: list[int]
) -> Sample:
    return Sample(
        torch.tensor(source), torch.tensor(target), (torch.tensor(answers), torch.tensor(others))
    )


#: One pair, which differs in one token.
ONE = sample([[5, 6, 7, 8]], [[5, 9, 7, 8]], [1], [4])
#: One longer pair, which differs in two tokens, and answers that it does not have.
LONGER = sample([[5, 6, 7, 8, 9, 10]], [[5, 16, 7, 18, 9, 10]], [20], [30])
#: Two pairs, which part at different tokens.
TWO = sample([[5, 6, 7, 8], [5, 6, 7, 4]], [[5, 9, 7, 8], [5, 6, 3, 4]], [1, 2], [4, 5])
#: Three longer pairs, which part at different tokens, all of them after the first.
THREE = sample(
    [[5, 6, 7, 8, 9, 4], [5, 6, 7, 8, 9, 4], [9, 8, 7, 6, 5, 4]],
    [[5, 9, 7, 8, 9, 4], [5, 6, 7, 3, 9, 4], [9, 8, 7, 6, 4, 4]],
    [1, 2, 3],
    [4, 5, 6],
)
