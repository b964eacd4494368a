"""The parts of a cell: effects at its positions and heads, added up for all cells at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.components import OWN_TOKEN
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.spaces import Limit
from nnpatch_core.tracing import (
    BoundSite,
    Intervention,
    Patches,
    as_patched,
    columns_of,
    differs,
)


@attrs.frozen(eq=False)
class Terms:
    """Which effects at one place are added up to which cells.

    Args:
        place: the place.
        alignment: where the values come from, in all of these; see `Patches.alignments`.
        cells: `[terms]`, the cell's number.
        slots: `[terms]`, a position, or the number of a group of positions; `[terms, batch]` where
            each prompt has a position of its own, -1 for none.
        heads: `[terms]`, a head, or -1 for all columns.
        groups: the groups that `slots` number; empty where they are positions.
        limit: to which part of the activation patching is limited, in all of these.
    """

    place: Place
    alignment: Positions | None
    cells: Tensor
    slots: Tensor
    heads: Tensor
    groups: tuple[Positions, ...] = ()
    limit: Limit | None = None

    def add(self, total: Tensor, effects: Tensor) -> None:
        """Add effects `[..., batch, slots, heads + 1]` to `total` `[..., cells, batch]`."""
        if self.slots.ndim == 1:
            chosen = effects[..., self.slots, self.heads].transpose(-1, -2)
        else:
            prompts = torch.arange(effects.shape[-3], device="cpu")
            chosen = effects[..., prompts, self.slots.clamp(min=0), self.heads[:, None]]
            none = (self.slots == NONE).to(chosen.device)
            chosen = torch.where(none, 0, chosen)
        total.index_add_(-2, self.cells, chosen.to(total.device, total.dtype))

    def rows(self, chunk: slice) -> Terms:
        """Those of some prompts."""
        slots = self.slots if self.slots.ndim == 1 else self.slots[:, chunk]
        alignment = None if self.alignment is None else self.alignment.rows(chunk)
        groups = tuple(group.rows(chunk) for group in self.groups)
        return attrs.evolve(self, slots=slots, alignment=alignment, groups=groups)

    def by_cell(self, intervention: Intervention) -> Iterator[tuple[int, Terms]]:
        """The terms of each cell, where the value depends on it; else all of them at once.

        With each the number of a cell that stands for all.
        """
        if not intervention.by_cell:
            yield int(self.cells[0]), self
            return
        for cell in torch.unique(self.cells).tolist():
            own = self.cells == cell
            yield (
                cell,
                attrs.evolve(
                    self, cells=self.cells[own], slots=self.slots[own], heads=self.heads[own]
                ),
            )


@attrs.define
class _Gathered:
    """The terms of one place, as far as they were found: columns of numbers."""

    cells: list[int] = attrs.field(factory=list)
    heads: list[int] = attrs.field(factory=list)
    slots: list[Any] = attrs.field(factory=list)
    groups: dict[Positions, int] = attrs.field(factory=dict)

    def slots_of(self, positions: Positions, grouped: bool) -> list[Any]:
        """The slots of a site at some positions."""
        if grouped:
            return [self.groups.setdefault(positions, len(self.groups))]
        return list(positions.groups[0] if len(positions.at) == 1 else positions.at.T)

    def numbers(self) -> Tensor:
        """The slots, `[terms]` or `[terms, batch]`."""
        if not any(isinstance(slot, Tensor) for slot in self.slots):
            return torch.tensor(self.slots, dtype=torch.int64, device="cpu")
        each = [torch.as_tensor(slot, dtype=torch.int64, device="cpu") for slot in self.slots]
        batch = max(len(slot) for slot in each if slot.ndim)
        return torch.stack([slot.expand(batch) for slot in each])


def terms_of(
    patches: Patches,
    cells: Iterable[int],
    grouped: Sequence[str] = (),
    *,
    apart: bool = False,
) -> tuple[Terms, ...]:
    """The terms of each place and alignment, in the order in which they are met.

    Args:
        patches: what is patched.
        cells: the numbers of the cells that are wanted.
        grouped: components of which a group of positions is one term.
        apart: whether what is put elsewhere matters, so that each positions are aligned alone.
    """
    gathered: dict[tuple[Place, Positions | None, Limit | None], _Gathered] = defaultdict(_Gathered)
    # Looked up by place and positions, of which there are far fewer than cells.
    known: dict[tuple[int, int, Limit | None], tuple[_Gathered, list[Any]]] = {}
    for number in cells:
        for site in patches.cells[number].sites:
            place, at, limit = site.place, site.positions, site.limit
            found = known.get((id(place), id(at), limit))
            if found is None:
                own = gathered[place, patches.apart[at] if apart else patches.alignment(at), limit]
                found = own, own.slots_of(at, place.name in grouped)
                known[id(place), id(at), limit] = found
            own, slots = found
            own.slots += slots
            own.cells += [number] * len(slots)
            own.heads += [-1 if site.head is None else site.head] * len(slots)
    return tuple(
        Terms(
            place,
            alignment,
            torch.tensor(own.cells, dtype=torch.int64, device="cpu"),
            own.numbers(),
            torch.tensor(own.heads, dtype=torch.int64, device="cpu"),
            tuple(own.groups),
            limit,
        )
        for (place, alignment, limit), own in gathered.items()
        # A lone prompt that lacks the positions has no terms.
        if own.cells
    )


def are_apart(sites: Sequence[BoundSite]) -> bool:
    """Whether the effects of sites add up: there is one, or they are parts of one activation."""
    if len(sites) == 1:
        return True
    if len({site.place for site in sites}) > 1 or len({site.head is None for site in sites}) > 1:
        return False
    prompts = max(len(site.positions.at) for site in sites)
    for prompt in range(prompts):
        parts = [(site.head, at) for site in sites for at in site.positions.group(prompt)]
        if len(set(parts)) < len(parts):
            return False
    return True


def by_head(product: Tensor, columns: Tensor | None) -> Tensor:
    """Add up the columns of `[..., width]` to `[..., heads + 1]`; the last is all of them."""
    if columns is None:
        return product.sum(-1, keepdim=True)
    flat = product[..., columns.flatten().to(product.device)]
    heads = flat.view(*product.shape[:-1], *columns.shape).sum(-1)
    return torch.cat([heads, heads.sum(-1, keepdim=True)], dim=-1)


def own_columns(place: Place, head: int | None, activation: Tensor) -> Tensor:
    """`[width]`, bool: the columns of a head, or of the component if `head` is None.

    Several components may share an activation, as those of a fused projection do.
    """
    columns = columns_of(place, head, activation.shape[-1])
    if columns is None:
        return torch.ones(activation.shape[-1], dtype=torch.bool, device=activation.device)
    own = torch.zeros(activation.shape[-1], dtype=torch.bool, device=activation.device)
    own[columns.to(own.device)] = True
    return own


def effect(gradient: Tensor, difference: Tensor, columns: Tensor | None) -> Tensor:
    """The first-order effect of a difference, `[batch, seq, heads + 1]`; see `by_head`."""
    # No difference is no effect, even of a gradient that is not finite, as padding's may be.
    product = torch.where(difference == 0, 0.0, gradient.to(difference.dtype) * difference)
    return by_head(product, columns)


def change(
    intervention: Intervention,
    place: Place,
    activation: Tensor,
    positions: Positions | None = None,
    cell: int = 0,
    limit: Limit | None = None,
) -> Tensor:
    """The value put less the one that was there, `[batch, seq, width]`, in float32 at least.

    It is 0 where nothing is put.

    Args:
        intervention: what is put there.
        place: where.
        activation: `[batch, seq, width]`, what was there.
        positions: only at these, with their sources; None is all.
        cell: the number of the cell, for an intervention that looks at it.
        limit: only this part of the activation; None is all of it.
    """
    kind = torch.promote_types(activation.dtype, torch.float32)
    before = activation.detach().to(kind)
    difference = as_patched(before, place, intervention, positions, cell, limit) - before
    real = intervention.mask.bool().to(difference.device)
    # Chosen, not subtracted: padding may hold anything, nan included.
    return torch.where(real[..., None], difference, 0.0)


def add_effects(
    total: Tensor, terms: Terms, gradient: Tensor, activation: Tensor, intervention: Intervention
) -> None:
    """Add the first-order effects at a place to `total` `[..., cells, batch]`.

    Args:
        total: the effects so far.
        terms: which effects count for which cells.
        gradient: `[..., batch, seq, width]`.
        activation: `[batch, seq, width]`, what was there.
        intervention: what is put there.
    """
    columns = terms.place.columns(activation.shape[-1])
    for cell, own in terms.by_cell(intervention):
        difference = change(
            intervention, terms.place, activation, terms.alignment, cell, terms.limit
        )
        own.add(total, effect(gradient, difference, columns))


def still(
    terms: Iterable[Terms],
    cells: int,
    activations: Mapping[Location, Tensor],
    intervention: Intervention,
    batch: Batch,
) -> tuple[Tensor, Tensor]:
    """Where a patch moves nothing, so that no gradient is needed to tell: two masks.

    Args:
        terms: of all cells.
        cells: the number of cells.
        activations: what was at each location, `[batch, seq, width]`.
        intervention: what is put there.
        batch: the target prompts, with the positions at which their logits are read.

    Returns:
        `[cells, batch]`, bool: `elided`, where what is put is, bitwise, what was there; and
        `unread`, where nothing that the answer depends on reads what the cell patches, or what of
        it would change: what is right of the tokens whose logits are read, and in the last layer,
        what belongs to another token than those.
    """
    real = intervention.mask.bool().cpu()[..., None]
    # Counted for each cell: what differs, what is read, what of it differs, and what there is.
    counts = torch.zeros(4, cells, len(real), dtype=torch.float32, device="cpu")
    for each in terms:
        place, activation = each.place, activations[each.place.location]
        for cell, own in each.by_cell(intervention):
            other = differs(activation, place, intervention, each.alignment, cell, each.limit).cpu()
            own_token = place.layer == place.n_layers - 1 and place.name in OWN_TOKEN
            # After the last layer only the tokens are looked at whose logits are read.
            seen = batch.looked_at if own_token else batch.reaching
            read = (real & seen[..., None]).expand_as(other)
            masks = torch.stack([other, read, other & read, real.expand_as(other)])
            own.add(counts, _by_slot(masks, own.groups).float())
    elided, away, unmoved, absent = counts == 0
    return elided, unmoved & (away | ~elided) & ~absent


def _by_slot(masks: Tensor, groups: Sequence[Positions]) -> Tensor:
    """`[..., seq, heads or 1]` as `[..., slots, heads + 1]`; the last head is any of them."""
    if groups:
        here = [group.mask(masks.shape[-2])[..., None] for group in groups]
        masks = torch.stack([(masks & own).any(-2) for own in here], dim=-2)
    return masks if masks.shape[-1] == 1 else torch.cat([masks, masks.any(-1, True)], -1)
