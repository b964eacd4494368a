"""Requests to a model that is elsewhere, and answers: plain numbers, texts and tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import Elsewhere, attribute_path, forward_arguments
from nnpatch_core._upstream import has_api_key
from nnpatch_core.adapters import Location, Place, in_order
from nnpatch_core.batch import Batch
from nnpatch_core.errors import AdapterError, RemoteError
from nnpatch_core.spaces import Space, Subspace
from nnpatch_core.tracing.cells import BoundSite, Cell, columns_of
from nnpatch_core.tracing.elsewhere.body import At, Put, Tokens, Where
from nnpatch_core.tracing.elsewhere.travelling import travelling
from nnpatch_core.tracing.put import tokens_of
from nnpatch_core.tracing.widths import width_of

#: The most cells of a request: so a bar moves, a checkpoint is kept, and a server keeps its time.
_CELLS = 64
#: Bytes of logits that come back at once, of more than one cell.
_BYTES = 2**25
_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Origin:
    """Where values that are put come from, in plain words: of neither there are none but zeros.

    Args:
        run: a run that is made there.
        given: `[batch or 1, positions, width]` of each location, which goes along.
        offset: what is added to a position of the source to get that of the run, or in what is
            given.
    """

    run: Batch | None = None
    given: Mapping[Location, Tensor] | None = None
    offset: int = 0


@runtime_checkable
class Sendable(Protocol):
    """An intervention that can be told in plain words."""

    @property
    def mask(self) -> Tensor:
        """See `Intervention.mask`."""
        ...

    def origin(self) -> Origin:
        """Where its values come from."""
        ...


def logits_there(nnmodel: Elsewhere, batch: Batch) -> Tensor:
    """The logits of prompts with nothing patched, as `forward` gives them."""
    asked = _Asked(nnmodel, batch, [], Origin(), torch.zeros_like(batch.mask))
    return asked.logits([[]], None)[0]


def patched_there(
    nnmodel: Elsewhere, target: Batch, cells: Sequence[Cell], values: Sendable, ids: Tensor | None
) -> Iterator[Tensor]:
    """The logits of cells, each patched alone into all prompts, several of them in a request.

    Args:
        nnmodel: the model.
        target: the prompts.
        cells: what is patched.
        values: what is put there.
        ids: which ids of the vocabulary are looked at; None is all.

    Yields:
        For each request `[cells, batch, ids]` or `[cells, batch, places, ids]`, in float32 on the
        CPU.
    """
    places = 1 if target.read is None else target.read.shape[1]
    columns = _vocabulary(nnmodel) if ids is None else len(ids)
    several = max(min(_CELLS, _BYTES // (4 * len(target) * places * columns)), 1)
    origin = values.origin()
    for first in range(0, len(cells), several):
        some = [cells[number] for number in range(first, min(first + several, len(cells)))]
        sites = [site for cell in some for site in cell.sites]
        asked = _Asked(nnmodel, target, sites, origin, values.mask)
        yield asked.logits([asked.puts(cell) for cell in some], ids)


def totals_there(
    nnmodel: Elsewhere, batch: Batch, places: Sequence[Place], seq_len: int, per_position: bool
) -> dict[Location, Tensor]:
    """For each place what `total` gives of the activation of prompts, on the CPU."""
    return _added(nnmodel, batch, places, seq_len, per_position, None)


def tokens_there(
    nnmodel: Elsewhere, batch: Batch, places: Sequence[Place], prompts: Tensor, positions: Tensor
) -> dict[Location, Tensor]:
    """For each place `[tokens, width]` of some tokens of prompts, in float32 on the CPU."""
    tokens = prompts.tolist(), positions.tolist(), positions.tolist()
    return _added(nnmodel, batch, places, 0, False, tokens)


def why_not_sent(space: Space | None) -> str | None:
    """Why a part of activations cannot be told to where nnpatch is not; None if it can."""
    if space is None or type(space) is Subspace:
        return None
    return f"{space} is code, and not a Subspace, of which the basis would go"


def _added(
    nnmodel: Elsewhere,
    batch: Batch,
    places: Sequence[Place],
    seq_len: int,
    per_position: bool,
    tokens: Tokens | None,
) -> dict[Location, Tensor]:
    order = {place.location: _at(place) for place in in_order(dict.fromkeys(places))}
    batch = batch.to(_CPU)
    arguments = _arguments(nnmodel, batch)[0]
    at = list(order.values())
    sums = _ask(nnmodel, "add_up", arguments, batch.mask, at, seq_len, per_position, tokens)
    return dict(zip(order, sums, strict=True))


class _Asked:
    """Requests for runs of some prompts: what is said of them but once.

    Args:
        nnmodel: the model.
        target: the prompts.
        sites: all that may be patched.
        origin: where values come from.
        mask: `[batch, seq]`: 1 where a token may be patched.
    """

    def __init__(
        self,
        nnmodel: Elsewhere,
        target: Batch,
        sites: Sequence[BoundSite],
        origin: Origin,
        mask: Tensor,
    ) -> None:
        self._nnmodel, self._target, self._origin = nnmodel, target.to(_CPU), origin
        self._mask = mask
        order = in_order(dict.fromkeys(site.place for site in sites))
        self._number = {
            location: number
            for number, location in enumerate(dict.fromkeys(each.location for each in order))
        }
        self._at = list({place.location: _at(place) for place in order}.values())
        self._tokens: list[Tokens] = []
        self._token_number: dict[int, int] = {}
        self._columns: dict[tuple[int, int | None, str], list[int] | None] = {}
        self._bases: list[Tensor] = []
        self._basis_number: dict[int, int] = {}
        self._taken: dict[int, dict[int, None]] = {number: {} for number in range(len(self._at))}

    def puts(self, cell: Cell) -> list[Put]:
        """All that is put for a cell, in execution order."""
        return [put for site in cell.sites if (put := self._put(site)) is not None]

    def logits(self, cells: Sequence[Sequence[Put]], ids: Tensor | None) -> Tensor:
        """The logits of patched runs, `[cells, ...]` as `forward` gives each."""
        arguments, where = _arguments(self._nnmodel, self._target)
        origin, taken = self._origin, {key: [*each] for key, each in self._taken.items() if each}
        source = None if origin.run is None else _arguments(self._nnmodel, origin.run.to(_CPU))[0]
        given = None
        if origin.given is not None:
            by_number = {self._number.get(at): value for at, value in origin.given.items()}
            given = {number: by_number[number].cpu() for number in taken}
        if not taken:
            source, given = None, None
        found = _ask(
            self._nnmodel,
            "run_cells",
            arguments,
            source,
            given,
            self._at,
            self._tokens,
            taken,
            cells,
            self._bases,
            where,
            None if ids is None else ids.tolist(),
        )
        return self._read(found, len(cells))

    def _put(self, site: BoundSite) -> Put | None:
        number, each = self._number[site.place.location], self._number_of(site)
        if not self._tokens[each][0]:
            return None
        self._taken[number][each] = None
        basis = None
        if isinstance(site.space, Subspace):
            basis = self._basis_number.setdefault(id(site.space), len(self._bases))
            if basis == len(self._bases):
                self._bases.append(site.space.basis)
        return number, each, self._columns_of(site), basis

    def _number_of(self, site: BoundSite) -> int:
        """The number of a site's tokens."""
        key = id(site.positions)
        if key not in self._token_number:
            tokens = tokens_of(self._mask, site.positions)
            sources = tokens.sources + self._origin.offset
            self._token_number[key] = len(self._tokens)
            self._tokens.append(
                (tokens.prompts.tolist(), tokens.positions.tolist(), sources.tolist())
            )
        return self._token_number[key]

    def _columns_of(self, site: BoundSite) -> list[int] | None:
        if site.place.component.heads is None:
            return None
        key = self._number[site.place.location], site.head, site.place.name
        if key not in self._columns:
            width = width_of(site.place)
            if width is None:
                raise RemoteError(
                    f"how wide {site.place.name} of layer {site.place.layer} is only a run can "
                    "tell, and heads are told by columns, which go along: sweep it without heads"
                )
            columns = columns_of(site.place, site.head, width)
            self._columns[key] = None if columns is None else columns.tolist()
        return self._columns[key]

    def _read(self, found: Any, count: int) -> Tensor:
        """The logits that came back, in float32; nan where nothing is to be read."""
        batch = self._target
        places = () if batch.read is None else (batch.read.shape[1],)
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        if not isinstance(found, Tensor) or shape[:-1] != [count, len(batch), *places]:
            raise AdapterError(
                f"logits [cells, batch, vocab] were asked for, and {shape} came back: load a "
                "language model, with task='text-generation'"
            )
        logits = found.to(torch.float32)
        return (
            logits if not places else logits.masked_fill(batch.read_padding[..., None], torch.nan)
        )


