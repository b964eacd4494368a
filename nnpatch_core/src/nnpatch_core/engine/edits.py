"""The edits of a bucket: for each component of each layer, what is put into which rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Component, head_columns
from nnpatch_core.engine.plan import Bucket
from nnpatch_core.engine.rows import Booleans, Stop
from nnpatch_core.site import Location, Site
from nnpatch_core.tracing import Replacement


@attrs.frozen(eq=False)
class Edit:
    """What is put into one activation; each array has one number for a row and position.

    Args:
        row: where the activation is.
        location: the same, as replacements know it.
        rows: `[edits]`, rows of the bucket.
        prompts: `[edits]`, their prompts.
        positions: `[edits]`, positions in the prompt.
        heads: `[edits]`, heads; None is each column of the component.
        site: one of the sites.
    """

    row: Component
    location: Location
    rows: Tensor
    prompts: Tensor
    positions: Tensor
    heads: Tensor | None
    site: Site

    def apply(self, activation: Tensor, start: int, replacement: Replacement, nnmodel: Any) -> None:
        """Put the values into `activation` `[rows, tokens from start, width]`, in place."""
        device = activation.device
        width = activation.shape[-1]
        columns = head_columns(
            self.site.api, module_of(nnmodel), self.site.layer, self.site.component, width
        )
        rows, positions = self.rows.to(device), (self.positions - start).to(device)
        whole = replacement.at(self.location)
        if whole is None:
            values = torch.zeros(len(rows), width, dtype=activation.dtype, device=device)
        else:
            prompts = self.prompts if len(whole) > 1 else torch.zeros_like(self.prompts)
            found = whole[prompts.to(whole.device), self.positions.to(whole.device)]
            values = found.to(device=device, dtype=activation.dtype)
        if columns is None:
            activation[rows, positions] = values
            return
        chosen = columns.flatten()[None] if self.heads is None else columns[self.heads]
        chosen = chosen.to(device).expand(len(rows), -1)
        activation[rows[:, None], positions[:, None], chosen] = values.gather(1, chosen)


#: Stage to the edits there, in the order in which a forward reaches them.
Edits: TypeAlias = Mapping[int, Sequence[Edit]]


def edits_of(bucket: Bucket, stops: Sequence[Sequence[Stop]], real: Booleans) -> Edits:
    """The edits of a bucket's rows.

    Args:
        bucket: the rows; one whose cell is -1 is not edited.
        stops: each cell's sites, by `stops_of`.
        real: `[batch, seq]`: where a prompt can be patched.
    """
    gathered: dict[tuple[Any, ...], tuple[Stop, list[list[int]]]] = {}
    rows = bucket.rows
    places = zip(rows.cell.tolist(), rows.prompt.tolist(), rows.stage.tolist(), strict=True)
    for number, (cell, prompt, stage) in enumerate(places):
        for stop in stops[cell] if cell >= 0 else ():
            # What stands below the row's first change, or left of it, is the target's own.
            if stop.stage < stage:
                continue
            head = stop.site.head
            key = (stop.stage, stop.order, stop.turn, stop.site.component, head is None)
            _, items = gathered.setdefault(key, (stop, [[], [], [], []]))
            for position in stop.group:
                if position >= bucket.start and real[prompt, position]:
                    for item, value in zip(items, (number, prompt, position, head), strict=True):
                        item.append(-1 if value is None else value)
    found: dict[int, list[Edit]] = {}
    for key in sorted(gathered):
        stop, items = gathered[key]
        numbers, prompts, positions, heads = (
            torch.tensor(item, dtype=torch.int64, device="cpu") for item in items
        )
        chosen = None if stop.site.head is None else heads
        edit = Edit(stop.row, stop.location, numbers, prompts, positions, chosen, stop.site)
        found.setdefault(stop.stage, []).append(edit)
    return found
