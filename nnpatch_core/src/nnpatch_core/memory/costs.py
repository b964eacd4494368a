"""How much memory and time a patched run costs, in a few numbers."""

from __future__ import annotations

import attrs


@attrs.frozen
class Costs:
    """The costs of a patched run, as far as the planner must know.

    Args:
        token: bytes that a layer needs for each token of a row while it runs.
        context: bytes that a layer needs for each token that a row attends to.
        score: bytes that a layer needs for each token of a row and token that it attends to.
        row: bytes that a row needs at the head.
        overhead: what a layer costs besides its tokens, in tokens: reading its weights.
        tokens_at_once: how many tokens are worth running together; more gain nothing.
    """

    token: int
    context: int
    score: int
    row: int
    overhead: float = 16.0
    tokens_at_once: int = 8192

    def bytes_of(self, tokens: int, seq_len: int) -> int:
        """Bytes that a row of `tokens` tokens needs while it runs."""
        return tokens * (self.token + seq_len * self.score) + seq_len * self.context + self.row

    def tokens_within(self, left: int, seq_len: int) -> int:
        """How many tokens of a row fit into so many bytes; below 1 if none do."""
        return (left - seq_len * self.context - self.row) // (self.token + seq_len * self.score)


def in_units(count: int) -> str:
    """A number of bytes as people read it.

    Examples:
        >>> in_units(3 * 2**20)
        '3.0 MiB'
    """
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
