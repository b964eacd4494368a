"""The one protocol of interventions, and the one function that puts what they give."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnpatch_core.adapters import Place
from nnpatch_core.seq_pos import Positions, spread
from nnpatch_core.spaces import Limit, Space, interchanged
from nnpatch_core.tracing.cells import BoundSite


@attrs.frozen(eq=False)
class PatchedTokens:
    """Tokens of patched runs; each tensor has one number a token, int64 on the CPU.

    Args:
        rows: `[tokens]`, the row of the activation that holds the patched run.
        cells: `[tokens]`, the number of the cell that is patched into the run.
        prompts: `[tokens]`, the number of its prompt.
        positions: `[tokens]`, the position in the prompt, from 0.
        sources: `[tokens]`, the position of the source prompt that goes there.
    """

    rows: Tensor
    cells: Tensor
    prompts: Tensor
    positions: Tensor
    sources: Tensor


class Intervention(Protocol):
    """The values that a sweep puts at its sites."""

    @property
    def mask(self) -> Tensor:
        """`[batch, seq]`: 1 where a token may be patched, 0 where it stays, as padding does."""
        ...

    @property
    def by_cell(self) -> bool:
        """Whether the value depends on the cell; if not, one answer does for all cells."""
        ...

    def patched(self, place: Place, there: Tensor, tokens: PatchedTokens) -> Tensor:
        """The activation as patched, at some tokens of some patched runs.

        All columns count: whoever patches one head takes its columns from this.

        Args:
            place: where the activation is.
            there: `[tokens, width]`, the activation of these runs as it stands.
            tokens: which tokens these are.

        Returns:
            `[tokens, width]`, on the device and in the dtype of `there`.
        """
        ...


@runtime_checkable
class Prepared(Protocol):
    """An intervention that runs the model itself for its values, before they are put."""

    def ready(self, cells: Tensor, prompts: Tensor) -> None:
        """Make the values of some patched runs, outside of any trace.

        Args:
            cells: `[runs]`, int64 on the CPU: the number of each run's cell.
            prompts: `[runs]`, the number of its prompt.
        """
        ...

    def moves(self, cell: int, site: BoundSite) -> Tensor:
        """`[batch, seq]`, bool on the CPU: where a cell may change anything at one of its sites."""
        ...


def put(
    activation: Tensor,
    place: Place,
    tokens: PatchedTokens,
    intervention: Intervention,
    *,
    start: int = 0,
    columns: Tensor | None = None,
    space: Space | None = None,
) -> None:
    """Put an intervention's values into an activation, in place.

    Args:
        activation: `[rows, tokens from start, width]`.
        place: where it is.
        tokens: which tokens are patched.
        intervention: what is put there.
        start: the position of the activation's first token.
        columns: `[columns]` that are put at every token, or `[tokens, columns]`, those of each, or
            `[tokens, heads, columns]`; None is all.
        space: the part of these columns that is put; None is all of them.
    """
    if not len(tokens.rows):
        return
    device = activation.device
    rows, offsets = tokens.rows.to(device), (tokens.positions - start).to(device)
    there = activation[rows, offsets]
    values = intervention.patched(place, there, tokens)
    if columns is None:
        activation[rows, offsets] = values if space is None else interchanged(space, values, there)
        return
    chosen = columns.to(device)
    chosen = chosen[None] if chosen.ndim == 1 else chosen
    chosen = chosen.expand(len(rows), *chosen.shape[1:])
    # Each of them an index, of as many axes as the columns have.
    numbers = torch.arange(len(rows), device=device), rows, offsets
    every, rows, offsets = (each.view(-1, *[1] * (chosen.ndim - 1)) for each in numbers)
    own = values[every, chosen]
    if space is not None:
        own = interchanged(space, own, there[every, chosen])
    activation[rows, offsets, chosen] = own


def tokens_of(mask: Tensor, positions: Positions | None = None, cell: int = 0) -> PatchedTokens:
    """The tokens of one cell that an intervention may patch, each prompt in its own row.

    Args:
        mask: `[batch, seq]`, as of an `Intervention`.
        positions: only these, with their sources; None is all.
        cell: the cell's number.
    """
    patched = mask.bool().cpu()
    if positions is not None:
        patched = patched & positions.mask(patched.shape[1])
    prompts, where = patched.nonzero().T
    sources = where
    if positions is not None and positions.source is not None:
        wide = spread(positions.at, patched.shape[1], positions.source)
        sources = wide.expand(len(patched), -1)[prompts, where]
    return PatchedTokens(prompts, torch.full_like(prompts, cell), prompts, where, sources)


# The weights of an autoencoder may want gradients, and what is put is a constant.
@torch.no_grad()
def as_patched(
    activation: Tensor,
    place: Place,
    intervention: Intervention,
    positions: Positions | None = None,
    cell: int = 0,
    limit: Limit | None = None,
    start: int = 0,
) -> Tensor:
    """A copy of `[batch, seq, width]` in which all that may be patched is.

    Args:
        activation: what stands there.
        place: where it is.
        intervention: what is put there.
        positions: only at these, with their sources; None is all.
        cell: the cell's number, for an intervention that looks at it.
        limit: only this part of the component, or of each of its heads; None is all of it.
        start: the position of the activation's first token; left of it nothing is patched.
    """
    patched, mask = activation.detach().clone(), intervention.mask
    if start:
        mask = mask.clone()
        mask[:, :start] = 0
    tokens = tokens_of(mask, positions, cell)
    if limit is None:
        put(patched, place, tokens, intervention, start=start)
        return patched
    columns = place.columns(activation.shape[-1])
    if columns is not None:
        columns = (columns if limit.by_head else columns.flatten())[None]
    put(patched, place, tokens, intervention, start=start, columns=columns, space=limit.space)
    return patched


def differs(
    activation: Tensor,
    place: Place,
    intervention: Intervention,
    positions: Positions | None = None,
    cell: int = 0,
    limit: Limit | None = None,
    start: int = 0,
) -> Tensor:
    """`[batch, seq, heads or 1]`, bool: where patching changes the activation, bitwise.

    Arguments are those of `as_patched`; it is of all positions, those left of `start` too.
    """
    patched = as_patched(activation, place, intervention, positions, cell, limit, start)
    other = _bits(activation) != _bits(patched)
    columns = place.columns(activation.shape[-1])
    by_head = other[..., None, :] if columns is None else other[..., columns.to(other.device)]
    return pad(by_head.any(-1), (0, 0, start, 0))


def _bits(value: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.detach().contiguous().view(kinds[value.element_size()])


def put_site(activation: Tensor, site: BoundSite, cell: int, intervention: Intervention) -> None:
    """Put an intervention's values at one site of every prompt, in place.

    Args:
        activation: `[batch, seq, width]`.
        site: the site.
        cell: the number of its cell.
        intervention: what is put there.
    """
    tokens = tokens_of(intervention.mask, site.positions, cell)
    columns = site.columns(activation.shape[-1])
    put(activation, site.place, tokens, intervention, columns=columns, space=site.space)
