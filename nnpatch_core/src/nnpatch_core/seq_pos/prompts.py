"""A batch of prompts as position strategies and sites see it: lengths, and spans by name."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.errors import PositionError


@attrs.frozen(eq=False)
class Span:
    """One named part of each prompt, as tokens of the left-padded batch.

    Args:
        source: `[batch, 2]`, int64: its first token and the one behind its last, in each source
            prompt; -1 where a prompt lacks it.
        target: the same of the target prompts.

    Examples:
        >>> import torch
        >>> span = Span(source=torch.tensor([[2, 4]]), target=torch.tensor([[3, 4]]))
        >>> span.swapped().source
        tensor([[3, 4]])
    """

    source: Tensor
    target: Tensor

    def swapped(self) -> Span:
        """Source and target exchanged."""
        return Span(self.target, self.source)

    def moved(self, by: int) -> Span:
        """The same tokens in a batch that is padded by so many more on the left."""
        sides = (torch.where(ends < 0, ends, ends + by) for ends in (self.source, self.target))
        return Span(*sides)

    def rows(self, index: Tensor) -> Span:
        """Those of some prompts."""
        return Span(self.source[index], self.target[index])


@attrs.frozen(eq=False)
class PromptBatch:
    """The prompts of a sweep, left-padded to one width.

    Args:
        target: the prompts that are patched.
        source: those that values come from; None of an ablation.
        spans: parts of the prompts, by name.
    """

    target: Batch
    source: Batch | None = None
    spans: Mapping[str, Span] = attrs.field(factory=dict)

    def __len__(self) -> int:
        return len(self.target)

    @property
    def seq_len(self) -> int:
        """Tokens per prompt, padding included."""
        return self.target.seq_len

    def padding_error(self, prompt: int, position: int, batch: Batch, what: str) -> PositionError:
        """The error for a position that is padding in a prompt.

        Args:
            prompt: its number.
            position: from 0.
            batch: one of the two.
            what: the argument that names the position.
        """
        count = int(batch.mask[prompt].sum())
        return PositionError(
            f"{what}: position {position} is padding in prompt {prompt}, whose {count} tokens are "
            f"{batch.seq_len - count} to {batch.seq_len - 1} of the left-padded batch, or "
            f"-{count} to -1"
        )
