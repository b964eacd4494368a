"""The cells of a path sweep: each some entries that follow each other, ending at receivers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from nnpatch_core.adapters import ModelAPI
from nnpatch_core.edges import ARROW, Entry, Nodes, Receiver, Sender, receiver_site
from nnpatch_core.paths.named import Named
from nnpatch_core.paths.order import Members, paths_through
from nnpatch_core.paths.relayed import Relay
from nnpatch_core.seq_pos import Positions, PromptBatch
from nnpatch_core.site import Site
from nnpatch_core.sites import Axis, Grid, bind_cells

#: The name under which an outcome has the paths.
PATH = "path"


@attrs.frozen(eq=False)
class PathCell:
    """One cell: a path, the receivers at its end as sites, and a name for a table.

    Args:
        senders: the senders.
        relays: the entries amid the path.
        receivers: the receivers at its end.
        sites: for each of them the site where its value is put.
        label: the name.
    """

    senders: Entry
    relays: tuple[Relay, ...]
    receivers: tuple[Receiver, ...]
    sites: tuple[Site, ...]
    label: str

    @property
    def name(self) -> str:
        """The name of the outcome's tensor."""
        return PATH


@attrs.frozen(eq=False)
class PathSites:
    """Paths as a sweep has its sites.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        nodes: the nodes of the model.
        members: for each member of a path the entries that are swept there: of senders, of
            receivers amid the path, if any, and of receivers at its end.
        prompts: the prompts.
        paths: the paths that there are, each by the number of its entry in each member.
    """

    nnmodel: Any
    api: ModelAPI
    nodes: Nodes
    members: Members
    prompts: PromptBatch
    paths: Sequence[tuple[int, ...]] = attrs.field(init=False)

    @paths.default
    def _there(self) -> Sequence[tuple[int, ...]]:
        return paths_through(self.nodes, self.members)

    @property
    def senders(self) -> Sequence[Named[Sender]]:
        """The entries of senders."""
        return self.members[0]

    @property
    def shifted(self) -> bool:
        """Whether a sender gets activations of other positions than its own."""
        return any(site.source_seq_pos is not None for each in self.senders for site in each.sites)

    def grids(
        self, nnmodel: Any, api: Any, seq_len: int, prompts: PromptBatch | None = None
    ) -> dict[str, Grid]:
        """See `SweepSites.grids`: one tensor, whose axes are sender and receiver.

        What comes before the last member counts as the sender. Of two axes, one of a single place
        is left out.
        """
        senders = self._entries()
        relays = [[self._relay(each) for each in some] for some in self.members[1:-1]]
        last = self.members[-1]
        alone = all(len(each.nodes) == 1 for each in last)
        ends = [self._end(each, alone=alone) for each in last]
        ways = list(dict.fromkeys(path[:-1] for path in self.paths))
        if len(self.members) == 2:
            ways = [(number,) for number in range(len(senders))]
        places = {way: number for number, way in enumerate(ways)}
        axes = (
            Axis("sender", tuple(self._label(way) for way in ways)),
            Axis("receiver", tuple(each.label for each in last)),
        )
        kept = [number for number, axis in enumerate(axes) if len(axis.labels) > 1] or [0]
        index, cells = [], []
        for path in self.paths:
            *way, end = path
            place = places[tuple(way)], end
            index.append(tuple(place[number] for number in kept))
            cells.append(
                PathCell(
                    senders[way[0]],
                    tuple(some[number] for some, number in zip(relays, way[1:], strict=True)),
                    last[end].nodes,
                    ends[end],
                    ARROW.join(
                        each[number].told for each, number in zip(self.members, path, strict=True)
                    ),
                )
            )
        # They are sites as a sweep goes by them: with a label, and with sites of the model.
        found: Any = tuple(cells)
        return {PATH: Grid(tuple(axes[number] for number in kept), tuple(index), found)}

    def _label(self, way: Sequence[int]) -> str:
        return ARROW.join(
            each[number].label for each, number in zip(self.members, way, strict=False)
        )

    def _entries(self) -> list[Entry]:
        entries = self.senders
        # All together: where some take their values from elsewhere, each knows where it has any.
        sites = [site for each in entries for site in each.sites]
        own = iter(self._positions(sites, shifted=self.shifted))
        return [Entry(each.nodes, tuple(next(own) for _ in each.nodes)) for each in entries]

    def _relay(self, entry: Named[Receiver]) -> Relay:
        return Relay(entry.nodes, tuple(self._positions(_unshifted(entry.sites))))

    def _end(self, entry: Named[Receiver], *, alone: bool) -> tuple[Site, ...]:
        return tuple(
            attrs.evolve(
                receiver_site(self.api, node, alone=alone), seq_pos=site.seq_pos, where=site.where
            )
            for node, site in zip(entry.nodes, entry.sites, strict=True)
        )

    def _positions(self, sites: Sequence[Site], *, shifted: bool = False) -> list[Positions | None]:
        """The positions of some sites; None is all of them."""
        bound = bind_cells(sites, self.nnmodel, self.prompts.seq_len, self.prompts).cells
        return [
            None if site.seq_pos is None and not shifted else cell.sites[0].positions
            for site, cell in zip(sites, bound, strict=True)
        ]


def _unshifted(sites: Sequence[Site]) -> list[Site]:
    """The same sites, which take no values from elsewhere."""
    return [attrs.evolve(site, source_seq_pos=None) for site in sites]
