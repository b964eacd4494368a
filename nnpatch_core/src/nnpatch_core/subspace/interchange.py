"""Pairs of prompts whose activations at one site are interchanged over and over."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import as_nnsight, module_of
from nnpatch_core._printable import shown
from nnpatch_core._warnings import warn
from nnpatch_core.adapters import Location
from nnpatch_core.engine import Choice, Replay, check_engine, choose_engines, last_logits
from nnpatch_core.errors import (
    AnswerWarning,
    EngineError,
    EngineWarning,
    MemoryBudgetError,
    PromptWarning,
    SubspaceError,
    TokensError,
)
from nnpatch_core.gradients import graph_limits
from nnpatch_core.interventions import PairArguments, PairRuns, Recorded, read_pairs
from nnpatch_core.memory import host_memory, in_units
from nnpatch_core.plugins import find_adapter
from nnpatch_core.prompts import PromptPairs
from nnpatch_core.site import Site
from nnpatch_core.sites import Sites
from nnpatch_core.spaces import SiteRecord, Space, Subspace
from nnpatch_core.sweep import Options, Sweep, Values, digest, prepare, run_unpatched
from nnpatch_core.tracing import BoundSite, forward, record, width_of


@attrs.frozen(eq=False)
class Found:
    """Pairs of prompts, and a site in the model, before anything runs.

    Args:
        sweep: the site, found in the model, and the memory that there is.
        named: the site, as the user names it.
        runs: the pairs.
        values: what is put there.
        usable: `[usable]`, the numbers of the pairs that tell something: their answers differ, and
            they have a token at the site.
        choice: the engines that may run them.
    """

    sweep: Sweep
    named: Site
    runs: PairRuns
    values: Values
    usable: Tensor
    choice: Choice

    @property
    def site(self) -> BoundSite:
        """The site, found in the model."""
        (site,) = self.sweep.patches.cells[0].sites
        return site

    @property
    def width(self) -> int | None:
        """The width of the activation, of the head's if one is named; None before a run tells."""
        whole = width_of(self.site.place)
        return None if whole is None else _own_width(self.site, whole)

    @property
    def keys(self) -> Tensor:
        """`[pairs]`: a number that pairs of the same prompts share, padding aside."""
        runs, keys = self.runs, []
        for number in range(len(runs.target)):
            parts = [
                batch.tokens[number][batch.mask[number].bool()].cpu()
                for batch in (runs.source, runs.target)
            ]
            keys.append(int(digest(*parts), 16))
        return torch.tensor(keys, dtype=torch.int64, device="cpu")


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
        return _own_width(self.site, self.source[self.site.place.location].shape[-1])

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


def find_pairs(
    nnmodel: Any,
    api: Any,
    site: Any,
    pairs: Any,
    *,
    engine: str = "auto",
    memory_budget: Any = None,
) -> Found:
    """Find a site in the model, and the pairs that tell something there; nothing runs.

    Args:
        nnmodel: the model.
        api: an adapter, its name, or None to find it by the model.
        site: a `Site`, or `Sites` of one cell.
        pairs: a `PromptPairs`.
        engine: as for `activation_patching`.
        memory_budget: as for `activation_patching`.

    Raises:
        PatchingError: one of its kinds.

    Warns:
        PromptWarning: some pairs tell nothing.
        AnswerWarning: of answers of several tokens, and of sets, the first alone counts.
    """
    check_engine(engine)
    if not isinstance(pairs, PromptPairs):
        raise TokensError(f"pairs must be a PromptPairs, got {shown(pairs)}")
    sites = Sites.from_sites([site]) if isinstance(site, Site) else site
    if not hasattr(sites, "grids") or isinstance(sites, type):
        raise SubspaceError(f"site must be a Site, or Sites of one cell, got {shown(site)}")
    traced = as_nnsight(nnmodel)
    runs = _by_first_tokens(read_pairs(traced, PairArguments(pairs, None)))
    sweep, runs = prepare(
        traced, api, sites, runs, "logit_difference", Options(memory_budget=memory_budget)
    )
    cells = sweep.patches.cells
    if not cells:
        raise SubspaceError("no pair has a token at the site: name other positions")
    if len(cells) != 1 or len(cells[0].sites) != 1:
        count = max(len(cells), len(cells[0].sites))
        raise SubspaceError(
            f"a subspace is of one site, and there are {count}: name one layer, component, head "
            "and group of positions; sweep_subspaces takes several in turn"
        )
    values = runs.values(sweep)
    usable = _usable(runs, sweep.layout.present(values.mask)[0])
    (named,) = cells[0].named.sites
    choice = choose_engines(engine, sweep.patches)
    return Found(sweep, from_end(named, sweep.seq_len), runs, values, usable, choice)


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


