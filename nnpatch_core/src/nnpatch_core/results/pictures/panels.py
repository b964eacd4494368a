"""Panels: the cells of site names as the numbers of heatmaps."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import attrs
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nnpatch_core.results.axes import AXES
from nnpatch_core.sites import Axis


@attrs.frozen(eq=False)
class Panel:
    """One heatmap.

    Args:
        name: the site name.
        values: `[up, across]`, nan where nothing was swept.
        up, across: a label for each line up, and for each column across.
        up_title, across_title: the words beside the labels.
        positions: whether the columns are the positions of the prompts.
        layers: for each line up its layer; None where the lines are none.
    """

    name: str
    values: NDArray[np.float64]
    up: tuple[str, ...]
    across: tuple[str, ...]
    up_title: str
    across_title: str
    positions: bool = False
    layers: tuple[int, ...] | None = None

    def keep_positions(self, kept: Sequence[int], labels: Sequence[str]) -> Panel:
        """The panel with some of its positions, under new labels for all; others as they are."""
        if not self.positions:
            return self
        values = self.values[:, list(kept)]
        return attrs.evolve(self, values=values, across=tuple(labels[n] for n in kept))

    def keep_layers(self, kept: Collection[int]) -> Panel:
        """The panel with some of its layers; others as they are."""
        if self.layers is None:
            return self
        lines = [line for line, layer in enumerate(self.layers) if layer in kept]
        return attrs.evolve(
            self,
            values=self.values[lines],
            up=tuple(self.up[line] for line in lines),
            layers=tuple(self.layers[line] for line in lines),
        )


def panel(name: str, axes: Sequence[Axis], values: Tensor, tokens: Sequence[str]) -> Panel:
    """The heatmap of one site name.

    Args:
        name: the site name.
        axes: one to three axes: layer, position, head; or the sites of a list.
        values: of their shape, nan where nothing was swept.
        tokens: a label for each position.
    """
    numbers = values.double().numpy()
    labels = {axis.name: tuple(str(label) for label in axis.labels) for axis in axes}
    if "position" in labels:
        labels["position"] = tuple(tokens)
    titles = {axis.name: AXES[axis.name].title for axis in axes}
    names = [axis.name for axis in axes]
    layers = tuple(range(len(numbers))) if names[0] == "layer" else None
    if len(names) == 1:
        (up,) = names
        column = numbers[:, None]
        return Panel(name, column, labels[up], ("",), titles[up], "", layers=layers)
    up, across = names[:2]
    if len(names) == 2:
        return Panel(
            name,
            numbers,
            labels[up],
            labels[across],
            titles[up],
            titles[across],
            positions=across == "position",
            layers=layers,
        )
    layer, position, head = names
    n_layers, n_positions, n_heads = numbers.shape
    by_head = numbers.transpose(0, 2, 1).reshape(n_layers * n_heads, n_positions)
    numbered = tuple(f"{a}.{b}" for a in labels[layer] for b in labels[head])
    title = f"layer.{titles[head]}"
    return Panel(
        name,
        by_head,
        numbered,
        labels[position],
        title,
        titles[position],
        positions=position == "position",
        layers=tuple(number for number in range(n_layers) for _ in range(n_heads)),
    )
