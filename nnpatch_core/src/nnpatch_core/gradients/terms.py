"""The parts of a cell: effects at its positions and heads, added up for all cells at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core.adapters import Location, Place
from nnpatch_core.batch import Batch
from nnpatch_core.components import OWN_TOKEN
from nnpatch_core.seq_pos import NONE, Positions
from nnpatch_core.spaces import Limit
from nnpatch_core.tracing import (
    BoundSite,
    Cells,
    Intervention,
    Patches,
    as_patched,
    columns_of,
    differs,
    within,
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


def terms_of(
    patches: Patches,
    cells: Integers,
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
    every = patches.cells
    counts = np.diff(every.ends)[cells]
    sites = every.sites.take(within(every.ends[:-1][cells], counts))
    of_sites = np.repeat(cells, counts)
    # By number, of which there are far fewer than cells: equal ones count as one.
    used = np.unique(sites.positions).tolist()
    at = {number: every.positions[number] for number in used}
    places = _numbers(every.places)
    spaces = _numbers(each for pair in every.limits for each in pair)
    alignments = _numbers(
        patches.apart[each] if apart else patches.alignment(each) for each in at.values()
    )
    aligned = np.zeros(max(used, default=0) + 1, dtype=np.int64)
    aligned[used] = alignments.of
    place, alignment = places.of[sites.place], aligned[sites.positions]
    limit = spaces.of[2 * sites.space + (sites.head >= 0)]
    keys = (place * len(alignments.each) + alignment) * len(spaces.each) + limit
    slots = _Slots.of(at)
    found = []
    for rows in _by_first(keys):
        first = rows[0]
        here = places.each[place[first]]
        numbers, groups = sites.positions[rows], ()
        if here.name in grouped:
            groups = tuple(at[number] for number in dict.fromkeys(numbers.tolist()))
            times, own = np.ones(len(rows), dtype=np.int64), _ranked(numbers)
        else:
            times, own = slots.at(numbers)
        # A lone prompt that lacks the positions has no terms.
        if len(own):
            found.append(
                Terms(
                    here,
                    alignments.each[alignment[first]],
                    torch.from_numpy(np.repeat(of_sites[rows], times).astype(np.int64)),
                    torch.from_numpy(own),
                    torch.from_numpy(np.repeat(sites.head[rows], times).astype(np.int64)),
                    groups,
                    spaces.each[limit[first]],
                )
            )
    return tuple(found)


@attrs.frozen(eq=False)
class _Numbers:
    """Things that are numbered: each of them once, and `[things]`, which of these each is."""

    each: tuple[Any, ...]
    of: Integers


def _numbers(things: Iterable[Any]) -> _Numbers:
    known: dict[Any, int] = {}
    of = [known.setdefault(each, len(known)) for each in things]
    return _Numbers(tuple(known), np.array(of, dtype=np.int64))


def _by_first(keys: Integers) -> Iterator[Integers]:
    """The rows of each key, in the order in which keys are met."""
    _, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    return (rows[number] for number in np.argsort(first).tolist())


def _ranked(numbers: Integers) -> Integers:
    """Numbers by the order in which they are met, from 0."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    ranked: Integers = rank[inverse]
    return ranked


@attrs.frozen(eq=False)
class _Slots:
    """The slots of all positions, one after another.

    Args:
        one: `[slots]` of those that all prompts have in common; 0 of the others.
        each: `[slots, batch]` of all; None where all are in common.
        starts: by the number of positions, where theirs begin.
        counts: the same, how many there are.
        apart: the same, bool: whether each prompt has its own.
    """

    one: Integers
    each: Integers | None
    starts: Integers
    counts: Integers
    apart: Booleans

    @classmethod
    def of(cls, positions: Mapping[int, Positions]) -> _Slots:
        size = max(positions, default=0) + 1
        counts, apart = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.bool_)
        parts = []
        for number, at in positions.items():
            apart[number] = len(at.at) > 1
            own = at.at.numpy().T if apart[number] else np.array([at.groups[0]], np.int64).T
            counts[number] = len(own)
            parts.append(own)
        batch = max((part.shape[1] for part in parts), default=1)
        starts = np.zeros(size, dtype=np.int64)
        ordered = [*positions]
        starts[ordered] = np.cumsum(counts[ordered]) - counts[ordered]
        each = None
        if batch > 1:
            wide = [np.broadcast_to(part, (len(part), batch)) for part in parts]
            each = np.concatenate(wide).astype(np.int64)
        one = np.concatenate([part[:, 0] for part in parts] or [starts[:0]]).astype(np.int64)
        return cls(one, each, starts, counts, apart)

    def at(self, numbers: Integers) -> tuple[Integers, Integers]:
        """How many slots each of some positions has, and these: `[slots]` or `[slots, batch]`."""
        times = self.counts[numbers]
        which = within(self.starts[numbers], times)
        if self.each is not None and self.apart[numbers].any():
            return times, self.each[which]
        return times, self.one[which]


def cells_apart(cells: Cells) -> Booleans:
    """`[cells]`: of which the effects of the sites add up."""
    several = np.diff(cells.ends) > 1
    found: Booleans = ~several
    for number in several.nonzero()[0].tolist():
        found[number] = _are_apart(cells[number].sites)
    return found


def _are_apart(sites: Sequence[BoundSite]) -> bool:
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