def _own_width(site: BoundSite, whole: int) -> int:
    """The width of a site's columns, of an activation that is so wide."""
    columns = site.columns(whole)
    return whole if columns is None else len(columns)


def _run_exactly(sweep: Sweep, runs: PairRuns) -> Tensor:
    """`[pairs, vocab]`, the logits of the target runs as the model gives them, on the CPU."""
    kept = last_logits()
    return torch.cat(
        [
            forward(sweep.nnmodel, runs.target.rows(chunk), kept=kept).detach().cpu()
            for chunk in sweep.chunks
        ]
    )


def _by_first_tokens(runs: PairRuns) -> PairRuns:
    """The runs, of whose answers no more is known than their first tokens, which is said."""
    names = {"answer_tokens": "tokens of each answer", "answers": "answers of each set"}
    for name, told in names.items():
        count = max(runs.several.get(f"{run}_{name}", 0) for run in ("source", "target"))
        if count:
            warn(
                f"the first of up to {count} {told} is learned and looked at, and no other: give "
                "answers that differ in it",
                AnswerWarning,
            )
    return attrs.evolve(runs, several={})


def _usable(runs: PairRuns, present: Tensor) -> Tensor:
    differ = runs.source_answers.cpu() != runs.target_answers.cpu()
    reasons = {
        "their two answers begin with the same token": ~differ,
        "they have no token at the site": differ & ~present,
    }
    for reason, left_out in reasons.items():
        numbers = left_out.nonzero().flatten().tolist()
        if numbers:
            few = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
            warn(
                f"{len(numbers)} of {len(differ)} pairs are left out, as {reason}: {few}",
                PromptWarning,
            )
    usable = (differ & present).nonzero().flatten()
    if not len(usable):
        raise SubspaceError(
            "no pair is left: in each the two answers are the same token, or there is no token at "
            "the site"
        )
    return usable


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
        logits = run_unpatched(sweep.nnmodel, runs.target, sweep.chunks)
    return replay, logits, fallback


def _elsewhere(sweep: Sweep) -> bool:
    """Whether the model is on a device with memory of its own."""
    weight = next(sweep.patches.model.parameters())
    return weight.device.type != "cpu"


def _expected(sweep: Sweep) -> bool:
    """Whether the cone engine was to be expected, by the adapters."""
    return all(getattr(api, "cone", True) for api in sweep.patches.adapters)


def from_end(site: Site, seq_len: int) -> Site:
    """A site at the last token of prompts of one width as one at the last token of any."""
    if site.seq_pos == (seq_len - 1,):
        return attrs.evolve(site, seq_pos=(-1,))
    return site


def site_of(nnmodel: Any, api: Any, where: Any) -> tuple[Any, Space | None]:
    """The site that an argument names, and the space that it brings.

    Args:
        nnmodel: the model.
        api: an adapter, its name, or None to find it by the model.
        where: a `Site`, `Sites`, or a subspace (or what was learned), which stands for the site
            where it was made.

    Raises:
        SubspaceError: a subspace that does not know where it was made.
    """
    space = getattr(where, "subspace", None)
    if isinstance(where, Site):
        return where, space
    if isinstance(where, Sites):
        if space is not None and not hasattr(space, "encode"):
            raise SubspaceError("give one subspace, not one for each layer")
        return where, space
    own = where if isinstance(where, Subspace) else space
    if not isinstance(own, Subspace):
        return where, None
    return site_at(nnmodel, api, own.site, own), own


def site_at(nnmodel: Any, api: Any, at: SiteRecord | None, space: Space) -> Site:
    """The site that a record tells of.

    Raises:
        SubspaceError: there is no record, or its positions differ from prompt to prompt.
    """
    if at is None:
        raise SubspaceError(
            f"{space} does not say where it was made: name the site, as "
            "Site.get_site(api, 'resid', layer, seq_pos=[-1], subspace=S)"
        )
    if at.where is not None:
        raise SubspaceError(
            f"{space} was made at {at.where}, which are others in other prompts: name the site"
        )
    adapter = find_adapter(api, module_of(nnmodel))
    return Site.get_site(adapter, at.component, at.layer, at.head, at.seq_pos, subspace=space)
