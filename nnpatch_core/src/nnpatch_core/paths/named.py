"""The entries of a path's senders and receivers, as users name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import attrs

from nnpatch_core._models import module_of
from nnpatch_core._printable import shown
from nnpatch_core.adapters import ModelAPI
from nnpatch_core.edges import Nodes, Receiver, ReceiverKind, Sender
from nnpatch_core.errors import EdgeError
from nnpatch_core.seq_pos import PromptBatch
from nnpatch_core.site import MultiSite, Site, check_site
from nnpatch_core.sites import SiteList, Sites, SweepSites

_N = TypeVar("_N", Sender, Receiver)
#: What an entry is made of, as it is given.
_Item: TypeAlias = "str | Site"
_STREAM = re.compile(r"resid_pre(\d{1,9})", re.ASCII)
#: The components that heads read, as receivers have them.
_READ: Mapping[str, ReceiverKind] = {"q": "q", "k": "k", "v": "v"}
#: Arguments, a path's members, entries that are swept, and a tuple that counts together.
_DEEP = 4
#: The axes of a grid on which positions are.
_POSITIONS = ("position", "column", "span")


@attrs.frozen(eq=False)
class Named(Generic[_N]):
    """One entry: nodes that count together.

    Args:
        nodes: the nodes.
        sites: for each a site that has its positions.
        label: how an outcome calls it.
        told: its nodes and their positions, whatever it is called.
        listed: whether it was named by itself, and not as one of a grid.
    """

    nodes: tuple[_N, ...]
    sites: tuple[Site, ...]
    label: str
    told: str
    listed: bool


@attrs.frozen(eq=False)
class _Asked:
    """One entry as it is given.

    Args:
        items: its nodes.
        name: the name that its user has given it.
        at: its positions in a few letters, for each item; None is as its sites tell.
        listed: whether it was named by itself.
    """

    items: tuple[_Item, ...]
    name: str | None = None
    at: str | None = None
    listed: bool = True


@attrs.frozen(eq=False)
class Reader:
    """Reads entries for one model and its prompts.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        nodes: the nodes of the model.
        prompts: the prompts.
    """

    nnmodel: Any
    api: ModelAPI
    nodes: Nodes
    prompts: PromptBatch

    def senders(self, argument: str, value: Any) -> list[Named[Sender]]:
        """Entries of senders.

        Raises:
            PatchingError: one of its kinds, naming the argument, and what is wrong with it.
        """
        found = [self._entry(argument, each, self._sender) for each in self._asked(argument, value)]
        return _told_apart(found)

    def receivers(self, argument: str, value: Any) -> list[Named[Receiver]]:
        """The same of receivers.

        Raises:
            PatchingError: one of its kinds, naming the argument, and what is wrong with it.
        """
        asked = self._asked(argument, value)
        return _told_apart([self._entry(argument, each, self._receiver) for each in asked])

    def _asked(self, argument: str, value: Any) -> list[_Asked]:
        if isinstance(value, list):
            # One after the other; those in a tuple are one entry.
            found = [each for item in value for each in self._single(argument, item)]
        else:
            found = [*self._single(argument, value)]
        if not found:
            raise EdgeError(f"{argument} is empty; name at least one node")
        return found

    def _single(self, argument: str, value: Any) -> Iterator[_Asked]:
        if isinstance(value, Sites):
            yield from self._of_grid(value)
        elif isinstance(value, SiteList):
            for site in value.sites:
                yield from self._single(argument, site)
        elif isinstance(value, tuple):
            yield _Asked(tuple(_items(argument, value)))
        elif isinstance(value, MultiSite):
            own = MultiSite(value.sites).name
            yield _Asked(value.sites, None if value.name == own else value.name)
        elif isinstance(value, str | Site):
            yield _Asked((value,))
        else:
            raise EdgeError(
                f"{argument} must be Sites, sites or names of nodes such as 'a0.h1' and 'm3', or a "
                f"list of these, in which a tuple counts together; got {shown(value)}"
            )

    def _of_grid(self, sites: Sites) -> Iterator[_Asked]:
        grids = sites.grids(self.nnmodel, self.api, self.prompts.seq_len, self.prompts)
        every = tuple(range(self.prompts.seq_len))
        for grid in grids.values():
            axis = next((n for n, axis in enumerate(grid.axes) if axis.name in _POSITIONS), None)
            for index, site in zip(grid.index.tolist(), grid.sites, strict=True):
                assert isinstance(site, Site)
                if site.seq_pos == every and site.source_seq_pos is None:
                    site = attrs.evolve(site, seq_pos=None)
                at = "" if axis is None else site.at
                if axis is not None and grid.axes[axis].name == "column":
                    at = f" column {grid.axes[axis].labels[index[axis]]}"
                yield _Asked((site,), None, at, listed=False)

    def _entry(self, argument: str, asked: _Asked, read: Any) -> Named[Any]:
        nodes: list[Any] = []
        sites: list[Site] = []
        labels: list[str] = []
        told: list[str] = []
        for item in asked.items:
            own, label = read(argument, item)
            site = Site(self.api, "resid", 0) if isinstance(item, str) else item
            nodes += own
            sites += [site] * len(own)
            labels.append(label + (site.at if asked.at is None else asked.at))
            told.append(label + site.at)
        name = " + ".join(labels) if asked.name is None else asked.name
        return Named(tuple(nodes), tuple(sites), name, " + ".join(told), asked.listed)

    def _sender(self, argument: str, item: _Item) -> tuple[list[Sender], str]:
        if isinstance(item, str):
            node = self.nodes.senders[self.nodes.sender(item)]
            return [node], node.name
        self._check(argument, item)
        kind, layer = item.component, item.layer
        if kind in ("o", "attn"):
            heads = range(self.nodes.query[layer]) if item.head is None else [item.head]
            found = [Sender("head", layer, head) for head in heads]
            return found, f"a{layer}" if item.head is None else found[0].name
        if kind == "mlp":
            return [Sender("mlp", layer)], f"m{layer}"
        if kind == "resid_pre" and layer == 0:
            return [Sender("input")], "input"
        why = "is no sender"
        if kind in ("resid_pre", "resid"):
            why = "holds what many senders have written"
        elif kind in _READ:
            why = "is what a head reads, and no sender"
        raise EdgeError(
            f"{argument}: {item.label} {why}; senders are heads (o), all heads of a layer (attn), "
            "MLPs (mlp), and the stream before the first layer (resid_pre of layer 0, 'input')"
        )

    def _receiver(self, argument: str, item: _Item) -> tuple[list[Receiver], str]:
        if isinstance(item, str):
            node = self._of_stream(item) or self.nodes.receivers[self.nodes.receiver(item)]
            return [node], node.name
        self._check(argument, item)
        if item.source_seq_pos is not None and item.where is None:
            raise EdgeError(
                f"{argument}: {item.label} has source_seq_pos, and a receiver takes nothing from "
                "the source run: it is held where it stands"
            )
        kind, layer = item.component, item.layer
        if (read := _READ.get(kind)) is not None:
            count = (self.nodes.query if kind == "q" else self.nodes.key_value)[layer]
            heads = range(count) if item.head is None else [item.head]
            found = [Receiver(read, layer, head) for head in heads]
            return found, f"a{layer}<{kind}>" if item.head is None else found[0].name
        if kind == "mlp":
            node = Receiver("mlp", layer)
        elif kind in ("resid_pre", "resid"):
            node = self._before(layer + (kind == "resid"))
        else:
            why = "is no receiver"
            if kind in ("o", "attn"):
                why = "is what heads hand on, not what they read"
            raise EdgeError(
                f"{argument}: {item.label} {why}; receivers are the queries, keys and values of "
                "heads (q, k, v), what an MLP reads (mlp), and the stream before or after a layer "
                "(resid_pre, resid, 'logits')"
            )
        return [node], node.name

    def _before(self, layer: int) -> Receiver:
        """The stream before a layer; behind the last it is what the logits are made of."""
        return Receiver("logits" if layer == self.nodes.n_layers else "resid_pre", layer)

    def _of_stream(self, name: str) -> Receiver | None:
        found = _STREAM.fullmatch(name)
        if found is None:
            return None
        if int(found[1]) > self.nodes.n_layers:
            raise EdgeError(
                f"the model has no {shown(name)}: its {self.nodes.n_layers} layers are numbered "
                "from 0"
            )
        return self._before(int(found[1]))

    def _check(self, argument: str, site: Site) -> None:
        check_site(site, module_of(self.nnmodel))
        if site.subspace is not None:
            raise EdgeError(
                f"{argument}: {site.label} has a subspace, and a path goes by whole activations"
            )


def _items(argument: str, values: Sequence[Any]) -> Iterator[_Item]:
    """The nodes of a tuple, which count together."""
    for value in values:
        if isinstance(value, MultiSite):
            yield from value.sites
        elif isinstance(value, str | Site):
            yield value
        else:
            raise EdgeError(
                f"{argument}: a tuple holds sites and names of nodes, which count together; got "
                f"{shown(value)}"
            )
    if not values:
        raise EdgeError(f"{argument}: a tuple is empty; name at least one node")


def _told_apart(entries: list[Named[_N]]) -> list[Named[_N]]:
    """The same entries, with a number where labels are equal."""
    labels = [each.label for each in entries]
    seen: dict[str, int] = {}
    found = []
    for each in entries:
        label = each.label
        if labels.count(label) > 1:
            seen[label] = seen.get(label, 0) + 1
            label = f"{label} #{seen[label]}"
        found.append(attrs.evolve(each, label=label))
    return found


def sites_of(values: Iterable[Any]) -> list[SweepSites]:
    """The grids and sites among what names a path's members, as a sweep has its sites."""
    named = [*_sites_in([*values], _DEEP)]
    grids: list[SweepSites] = [each for each in named if isinstance(each, Sites | SiteList)]
    alone = [each for each in named if isinstance(each, Site | MultiSite)]
    return [*grids, *([SiteList(alone)] if alone else [])]


def _sites_in(value: Any, deep: int) -> Iterator[Sites | SiteList | Site | MultiSite]:
    if isinstance(value, Sites | SiteList | Site | MultiSite):
        yield value
    elif isinstance(value, list | tuple) and deep:
        for each in value:
            yield from _sites_in(each, deep - 1)
