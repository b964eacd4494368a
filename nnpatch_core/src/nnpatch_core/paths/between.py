"""Changes that a path's receivers see, with what stands between held, or its MLPs recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans
from nnpatch_core.edges import Climb, Layers, Receiver, Rows, Sender, Writes, added_up, at_step


@attrs.frozen(eq=False)
class Frozen:
    """The changes that senders write, with everything between them and the receivers held.

    Args:
        layers: the layers, and the target run.
        writes: what senders write.
    """

    layers: Layers
    writes: Writes

    @property
    def moved(self) -> Tensor:
        """See `Changes.moved`."""
        return self.writes.moved

    def along(self, wanted: Mapping[int, Rows]) -> Iterator[tuple[int, Tensor]]:
        """See `Changes.along`."""
        return added_up(self.layers, self.writes, wanted)


@attrs.frozen(eq=False)
class ThroughMlps:
    """The changes that senders write, and those that each MLP makes of them; heads are held.

    An MLP that is a sender is not recomputed, at no position.

    Args:
        layers: the layers, and the target run.
        writes: what senders write.
    """

    layers: Layers
    writes: Writes

    @property
    def moved(self) -> Tensor:
        """See `Changes.moved`: an MLP sees each token alone."""
        return self.writes.moved

    def along(self, wanted: Mapping[int, Rows]) -> Iterator[tuple[int, Tensor]]:
        """See `Changes.along`: the rows of all steps go up the layers once."""
        if not wanted:
            return
        climb = Climb.of(wanted)
        moved = self.moved[torch.from_numpy(climb.entries), climb.prompts][..., None]
        total = torch.zeros_like(self.layers.target.streams[0][climb.prompts])
        held, begun = self._senders(climb), np.zeros(len(climb.entries), dtype=np.bool_)
        writing = self.writes.written(climb.entries, climb.prompts, climb.until)
        upcoming = next(writing, None)
        recomputed: tuple[int, Tensor, Tensor] | None = None
        for step in range(max(climb.index) + 1):
            while upcoming is not None and upcoming[0] == step:
                _, rows, change = upcoming
                total = total.to(change.device)
                total[rows] += change
                begun[rows.numpy()] = True
                upcoming = next(writing, None)
            if recomputed is not None and recomputed[0] == step:
                _, rows, change = recomputed
                total = total.to(change.device)
                total[rows] += change
            if step in climb.index:
                yield step, at_step(self.layers, step, total[climb.index[step]])
            layer = step // 2
            if layer >= self.layers.nodes.n_layers or step != self._reads(layer):
                continue
            writes = Sender("mlp", layer).step
            some = begun & ~held[:, layer] & (climb.until >= writes)
            rows = torch.from_numpy(some.nonzero()[0])
            if len(rows):
                change = self._recomputed(layer, total[rows], climb.prompts[rows])
                # Elsewhere it is the target run's own, to the last bit.
                here = moved[rows].to(change.device)
                recomputed = writes, rows, torch.where(here, change, 0.0).to(change)

    def _recomputed(self, layer: int, change: Tensor, prompts: Tensor) -> Tensor:
        layers = self.layers
        stream = layers.target.streams[layer][prompts]
        mlp = layers.mlp_of(layer, stream + change.to(stream.device), prompts)
        return layers.mlp[layer] * (mlp - layers.target.mlp[layer][prompts])

    def _reads(self, layer: int) -> int:
        return self.layers.nodes.step(Receiver("mlp", layer))

    def _senders(self, climb: Climb) -> Booleans:
        """`[rows, layers]`: whether a layer's MLP is a sender."""
        held: Booleans = np.zeros((len(climb.entries), self.layers.nodes.n_layers), dtype=np.bool_)
        for entry in np.unique(climb.entries).tolist():
            own = [each.layer for each in self.writes.senders(entry) if each.kind == "mlp"]
            held[np.ix_(climb.entries == entry, own)] = True
        return held
