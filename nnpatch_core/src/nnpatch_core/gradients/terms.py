"""What makes up a cell: the effects at its positions and heads, added up for all cells at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import module_of
from nnpatch_core.adapters import Component, head_columns, n_layers, row_of
from nnpatch_core.engine.target import differs
from nnpatch_core.seq_pos import Group
from nnpatch_core.site import AnySite, Location, Site
from nnpatch_core.tracing import Replacement

#: An adapter (two may share a name), a component and a layer.
Where: TypeAlias = tuple[int, str, int]

#: In the last layer these reach no other token: left of the last one, nothing depends on them.
_OWN_TOKEN = ("q", "o", "attn", "mlp", "resid")


@attrs.frozen(eq=False)
class Terms:
    """Which effects at one place are added up to which cells; arrays have one number for a term.

    Args:
        site: one of the sites there.
        cells: `[terms]`, the cell's number.
        slots: `[terms]`, a position, or the number of a group of positions.
        heads: `[terms]`, a head, or -1 for all columns.
        groups: the groups that `slots` number; empty where they are positions.
    """

    site: Site
    cells: Tensor
    slots: Tensor
    heads: Tensor
    groups: tuple[Group, ...] = ()

    def add(self, total: Tensor, effects: Tensor) -> None:
        """Add effects `[..., batch, slots, heads + 1]` to `total` `[..., cells, batch]`."""
        chosen = effects[..., self.slots, self.heads].transpose(-1, -2)
        total.index_add_(-2, self.cells, chosen.to(total.device, total.dtype))


def where(site: Site) -> Where:
    """Where a site is, whatever its head and positions."""
    return (id(site.api), site.component, site.layer)


def terms_of(
    cells: Mapping[int, AnySite], seq_len: int, grouped: Sequence[str] = ()
) -> dict[Where, Terms]:
    """The terms of each place.

    Args:
        cells: what is patched, by number.
        seq_len: tokens per prompt.
        grouped: components of which a group of positions is one term.
    """
    found: dict[Where, tuple[Site, list[tuple[int, int, int]], dict[Group, int]]] = {}
    known: dict[tuple[int, ...] | None, Group] = {}
    for number, cell in cells.items():
        for site in cell.sites:
            _, items, groups = found.setdefault(where(site), (site, [], {}))
            head = -1 if site.head is None else site.head
            if site.seq_pos not in known:
                known[site.seq_pos] = site.group(seq_len)
            group = known[site.seq_pos]
            if site.component in grouped:
                items.append((number, groups.setdefault(group, len(groups)), head))
            else:
                items.extend([(number, position, head) for position in group])
    terms = {}
    for place, (site, items, groups) in found.items():
        numbers, slots, heads = torch.tensor(items, dtype=torch.int64, device="cpu").T
        terms[place] = Terms(site, numbers, slots, heads, tuple(groups))
    return terms


def are_apart(sites: Sequence[Site], seq_len: int) -> bool:
    """Whether the effects of sites add up: there is one, or they are parts of one activation."""
    if len(sites) == 1:
        return True
    if len({where(site) for site in sites}) > 1 or len({site.head is None for site in sites}) > 1:
        return False
    parts = [(site.head, position) for site in sites for position in site.group(seq_len)]
    return len(set(parts)) == len(parts)


def by_head(product: Tensor, columns: Tensor | None) -> Tensor:
    """Add up the columns of `[..., width]` to `[..., heads + 1]`; the last is all of them."""
    if columns is None:
        return product.sum(-1, keepdim=True)
    flat = product[..., columns.flatten().to(product.device)]
    heads = flat.view(*product.shape[:-1], *columns.shape).sum(-1)
    return torch.cat([heads, heads.sum(-1, keepdim=True)], dim=-1)


def row_at(site: Site, model: Any) -> Component:
    """The row of the adapter's table for a site."""
    return row_of(site.api, model, site.layer, site.component)


def columns_of(site: Site, model: Any, width: int) -> Tensor | None:
    """The columns `[heads, dim]` of a site's component; None without heads."""
    return head_columns(site.api, model, site.layer, site.component, width)


def own_columns(site: Site, model: Any, activation: Tensor) -> Tensor:
    """`[width]`, bool: the columns of a site's head, or of its component if it names none.

    Several components may share an activation, as those of a fused projection do.
    """
    width, device = activation.shape[-1], activation.device
    columns = columns_of(site, model, width)
    if columns is None:
        return torch.ones(width, dtype=torch.bool, device=device)
    own = torch.zeros(width, dtype=torch.bool, device=device)
    own[(columns if site.head is None else columns[site.head]).flatten().to(device)] = True
    return own


def effect(gradient: Tensor, difference: Tensor, columns: Tensor | None) -> Tensor:
    """The first-order effect of a difference, `[batch, seq, heads + 1]`; see `by_head`."""
    # No difference is no effect, even of a gradient that is not finite, as padding's may be.
    product = torch.where(difference == 0, 0.0, gradient.to(difference.dtype) * difference)
    return by_head(product, columns)


def change(replacement: Replacement, location: Location, found: Tensor) -> Tensor:
    """What is put minus what was there, `[batch, seq, width]`, in float32 at least.

    It is 0 where nothing is put.
    """
    kind = torch.promote_types(found.dtype, torch.float32)
    given = replacement.at(location)
    there = found.detach().to(kind)
    difference = -there if given is None else given.to(found.device, kind) - there
    real = replacement.mask.bool().to(found.device)
    # Chosen, not multiplied: padding may hold anything, nan included.
    return torch.where(real[..., None], difference, 0.0)


def known(
    terms: Mapping[Where, Terms],
    cells: int,
    activations: Mapping[Location, Tensor],
    replacement: Replacement,
    nnmodel: Any,
) -> tuple[Tensor, Tensor]:
    """`[cells, batch]`, bool, twice: where a patch is elided, and where nothing reads it.

    It is elided where what is put is, bitwise, what was there. In the last layer nothing reads what
    belongs to another token than the last one; a cell is unread where that is all that it patches,
    or all that it would change.
    """
    model = module_of(nnmodel)
    real = replacement.mask.bool().cpu()[..., None]
    # Counted for each cell: what differs, what is read, what of it differs, and what there is.
    counts = torch.zeros(4, cells, len(real), dtype=torch.float32, device="cpu")
    for each in terms.values():
        site = each.site
        found = activations[site.location(nnmodel)]
        other = torch.from_numpy(differs(model, site, found, replacement, nnmodel))
        read = real.expand_as(other).clone()
        if site.layer == n_layers(site.api, model) - 1 and site.component in _OWN_TOKEN:
            read[:, :-1] = False
        masks = torch.stack([other, read, other & read, real.expand_as(other)])
        if each.groups:
            masks = torch.stack([masks[:, :, list(group)].any(2) for group in each.groups], dim=2)
        heads = masks if masks.shape[-1] == 1 else torch.cat([masks, masks.any(-1, True)], -1)
        each.add(counts, heads.float())
    elided, away, still, absent = counts == 0
    return elided, still & (away | ~elided) & ~absent
