"""Prompts of one template, told from those of another by their words."""

from __future__ import annotations

import torch
from torch import Tensor

#: Prompts of one template agree in at least this share of their words.
_ALIKE = 0.5
#: How many templates are told apart.
MOST = 10


def templates_of(tokens: Tensor, fixed: Tensor) -> list[int]:
    """The first prompt of each template, as far as words tell: of the first few templates.

    Args:
        tokens: `[batch, seq]`, token ids.
        fixed: `[batch, seq]`, bool: those that a pair is not about.

    Examples:
        >>> tokens = torch.tensor([[5, 6, 7], [5, 6, 8], [9, 4, 3]])
        >>> templates_of(tokens, torch.ones(3, 3, dtype=torch.bool))
        [0, 2]
    """
    firsts: list[int] = []
    left = torch.arange(len(tokens), device="cpu")
    while len(left) and len(firsts) < MOST:
        first = left[0]
        firsts.append(int(first))
        both = fixed[first] & fixed[left]
        same = both & (tokens[first] == tokens[left])
        # Where no word can be compared, nothing tells that they differ.
        left = left[same.sum(1) < _ALIKE * both.sum(1)]
    return firsts
