"""The cells of a sweep over edges: each some senders, and some receivers as sites of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import attrs
import numpy as np

from nnpatch_core._models import module_of
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.edges.changes import Entry
from nnpatch_core.edges.nodes import ARROW, Nodes, Receiver
from nnpatch_core.errors import EdgeError
from nnpatch_core.plugins import find_adapter
from nnpatch_core.seq_pos import (
    Expansion,
    PlacedSeqPos,
    Positions,
    PromptBatch,
    SeqPos,
    are_per_prompt,
    expansion_of,
)
from nnpatch_core.site import Site
from nnpatch_core.sites import Axis, Grid, bind_cells

#: The name under which an outcome has the edges.
EDGE = "edge"
#: The place of a group on the axis of positions, the positions, and their name; all of them None is
#: everywhere.
_Group: TypeAlias = "tuple[int | None, Positions | None, str | None]"


@attrs.frozen(eq=False)
class EdgeCell:
    """One cell: senders, and the receivers as sites.

    Args:
        entry: the senders.
        receivers: the receivers.
        sites: for each receiver the site where its value is put.
        where: the name of the positions; None is everywhere.
    """

    entry: Entry
    receivers: tuple[Receiver, ...]
    sites: tuple[Site, ...]
    where: str | None = None

    @property
    def label(self) -> str:
        """A short name for a table."""
        senders, receivers = (
            "+".join(each.name for each in nodes) for nodes in (self.entry.senders, self.receivers)
        )
        edge = f"{senders}{ARROW}{receivers}"
        return edge if self.where is None else f"{edge} [{self.where}]"

    @property
    def name(self) -> str:
        """The name of the outcome's tensor."""
        return EDGE


@attrs.frozen(eq=False)
class EdgeSites:
    """Edges as a sweep has its sites: each sender to each receiver after it.

    Args:
        nodes: the nodes of the model.
        senders: the numbers of the senders that are swept.
        receivers: the numbers of the receivers.
        strategy: where a sender is changed, one group of positions at a time; None is everywhere.
        apart: whether senders get something else than activations of the source run, so that it
            does not matter where a position is there.
    """

    nodes: Nodes
    senders: Sequence[int]
    receivers: Sequence[int]
    strategy: SeqPos | PlacedSeqPos | None = None
    apart: bool = False

    def shifted(self, prompts: PromptBatch) -> bool:
        """Whether some sender gets activations of other positions than its own."""
        if self.strategy is None or self.apart:
            return False
        cells = expansion_of(self.strategy, prompts.seq_len, prompts).cells
        return any(cell.source is not None for cell in cells)

    def by_prompt(self, prompts: PromptBatch) -> bool:
        """Whether positions are named for each prompt."""
        if self.strategy is None:
            return False
        cells = expansion_of(self.strategy, prompts.seq_len, prompts).cells
        return any(are_per_prompt(cell.seq_pos) for cell in cells)

    def check(self) -> None:
        """Raise `EdgeError` where no sender is before a receiver."""
        if self.nodes.mask[np.ix_(self.senders, self.receivers)].any():
            return
        sender = self.nodes.sender_names[min(self.senders)]
        receiver = self.nodes.receiver_names[max(self.receivers)]
        raise EdgeError(
            f"no sender writes before a receiver reads the stream: the first sender is {sender}, "
            f"and the last receiver is {receiver}"
        )

    def one(self) -> EdgeSites:
        """One of the edges alone."""
        return attrs.evolve(self, senders=[min(self.senders)], receivers=[max(self.receivers)])

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """See `SweepSites.grids`: one tensor, whose axes are sender and receiver."""
        adapter, nodes = find_adapter(api, module_of(nnmodel)), self.nodes
        axes = [Axis("sender", nodes.sender_names), Axis("receiver", nodes.receiver_names)]
        groups: list[_Group] = [(None, None, None)]
        if self.strategy is not None:
            expansion = expansion_of(self.strategy, seq_len, prompts)
            groups = _groups(adapter, expansion, nnmodel, seq_len, prompts, self.apart)
            if expansion.axis is not None:
                axes.append(Axis(expansion.axis, expansion.labels))
        sites = [receiver_site(adapter, each) for each in nodes.receivers]
        index, cells = [], []
        wanted = set(self.receivers)
        for number in self.senders:
            sender = nodes.senders[number]
            entries = [Entry((sender,), (at,)) for _, at, _ in groups]
            for other in nodes.mask[number].nonzero()[0].tolist():
                if other not in wanted:
                    continue
                receiver = nodes.receivers[other]
                for (label, _, where), entry in zip(groups, entries, strict=True):
                    index.append((number, other, *(() if label is None else (label,))))
                    cells.append(EdgeCell(entry, (receiver,), (sites[other],), where))
        # They are sites as a sweep goes by them: with a label, and with sites of the model.
        found: Any = tuple(cells)
        return {EDGE: Grid(tuple(axes), tuple(index), found)}


def receiver_site(api: ModelAPI, receiver: Receiver, *, alone: bool = True) -> Site:
    """Where the value of a receiver is put, at every position.

    Args:
        api: the adapter.
        receiver: the receiver.
        alone: whether it is the only receiver of its cell; see `Received`.
    """
    if receiver.kind == "resid_pre" and receiver.layer == 0:
        return Site.get_site(api, "resid_pre", 0)
    if receiver.kind in ("resid_pre", "logits"):
        return Site.get_site(api, "resid", receiver.layer - 1)
    if receiver.kind == "mlp":
        return Site.get_site(api, "resid" if alone else "mlp", receiver.layer)
    return Site.get_site(api, receiver.kind, receiver.layer, receiver.head)


def _groups(
    api: ModelAPI,
    expansion: Expansion,
    nnmodel: Any,
    seq_len: int,
    prompts: PromptBatch | None,
    apart: bool,
) -> list[_Group]:
    """The groups of positions that a strategy gives."""
    # Positions are read as those of sites are: where some take their values from elsewhere, each
    # knows where it has any.
    if apart and prompts is not None:
        prompts = attrs.evolve(prompts, source=None)
    sites = [
        Site(
            api,
            "resid",
            0,
            None,
            cell.seq_pos,
            source_seq_pos=None if apart else cell.source,
            where=cell.name,
        )
        for cell in expansion.cells
    ]
    bound = bind_cells(sites, nnmodel, seq_len, prompts).cells
    return [
        (
            cell.label,
            found.sites[0].positions,
            None if cell.label is None else str(expansion.labels[cell.label]),
        )
        for cell, found in zip(expansion.cells, bound, strict=True)
    ]
