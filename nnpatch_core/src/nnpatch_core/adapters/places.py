"""A component of one layer, looked up in a model once and then passed on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TypeAlias

import attrs
from torch import Tensor, nn

from nnpatch_core.adapters.components import Component
from nnpatch_core.adapters.layers import component_of, head_columns, n_layers, table_of
from nnpatch_core.adapters.model_api import ModelAPI

#: Path of a module, side and item: where a whole activation is. The parts of a fused projection
#: share one.
Location: TypeAlias = tuple[str, str, int]

#: A forward reaches each layer in three stages: its input, its modules, its output.
STAGES = 3
INPUT, INSIDE, OUTPUT = range(STAGES)


def stage_of(layer: int, component: Component) -> int:
    """When a forward reaches a component: three stages a layer, counted from 0."""
    if component.module:
        return STAGES * layer + INSIDE
    return STAGES * layer + (INPUT if component.side == "input" else OUTPUT)


@attrs.frozen(eq=False)
class Place:
    """A component of one layer, found in a model; the sites there differ in heads and positions.

    Make one with `place_of`.

    Args:
        api: the adapter.
        name: the component's name.
        layer: the layer.
        component: the row of the adapter's table.
        order: which row it is in the table of its layer.
        model: the Hugging Face model.
    """

    api: ModelAPI = attrs.field(repr=lambda api: str(api.name))
    name: str
    layer: int
    component: Component
    order: int
    model: nn.Module = attrs.field(repr=False)
    _columns: dict[int, Tensor | None] = attrs.field(factory=dict, init=False, repr=False)

    @cached_property
    def path(self) -> str:
        """Dotted path from the model to the module that has the activation."""
        return f"{self.api.layers}.{self.layer}.{self.component.module}"

    @cached_property
    def location(self) -> Location:
        """Where the whole activation is."""
        return (self.path, self.component.side, self.component.item)

    @cached_property
    def stage(self) -> int:
        """When a forward reaches the place; see `stage_of`."""
        return stage_of(self.layer, self.component)

    @property
    def n_layers(self) -> int:
        """How many layers the model has."""
        return n_layers(self.api, self.model)

    def columns(self, width: int) -> Tensor | None:
        """The columns of each head, `[heads, dim]`, of an activation so wide; None without heads.

        Raises:
            AdapterError: the width does not split into the heads.
        """
        if width not in self._columns:
            self._columns[width] = head_columns(self.api, self.model, self.layer, self.name, width)
        return self._columns[width]


def place_of(api: ModelAPI, model: nn.Module, layer: int, name: str) -> Place:
    """Look a component of a layer up in a model.

    Raises:
        UnknownNameError: the adapter has no such component.
        LayerError: this layer does not have it, though others do.
    """
    component = component_of(api, model, layer, name)
    order = list(table_of(api, model, layer)).index(name)
    return Place(api, name, layer, component, order, model)


def in_order(places: Iterable[Place]) -> tuple[Place, ...]:
    """Places in the order in which a forward reaches them."""
    return tuple(sorted(places, key=lambda place: (place.layer, place.order)))
