"""Panels: the cells of site names as lines and columns of numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from nnpatch_core._printable import printable
from nnpatch_core.results.axes import AXES
from nnpatch_core.sites import Axis

#: A panel of more lines than these, by head in each layer, becomes a panel for each position.
_HEADS = 64
#: As long as there are no more of these.
_PLACES = 16


@attrs.frozen(eq=False)
class Panel:
    """One heatmap; or the lines of one chart over its layers, or bars below each other.

    Args:
        name: its title.
        values: `[up, across]`, nan where nothing was swept.
        up, across: a label for each line up, and for each column across.
        up_title, across_title: the words beside the labels.
        positions: whether the columns are the positions of the prompts.
        layers: for each line up its layer; None where the lines are none.
        band: `[2, up, across]`, the ends of what a value may be, nan where that is not known; None
            if nothing is known.
        scale: which of the picture's scales it has.
    """

    name: str
    values: NDArray[np.float64]
    up: tuple[str, ...]
    across: tuple[str, ...]
    up_title: str
    across_title: str
    positions: bool = False
    layers: tuple[int, ...] | None = None
    band: NDArray[np.float64] | None = None
    scale: int = 0

    @property
    def unsure(self) -> NDArray[np.bool_]:
        """`[up, across]`: the cells whose band holds 0."""
        if self.band is None:
            return np.zeros(self.values.shape, dtype=bool)
        low, high = self.band
        held: NDArray[np.bool_] = (low <= 0) & (high >= 0)
        return held

    def on_scale(self, number: int) -> Panel:
        """The panel on another scale."""
        return attrs.evolve(self, scale=number)

    def keep_positions(self, kept: Sequence[int], labels: Sequence[str]) -> Panel:
        """The panel with some of its positions, under new labels for all; others as they are."""
        if not self.positions:
            return self
        return self.with_columns(kept, [labels[number] for number in kept])

    def with_columns(self, kept: Sequence[int], labels: Sequence[str]) -> Panel:
        """The panel with some of its columns, under new labels."""
        columns = list(kept)
        band = None if self.band is None else self.band[..., columns]
        return attrs.evolve(self, values=self.values[:, columns], band=band, across=tuple(labels))

    def keep_layers(self, kept: Collection[int]) -> Panel:
        """The panel with some of its layers; others as they are."""
        if self.layers is None:
            return self
        lines = [line for line, layer in enumerate(self.layers) if layer in kept]
        return attrs.evolve(
            self,
            values=self.values[lines],
            band=None if self.band is None else self.band[:, lines],
            up=tuple(self.up[line] for line in lines),
            layers=tuple(self.layers[line] for line in lines),
        )


@attrs.frozen(eq=False)
class Grid:
    """The numbers of one site name.

    Args:
        name: the site name.
        axes: one to three axes: layer, position, head; or the sites of a list.
        values: of their shape, nan where nothing was swept.
        band: as `Panel.band`, `[2, *shape]`.
    """

    name: str
    axes: Sequence[Axis]
    values: NDArray[np.float64]
    band: NDArray[np.float64] | None = None

    @property
    def has_heads(self) -> bool:
        """Whether there are layers, positions (or spans) and heads."""
        return len(self.axes) == 3

    def places(self, run: Sequence[int], asked: bool = False) -> list[int]:
        """The indices on the second of three axes at which anything was swept.

        Args:
            run: the positions among which it is, if they are positions.
            asked: whether the user wants these, whatever was swept there.
        """
        if asked and self.axes[1].name == "position":
            return list(run)
        places = range(self.values.shape[1])
        chosen = [place for place in places if not np.isnan(self.values[:, place]).all()]
        if self.axes[1].name == "position":
            chosen = [number for number in chosen if number in run] or chosen
        return chosen

    def at(self, place: int, label: str) -> Grid:
        """Layer and head at one index on the second of three axes."""
        band = None if self.band is None else self.band[:, :, place]
        first, _, last = self.axes
        title = f"{self.name} {label}"
        return Grid(title, (first, last), self.values[:, place], band)


def is_split(grid: Grid, places: Sequence[int]) -> bool:
    """Tell whether layers and heads at each place are a panel, instead of columns of one."""
    layers = (~np.isnan(grid.values).all((1, 2))).sum()
    by_head = int(layers) * grid.values.shape[2] > _HEADS
    return len(places) == 1 or (by_head and len(places) <= _PLACES)


def labels_of(axis: Axis, tokens: Sequence[str]) -> tuple[str, ...]:
    """The labels of an axis, those of positions being tokens."""
    if axis.name == "position":
        return tuple(tokens)
    return tuple(printable(str(label)) for label in axis.labels)


def panel(grid: Grid, tokens: Sequence[str]) -> Panel:
    """The panel of one site name.

    Args:
        grid: its numbers.
        tokens: a label for each position.
    """
    labels = [labels_of(axis, tokens) for axis in grid.axes]
    titles = [AXES[axis.name].title for axis in grid.axes]
    names = [axis.name for axis in grid.axes]
    values, band = grid.values, grid.band
    layers = tuple(range(len(values))) if names[0] == "layer" else None
    if len(names) == 1:
        band = None if band is None else band[..., None]
        return Panel(
            grid.name, values[:, None], labels[0], ("",), titles[0], "", layers=layers, band=band
        )
    if len(names) == 2:
        return Panel(
            grid.name,
            values,
            labels[0],
            labels[1],
            titles[0],
            titles[1],
            positions=names[1] == "position",
            layers=layers,
            band=band,
        )
    return Panel(
        grid.name,
        _by_head(values),
        tuple(f"{layer}.{head}" for layer in labels[0] for head in labels[2]),
        labels[1],
        f"layer.{titles[2]}",
        titles[1],
        positions=names[1] == "position",
        layers=tuple(number for number in range(len(values)) for _ in labels[2]),
        band=None if band is None else np.stack([_by_head(end) for end in band]),
    )


def _by_head(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`[layer, place, head]` as `[layer x head, place]`."""
    return values.transpose(0, 2, 1).reshape(-1, values.shape[1])
