"""Activations that are read of a run, beside its logits: places of their own behind those.

A place is a row of numbers as wide as the vocabulary. An activation's are its first ones; the
others are nan, and so is all of it at padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nnpatch_core._upstream import noting_inputs
from nnpatch_core.adapters import Location, Place
from nnpatch_core.errors import AdapterError, MetricError
from nnpatch_core.spaces import Space, encoded
from nnpatch_core.tracing.cells import columns_of

#: Location to the activation `[rows, tokens, width]` that was there.
Caught: TypeAlias = dict[Location, Tensor]


@attrs.frozen(eq=False)
class ReadSite:
    """An activation that is read of every run.

    Args:
        place: where it is.
        head: one head, or None for the whole component.
        positions: `[batch, places]`, from 0; -1 where there is none.
        space: the part that is read, as coordinates; None is all of it.
    """

    place: Place
    head: int | None
    positions: Tensor
    space: Space | None = None

    def rows(self, rows: slice | Tensor) -> ReadSite:
        """See `WantedSite.rows`."""
        return attrs.evolve(self, positions=self.positions[rows])

    def real(self, mask: Tensor) -> Tensor:
        """See `WantedSite.real`."""
        there = mask.cpu().gather(1, self.positions.clamp(min=0)) == 1
        return there & (self.positions >= 0)

    def part(self, activation: Tensor) -> Tensor:
        """`[..., width]` of the whole activation, its own columns, or their coordinates."""
        columns = columns_of(self.place, self.head, activation.shape[-1])
        own = activation if columns is None else activation[..., columns.to(activation.device)]
        return own if self.space is None else encoded(self.space, own)


def taken(site: ReadSite, activation: Tensor, rows: Tensor, at: Tensor, vocab: int) -> Tensor:
    """The numbers of a place for some rows at some positions, `[..., vocab]`, on the CPU.

    Raises:
        MetricError: the activation is wider than the vocabulary.
    """
    device = activation.device
    values = site.part(activation[rows.to(device), at.to(device)]).to("cpu", torch.float32)
    spare = vocab - values.shape[-1]
    if spare < 0:
        raise MetricError(
            f"a metric reads {site.place.name} of layer {site.place.layer}, which is "
            f"{values.shape[-1]} wide: wider than the vocabulary of {vocab}, beside which it is "
            "kept; read a head of it"
        )
    return pad(values, (0, spare), value=torch.nan)


def joined(logits: Tensor, sites: Sequence[ReadSite], caught: Caught, mask: Tensor) -> Tensor:
    """Logits `[batch, places, vocab]`, and behind them a place for each position of each site."""
    parts = [logits]
    for site in sites:
        rows = torch.arange(len(logits), device="cpu")[:, None].expand_as(site.positions)
        activation = caught[site.place.location]
        values = taken(site, activation, rows, site.positions.clamp(min=0), logits.shape[-1])
        parts.append(values.masked_fill(~site.real(mask)[..., None], torch.nan))
    return torch.cat(parts, 1)


@contextmanager
def watching(model: nn.Module, sites: Sequence[ReadSite], tokens: int) -> Iterator[Caught]:
    """While this holds, the activations at some sites are caught as a forward goes on with them.

    Args:
        model: the Hugging Face model.
        sites: which.
        tokens: how many tokens of each row are run.
    """
    caught: Caught = {}

    def note(location: Location, value: Any) -> None:
        chosen = value[location[2]] if isinstance(value, tuple | list) else value
        caught[location] = chosen if chosen.ndim == 3 else chosen.view(-1, tokens, chosen.shape[-1])

    with ExitStack() as stack:
        for location in dict.fromkeys(site.place.location for site in sites):
            module = model.get_submodule(location[0].rstrip("."))
            if location[1] == "input":

                def noting(value: Any, at: Location = location) -> None:
                    note(at, value)

                try:
                    stack.enter_context(noting_inputs(module, noting))
                except AttributeError as error:
                    raise AdapterError(
                        f"a metric reads what goes into {location[0].rstrip('.')!r}, and this "
                        f"release of nnsight does not show it ({error}): read what a module gives"
                    ) from error
            else:

                def after(_: Any, __: Any, output: Any, at: Location = location) -> None:
                    note(at, output)

                stack.callback(module.register_forward_hook(after).remove)
        yield caught


def sites_of(sites: Sequence[Any]) -> tuple[ReadSite, ...]:
    """The same, as this room knows them."""
    return tuple(site for site in sites if isinstance(site, ReadSite))


def widths_of(logits: Tensor, places: Mapping[Any, Sequence[int]]) -> dict[Any, int]:
    """How many numbers each activation has at its places, by those that are no filling."""
    found = {}
    for site, columns in places.items():
        there = ~logits[:, [*columns]].isnan().flatten(0, 1).all(0)
        found[site] = int(there.nonzero().max()) + 1 if there.any() else 0
    return found
