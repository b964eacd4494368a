"""Prompts that are run in pieces, as they are too long to be run at once."""

from __future__ import annotations

from itertools import pairwise

import attrs

from nnpatch_core.memory.costs import Costs

#: Of so many tokens, cut as evenly as can be, no piece has less than two: a piece is held to its
#: halves.
_LEAST = 3


@attrs.frozen
class Beginning:
    """The first tokens of prompts, which may run before the others do.

    Args:
        until: the position that they are left of; 0 if all tokens run at once.
        reason: why they do, for who has no room for it.
    """

    until: int = 0
    reason: str | None = None


@attrs.frozen
class Pieces:
    """How the tokens of prompts are run one after another, left of the first that matters.

    Args:
        until: the first position of the last piece, in which all is that is recorded or read.
        tokens: how many tokens left of it are run together, at most.

    Examples:
        >>> Pieces(until=10, tokens=4).edges
        [(0, 3), (3, 6), (6, 10)]
        >>> print(Pieces(until=10, tokens=4))
        3 pieces of 4 tokens, and a last one from token 10 on
    """

    until: int
    tokens: int

    def __str__(self) -> str:
        count = len(self.edges)
        longest = max(end - start for start, end in self.edges)
        pieces = "a piece" if count == 1 else f"{count} pieces"
        return f"{pieces} of {longest} tokens, and a last one from token {self.until} on"

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pieces before the last one, each from one position up to another."""
        # As even as can be, so that none is short.
        count = -(-self.until // self.tokens)
        return list(pairwise(self.until * part // count for part in range(count + 1)))


def pieces_of(until: int, seq_len: int, costs: Costs, left: int) -> Pieces:
    """The fewest pieces that fit, if any do; pieces shorter than the last one gain nothing.

    None is longer than half of the prompt: the first is held to its halves, and the keys and values
    of both are then there at once, where there is room for those of a prompt.

    Args:
        until: the first position of the last piece.
        seq_len: tokens per prompt.
        costs: what running tokens costs.
        left: bytes for them.
    """
    fitting = max(costs.tokens_within(left, seq_len), seq_len - until, _LEAST)
    return Pieces(until, min(until, fitting, max(seq_len // 2, _LEAST)))
