"""The cells of a sweep, found in a model: which places they patch, which heads and positions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import attrs
from torch import Tensor, nn

from nnpatch_core._models import module_of
from nnpatch_core.adapters import ModelAPI, Place, in_order


@attrs.frozen(eq=False)
class BoundSite:
    """A site found in a model, for prompts of one width.

    Args:
        place: where the whole activation is.
        head: one head, or None for the whole component.
        positions: the token positions, ascending from 0.
    """

    place: Place
    head: int | None
    positions: tuple[int, ...]

    def columns(self, width: int) -> Tensor | None:
        """`[columns]` of its head or of its component; None is all of the activation."""
        columns = self.place.columns(width)
        if columns is None:
            return None
        return (columns if self.head is None else columns[self.head]).flatten()


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
    """

    nnmodel: Any
    cells: Sequence[Cell]

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """Each place that some cell patches, in the order in which a forward reaches them."""
        return in_order({site.place: None for cell in self.cells for site in cell.sites})

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
