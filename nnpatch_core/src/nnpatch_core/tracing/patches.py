"""The cells of a sweep, found in a model: which places they patch, which heads and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import module_of
from nnpatch_core.adapters import ModelAPI, Place, in_order
from nnpatch_core.seq_pos import NONE, Positions, are_per_prompt, spread
from nnpatch_core.spaces import Limit, Space


def columns_of(place: Place, head: int | None, width: int) -> Tensor | None:
    """`[columns]` of a head, or of the component if `head` is None; None is all of them."""
    columns = place.columns(width)
    if columns is None:
        return None
    return (columns if head is None else columns[head]).flatten()


@attrs.frozen(eq=False)
class BoundSite:
    """A site found in a model, for prompts of one width.

    Args:
        place: where the whole activation is.
        head: one head, or None for the whole component.
        positions: the token positions.
        space: the part of the activation that is patched; None is all of it.
    """

    place: Place
    head: int | None
    positions: Positions
    space: Space | None = None

    @property
    def limit(self) -> Limit | None:
        """To which part of the activation it is limited."""
        return None if self.space is None else Limit(self.space, self.head is not None)

    def columns(self, width: int) -> Tensor | None:
        """`[columns]` of its head or of its component; None is all of the activation."""
        return columns_of(self.place, self.head, width)


@attrs.frozen(eq=False)
class Cell:
    """The sites that one forward patches together, in the order in which it reaches them.

    Args:
        sites: the sites.
        named: the user's `Site` or `MultiSite`.
    """

    sites: tuple[BoundSite, ...]
    named: Any

    @property
    def label(self) -> str:
        """A short name for a table or a picture."""
        return str(self.named.label)


@attrs.frozen(eq=False)
class Patches:
    """All cells of a sweep.

    Args:
        nnmodel: the model, wrapped by nnsight.
        cells: what is patched, each cell alone.
        common: `[batch, seq]`, bool, where both runs of a prompt have a token; None is nowhere.
    """

    nnmodel: Any
    cells: Sequence[Cell]
    common: Tensor | None = None

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Each place that some cell patches, in the order in which a forward reaches them."""
        return in_order({site.place: None for cell in self.cells for site in cell.sites})

    @cached_property
    def positions(self) -> tuple[Positions, ...]:
        """Each of the positions that some site has, once."""
        every = {id(site.positions): site.positions for cell in self.cells for site in cell.sites}
        return tuple(every.values())

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
        for cell in self.cells:
            for site in cell.sites:
                key = self._aligned[id(site.positions)], site.limit
                found.setdefault(site.place, {})[key] = None
        return {place: tuple(each) for place, each in found.items()}

    @property
    def by_prompt(self) -> bool:
        """Whether some site has positions of each prompt."""
        return any(len(positions.at) > 1 for positions in self.positions)

    @property
    def named_by_prompt(self) -> bool:
        """Whether the user named positions of each prompt, of which there may be one."""
        sites = (site for cell in self.cells for site in cell.named.sites)
        return self.by_prompt or any(are_per_prompt(site.seq_pos) for site in sites)

    def rows(self, rows: slice | Tensor) -> Patches:
        """The same cells in some of the prompts."""
        if not self.by_prompt:
            return self
        common = None if self.common is None else self.common[rows]
        some = self.moved({id(each): each.rows(rows) for each in self.positions})
        return attrs.evolve(some, common=common)

    def moved(self, positions: Mapping[int, Positions]) -> Patches:
        """The same cells at other positions, given by the identity of their own."""
        cells = [
            attrs.evolve(
                cell,
                sites=tuple(
                    attrs.evolve(site, positions=positions[id(site.positions)])
                    for site in cell.sites
                ),
            )
            for cell in self.cells
        ]
        return attrs.evolve(self, cells=cells)

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


def _conflict(part: Tensor, sources: Tensor) -> bool:
    """Whether a token has two sources; one row stands for all prompts."""
    return bool(((part != sources) & (part != NONE) & (sources != NONE)).any())


def _whole(part: Tensor) -> Positions:
    """`[batch, seq]` of sources as positions."""
    groups = [tuple(row.nonzero().flatten().tolist()) for row in part != NONE]
    sources = [tuple(row[row != NONE].tolist()) for row in part]
    return Positions.of(groups, sources)
