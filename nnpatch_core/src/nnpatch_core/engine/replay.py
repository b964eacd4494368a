"""One cell that is patched over and over, each time into some of the prompts, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs
import torch
from torch import Tensor

from nnpatch_core.batch import Batch
from nnpatch_core.engine.full import patching
from nnpatch_core.spaces import Space
from nnpatch_core.tracing import Caught, Cell, Intervention, Kept, Patches, forward

#: For `[rows]`, the numbers of some prompts: what is put there, its rows being those.
ValuesOf = Callable[[Tensor], Intervention]


class Replay(Protocol):
    """The target runs of some prompts, into which one cell is patched again and again."""

    @property
    def name(self) -> str:
        """The engine's name."""
        ...

    def logits(self, prompts: Tensor, space: Space | None, *, gradients: bool = False) -> Tensor:
        """The logits at the last token of patched runs, `[rows, vocab]`.

        They are in float32 at least, and lie where the model gives them.

        Args:
            prompts: `[rows]`, int64 on the CPU: the numbers of the prompts, each once.
            space: the part of the activation that is patched; None is all of it.
            gradients: whether they have their graph.
        """
        ...


def last_logits() -> Kept:
    """The logits at the last token, in float32 at least, with their graph, where they are."""

    def of(logits: Tensor, _: Caught) -> Tensor:
        return logits[:, -1].to(torch.promote_types(logits.dtype, torch.float32))

    return Kept(1, of)


def within(patches: Patches, space: Space | None) -> Patches:
    """The same cell, whose only site is limited to a space."""
    (cell,) = patches.cells
    (site,) = cell.sites
    limited = Cell((attrs.evolve(site, space=space),), cell.named)
    return attrs.evolve(patches, cells=(limited,))


@attrs.frozen(eq=False)
class FullReplay:
    """Each time a whole forward.

    Args:
        patches: the cell.
        target: the prompts.
        values: what is put there.
    """

    patches: Patches
    target: Batch
    values: ValuesOf
    name: str = attrs.field(default="full", init=False)

    def logits(self, prompts: Tensor, space: Space | None, *, gradients: bool = False) -> Tensor:
        """See `Replay.logits`."""
        some = self.target.rows(prompts.to(self.target.tokens.device))
        patches = within(self.patches, space).rows(prompts)
        visit = patching(patches, 0, some, self.values(prompts))
        nnmodel = patches.nnmodel
        return forward(nnmodel, some, visit, gradients=gradients, kept=last_logits())


def open_full_replay(
    patches: Patches,
    target: Batch,
    values: ValuesOf,
    chunks: Sequence[slice],
    store: torch.device | None = None,
) -> tuple[FullReplay, None]:
    """A replay that keeps nothing, and no logits; arguments are those of every engine."""
    return FullReplay(patches, target, values), None
