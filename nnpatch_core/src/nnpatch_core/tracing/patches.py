"""The cells of a sweep, found in a model: which places they patch, which heads and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor, nn

from nnpatch_core._models import module_of
from nnpatch_core.adapters import ModelAPI, Place, in_order
from nnpatch_core.seq_pos import NONE, Positions, are_per_prompt, spread
from nnpatch_core.spaces import Limit
from nnpatch_core.tracing.cells import Cell, Cells


def _cells(cells: Iterable[Cell]) -> Cells:
    return Cells.of(cells)


@attrs.frozen(eq=False)
class Patches:
    """All cells of a sweep.

    Args:
        nnmodel: the model, wrapped by nnsight.
        cells: what is patched, each cell alone.
        common: `[batch, seq]`, bool, where both runs of a prompt have a token; None is nowhere.
    """

    nnmodel: Any
    cells: Cells = attrs.field(converter=_cells)
    common: Tensor | None = None

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Each place that some cell patches, in the order in which a forward reaches them."""
        return in_order({self.cells.places[number]: None for number in self.cells.used("place")})

    @cached_property
    def positions(self) -> tuple[Positions, ...]:
        """Each of the positions that some site has, once."""
        return tuple(self.cells.positions[number] for number in self.cells.used("positions"))

    @cached_property
    def first(self) -> int:
        """The leftmost position that some cell patches; left of it all is the target run's."""
        return min((_first(each.at) for each in self.positions), default=0)

    @cached_property
    def first_taken(self) -> int:
        """The leftmost position of the source run of which some cell has a value."""
        taken = (each.source for each in self.positions if each.source is not None)
        return min([self.first, *map(_first, taken)])

    @property
    def shifted(self) -> bool:
        """Whether some site takes its values from other positions than it has."""
        return any(positions.source is not None for positions in self.positions)

    @cached_property
    def alignments(self) -> tuple[Positions | None, ...]:
        """All positions, in as few parts as can be so that each token has one source in a part.

        None is the part of those that take each value from the token's own position.
        """
        return tuple(dict.fromkeys(self._aligned.values()))

    def alignment(self, positions: Positions) -> Positions | None:
        """Which of `alignments` the positions of a site are in."""
        return self._aligned[id(positions)]

    @cached_property
    def _aligned(self) -> dict[int, Positions | None]:
        """By the positions' identity."""
        shifted = [each for each in self.positions if each.source is not None]
        parts: list[Tensor] = []
        part_of: dict[int, int] = {}
        seq_len = 1 + max((int(each.at.max()) for each in shifted), default=0)
        for each in shifted:
            sources = spread(each.at, seq_len, each.source)
            # The first part that has no other source for one of these tokens.
            number = next(
                (n for n, part in enumerate(parts) if not _conflict(part, sources)), len(parts)
            )
            if number == len(parts):
                parts.append(sources)
            else:
                parts[number] = torch.where(sources == NONE, parts[number], sources)
            part_of[id(each)] = number
        whole = [_whole(part) for part in parts]
        return {
            id(each): whole[part_of[id(each)]] if id(each) in part_of else None
            for each in self.positions
        }

    @cached_property
    def apart(self) -> Mapping[Positions, Positions | None]:
        """For each positions their alignment alone: elsewhere each token's own position.

        So it does not depend on what else is swept. None is each token's own position everywhere.
        """
        return {each: self._alone(each) for each in self.positions}

    def _alone(self, positions: Positions) -> Positions | None:
        if positions.source is None:
            return None
        seq_len = 1 + max(int(positions.at.max()), int(positions.source.max()))
        if self.common is not None:
            seq_len = self.common.shape[1]
        own = spread(positions.at, seq_len, positions.source)
        if self.common is not None:
            elsewhere = torch.arange(seq_len, device="cpu").expand_as(self.common)
            own = torch.where((own == NONE) & self.common, elsewhere, own)
        return _whole(own)

    @cached_property
    def put_at(self) -> Mapping[Place, tuple[tuple[Positions | None, Limit | None], ...]]:
        """For each place the alignments of the sites there, and to what each is limited."""
        found: dict[Place, dict[tuple[Positions | None, Limit | None], None]] = {}
        cells = self.cells
        # By number, of which there are far fewer than cells.
        columns = cells.sites.place, cells.sites.positions, cells.sites.space, cells.sites.head >= 0
        rows, first = np.unique(np.stack(columns, 1), axis=0, return_index=True)
        for place, at, space, head in rows[np.argsort(first)].tolist():
            key = self._aligned[id(cells.positions[at])], cells.limits[space][head]
            found.setdefault(cells.places[place], {})[key] = None
        return {place: tuple(each) for place, each in found.items()}

    @property
    def by_prompt(self) -> bool:
        """Whether some site has positions of each prompt."""
        return any(len(positions.at) > 1 for positions in self.positions)

    @property
    def named_by_prompt(self) -> bool:
        """Whether the user named positions of each prompt, of which there may be one."""
        if self.by_prompt:
            return True
        # Cells at one of the positions name them in one way.
        _, first = np.unique(self.cells.sites.positions, return_index=True)
        cells = self.cells.cell_of_sites()[first].tolist()
        sites = (site for cell in cells for site in self.cells.named[cell].sites)
        return any(are_per_prompt(site.seq_pos) for site in sites)

    def rows(self, rows: slice | Tensor) -> Patches:
        """The same cells in some of the prompts."""
        if not self.by_prompt:
            return self
        common = None if self.common is None else self.common[rows]
        some = self.moved({id(each): each.rows(rows) for each in self.positions})
        return attrs.evolve(some, common=common)

    def moved(self, positions: Mapping[int, Positions]) -> Patches:
        """The same cells at other positions, given by the identity of their own."""
        return attrs.evolve(self, cells=self.cells.moved(positions))

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return module_of(self.nnmodel)

    @property
    def adapters(self) -> list[ModelAPI]:
        """The adapters of the sites, each once."""
        return list({id(place.api): place.api for place in self.places}.values())

    @property
    def layers(self) -> str:
        """Dotted path of the model's list of layers, by the first adapter."""
        return self.places[0].api.layers

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return self.places[0].n_layers


def _first(positions: Tensor) -> int:
    """The leftmost of some positions, of which -1 is none; 0 where there are none."""
    real = positions[positions != NONE]
    return int(real.min()) if real.numel() else 0


def _conflict(part: Tensor, sources: Tensor) -> bool:
    """Whether a token has two sources; one row stands for all prompts."""
    return bool(((part != sources) & (part != NONE) & (sources != NONE)).any())


def _whole(part: Tensor) -> Positions:
    """`[batch, seq]` of sources as positions."""
    groups = [tuple(row.nonzero().flatten().tolist()) for row in part != NONE]
    sources = [tuple(row[row != NONE].tolist()) for row in part]
    return Positions.of(groups, sources)
