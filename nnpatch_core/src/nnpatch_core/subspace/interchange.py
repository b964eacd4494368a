"""Pairs of prompts whose activations at one site are interchanged over and over."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._warnings import warn
from nnpatch_core.adapters import Location
from nnpatch_core.engine import Replay, last_logits
from nnpatch_core.errors import (
    EngineError,
    EngineWarning,
    MemoryBudgetError,
)
from nnpatch_core.gradients import graph_limits
from nnpatch_core.interventions import PairRuns, Recorded
from nnpatch_core.memory import host_memory, in_units
from nnpatch_core.site import Site
from nnpatch_core.spaces import Space
from nnpatch_core.subspace.found import Found, find_pairs, own_width
from nnpatch_core.sweep import Sweep, Values, run_unpatched
from nnpatch_core.tracing import BoundSite, forward, record


@attrs.frozen(eq=False)
class Interchange:
    """Pairs of prompts, ready to be interchanged at one site.

    Args:
        found: the pairs, and the site.
        replay: the target runs, to be patched.
        source: by location, the activations of the source runs, `[pairs, seq, width]`.
        tops: the most likely tokens after the source and the target prompts, `[pairs]` each.
        unpatched: `[pairs, vocab]`, the logits of the target runs, on the CPU; None if they are not
            kept.
        fallback: why the replay is not the engine that was to be expected; None if it is.
    """

    found: Found
    replay: Replay
    source: dict[Location, Tensor]
    tops: tuple[Tensor, Tensor]
    unpatched: Tensor | None
    fallback: str | None

    @property
    def sweep(self) -> Sweep:
        """See `Found`."""
        return self.found.sweep

    @property
    def named(self) -> Site:
        """See `Found`."""
        return self.found.named

    @property
    def runs(self) -> PairRuns:
        """See `Found`."""
        return self.found.runs

    @property
    def usable(self) -> Tensor:
        """See `Found`."""
        return self.found.usable

    @property
    def site(self) -> BoundSite:
        """See `Found`."""
        return self.found.site

    @property
    def keys(self) -> Tensor:
        """See `Found`."""
        return self.found.keys

    @property
    def width(self) -> int:
        """The width of the activation, of the head's if one is named."""
        return own_width(self.site, self.source[self.site.place.location].shape[-1])

    def logits(self, pairs: Tensor, space: Space | None, *, gradients: bool = False) -> Tensor:
        """The logits `[rows, vocab]` after the patched target prompts of some pairs."""
        return self.replay.logits(pairs, space, gradients=gradients)

    def at_once(self, gradients: bool, most: int) -> int:
        """How many pairs may run together, at most `most`."""
        sweep, place = self.sweep, self.site.place
        seq_len = sweep.seq_len
        if self.replay.name == "cone":
            groups = (self.site.positions.group(prompt) for prompt in self.usable.tolist())
            seq_len -= min(map(min, groups))
        layers = sweep.patches.n_layers - place.layer if gradients else 1
        given = sweep.options.memory_budget is not None
        limits = graph_limits(
            sweep.limits, sweep.batch, seq_len, layers, given=given, batch_size=most, held=False
        )
        return limits.prompts

    def like(self, basis: Tensor) -> Tensor:
        """A basis where the activations of the model are, in float32 at least."""
        weight = next(self.sweep.patches.model.parameters())
        kind = torch.promote_types(weight.dtype, torch.float32)
        return basis.to(self.source[self.site.place.location].device, kind)

    def activations(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """The activations at the site in both runs of some pairs, `[many, width]` each.

        All positions of the site count. The target prompts run once more for that.
        """
        place, location = self.site.place, self.site.place.location
        parts = []
        for chunk in self.sweep.chunks:
            store = self.sweep.limits.store
            found = record(self.sweep.nnmodel, self.runs.target.rows(chunk), [place], store)[1]
            parts.append(found[location])
        target = torch.cat(parts)
        return self._picked(self.source[location], pairs, True), self._picked(target, pairs, False)

    def _picked(self, activation: Tensor, pairs: Tensor, source: bool) -> Tensor:
        positions = self.site.positions
        at = positions.at.expand(len(activation), -1)
        taken = positions.source if source and positions.source is not None else positions.at
        taken = taken.expand(len(activation), -1)
        real = (self.found.values.mask.cpu() == 1).gather(1, at.clamp(min=0)) & (at >= 0)
        chosen = torch.zeros(len(activation), dtype=torch.bool, device="cpu")
        chosen[pairs] = True
        rows, columns = (real & chosen[:, None]).nonzero().T
        where = rows.to(activation.device), taken[rows, columns].to(activation.device)
        values = activation[where]
        own = self.site.columns(activation.shape[-1])
        return values if own is None else values[:, own.to(values.device)]


def record_pairs(found: Found, *, unpatched: bool = False) -> Interchange:
    """Record the pairs, so that they can be patched at the site over and over.

    Args:
        found: the pairs, and the site.
        unpatched: whether the logits of the target runs are kept.

    Raises:
        PatchingError: one of its kinds.

    Warns:
        EngineWarning: the cone engine cannot do it, so that each step is a whole forward.
    """
    sweep, runs, mask = found.sweep, found.runs, found.values.mask
    source, tops = _record_source(sweep, found.values)
    location = found.site.place.location

    def put(rows: Tensor) -> Recorded:
        at = rows.to(source[location].device)
        return Recorded({location: source[location][at]}, mask[rows.to(mask.device)])

    replay, logits, fallback = _open_replay(sweep, runs, found.choice, put)
    both, kept = (tops, logits.argmax(-1)), None
    if unpatched:
        # Of a model in float64 these are rounded.
        exact = next(sweep.patches.model.parameters()).dtype != torch.float64
        kept = logits if exact else _run_exactly(sweep, runs)
    return Interchange(found, replay, source, both, kept, fallback)


def open_interchange(
    nnmodel: Any,
    api: Any,
    site: Any,
    pairs: Any,
    *,
    unpatched: bool = False,
    **known: Any,
) -> Interchange:
    """`find_pairs`, and then `record_pairs`: see there for arguments, errors and warnings."""
    return record_pairs(find_pairs(nnmodel, api, site, pairs, **known), unpatched=unpatched)


def _run_exactly(sweep: Sweep, runs: PairRuns) -> Tensor:
    """`[pairs, vocab]`, the logits of the target runs as the model gives them, on the CPU."""
    kept = last_logits()
    return torch.cat(
        [
            forward(sweep.nnmodel, runs.target.rows(chunk), kept=kept).detach().cpu()
            for chunk in sweep.chunks
        ]
    )


def _record_source(sweep: Sweep, values: Values) -> tuple[dict[Location, Tensor], Tensor]:
    """The activations of the source runs, and the most likely tokens after them."""
    tops, parts = [], []
    (place,) = sweep.patches.places
    for chunk in sweep.chunks:
        logits, intervention = values.of(sweep, chunk)
        assert logits is not None
        assert isinstance(intervention, Recorded)
        tops.append(logits.argmax(-1))
        parts.append(intervention.activations[place.location])
    return {place.location: torch.cat(parts)}, torch.cat(tops)


def _open_replay(
    sweep: Sweep, runs: PairRuns, choice: Any, put: Any
) -> tuple[Replay, Tensor, str | None]:
    """The replay, the logits of the target runs, and why it is not the engine to be expected."""
    limits, fallback = sweep.limits, choice.fallback
    needed, store = sweep.batch * limits.needs.recorded, limits.store
    room = limits.usable // 2
    if store is None and needed > room and _elsewhere(sweep):
        store = torch.device("cpu")
    if store is not None:
        room = host_memory()
    engines = list(choice.engines)
    if needed > room and engines[0].name == "cone":
        told = (
            f"the recorded runs of {sweep.batch} pairs take up to {in_units(needed)}, and there is "
            f"room for {in_units(room)}"
        )
        if len(engines) == 1:
            raise MemoryBudgetError(f"{told}: raise memory_budget=, or give fewer pairs")
        engines, fallback = engines[1:], told
    for engine in engines:
        try:
            replay, logits = engine.open_replay(
                sweep.patches, runs.target, put, sweep.chunks, store
            )
            break
        except EngineError as error:
            if engine is engines[-1]:
                raise
            fallback = str(error)
    if replay.name != "cone" and fallback and _expected(sweep):
        warn(
            f"each step runs whole forwards, in the full engine: {fallback}. engine='full' asks "
            "for it without this warning",
            EngineWarning,
        )
    if logits is None:
        logits = run_unpatched(sweep, runs.target, sweep.chunks)
    return replay, logits, fallback


def _elsewhere(sweep: Sweep) -> bool:
    """Whether the model is on a device with memory of its own."""
    weight = next(sweep.patches.model.parameters())
    return weight.device.type != "cpu"


def _expected(sweep: Sweep) -> bool:
    """Whether the cone engine was to be expected, by the adapters."""
    return all(getattr(api, "cone", True) for api in sweep.patches.adapters)
