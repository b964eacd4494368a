"""The edits of a bucket: for each component of each layer, what is put into which runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core.adapters import Place
from nnpatch_core.engine.cone.buckets import Bucket
from nnpatch_core.spaces import Space
from nnpatch_core.tracing import BoundSite, Cell, Intervention, PatchedTokens, put


@attrs.frozen(eq=False)
class Edit:
    """The tokens of a bucket's runs that are patched in one activation.

    Args:
        place: where the activation is.
        tokens: the tokens.
        heads: `[tokens]`, the head at each; None is each column of the component.
        space: the part of these columns that is patched; None is all of them.
    """

    place: Place
    tokens: PatchedTokens
    heads: Tensor | None
    space: Space | None

    def apply(self, activation: Tensor, start: int, intervention: Intervention) -> None:
        """Patch `activation` `[rows, tokens from start, width]`, in place."""
        columns = self.place.columns(activation.shape[-1])
        if columns is not None:
            columns = columns.flatten()[None] if self.heads is None else columns[self.heads]
        put(
            activation,
            self.place,
            self.tokens,
            intervention,
            start=start,
            columns=columns,
            space=self.space,
        )


#: Stage to the edits there, in the order in which a forward reaches them.
Edits: TypeAlias = Mapping[int, Sequence[Edit]]


def edits_of(bucket: Bucket, cells: Sequence[Cell], real: Booleans) -> Edits:
    """The edits of a bucket's runs.

    Args:
        bucket: the runs; one whose cell is -1 is not edited.
        cells: all cells of the sweep.
        real: `[batch, seq]`: where a prompt can be patched.
    """
    gathered: dict[
        tuple[int, int, int, str, bool, int], tuple[BoundSite, list[tuple[int, ...]]]
    ] = {}
    spaces: dict[int, int] = {}
    runs = bucket.runs
    numbered = zip(runs.cell.tolist(), runs.prompt.tolist(), runs.stage.tolist(), strict=True)
    for row, (cell, prompt, stage) in enumerate(numbered):
        sites = cells[cell].sites if cell >= 0 else ()
        for number, site in enumerate(sites):
            place = site.place
            # Below the run's first change, or left of it, all is the target's own.
            if place.stage < stage:
                continue
            # Sites of a cell at one activation are put there one after the other.
            turn = sum(before.place.location == place.location for before in sites[:number])
            space = spaces.setdefault(id(site.space), len(spaces))
            key = (place.stage, place.order, turn, place.name, site.head is None, space)
            _, items = gathered.setdefault(key, (site, []))
            head = -1 if site.head is None else site.head
            at = site.positions
            items += [
                (row, cell, prompt, position, source, head)
                for position, source in zip(at.group(prompt), at.sources_of(prompt), strict=True)
                if position >= bucket.start and real[prompt, position]
            ]
    edits: dict[int, list[Edit]] = {}
    for key in sorted(gathered):
        site, items = gathered[key]
        numbers = torch.tensor(items, dtype=torch.int64, device="cpu").reshape(-1, 6)
        *tokens, heads = numbers.T.contiguous()
        whole = None if site.head is None else heads
        edit = Edit(site.place, PatchedTokens(*tokens), whole, site.space)
        edits.setdefault(site.place.stage, []).append(edit)
    return edits