def _arguments(nnmodel: Elsewhere, batch: Batch) -> tuple[dict[str, Any], Where]:
    """The arguments of a forward, and where its logits are read."""
    arguments = forward_arguments(nnmodel.module, batch)
    if batch.read is None:
        return arguments, None
    asked, columns = torch.unique(batch.read, return_inverse=True)
    if "logits_to_keep" in arguments:
        arguments["logits_to_keep"] = asked
    return arguments, (columns.tolist(), batch.read.tolist(), len(asked))


def _at(place: Place) -> At:
    return attribute_path(place.path), place.component.side, place.component.item


def _vocabulary(nnmodel: Elsewhere) -> int:
    config: Any = nnmodel.module.config
    return int(config.get_text_config().vocab_size)


def _words(nnmodel: Elsewhere, error: Exception) -> str:
    # What fails there comes with all that it was called by.
    lines = str(error).strip().splitlines() or ["it gave no reason"]
    told = f"a run failed that was sent to {nnmodel.where}: {type(error).__name__}: {lines[-1]}"
    if not nnmodel.away:
        return told
    key = "" if has_api_key() else ", and nnsight knows no API key: nnsight.login() keeps yours"
    return (
        f"{told}. nnsight.status() says which models run on NDIF{key}. What was measured is kept "
        "with checkpoint=, from where the same call goes on"
    )


def _ask(nnmodel: Elsewhere, name: str, *arguments: Any) -> Any:
    """Run one of the functions that travel.

    Raises:
        RemoteError: it cannot be sent, the server cannot be reached, or it fails there.
    """
    path = [*sys.path]
    try:
        return travelling(name)(nnmodel.nnmodel, nnmodel.remote, *arguments)
    except torch.OutOfMemoryError:
        raise
    except RemoteError:
        raise
    except Exception as error:
        raise RemoteError(_words(nnmodel, error)) from error
    finally:
        # For a while `remote="local"` hides the modules of this process, and changes their order.
        sys.path[:] = path
