"""How a sweep is cut to the memory that it may use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from nnpatch_core._devices import numbered
from nnpatch_core._models import Elsewhere, input_device
from nnpatch_core.errors import MemoryBudgetError
from nnpatch_core.memory.costs import in_units
from nnpatch_core.memory.free import host_memory
from nnpatch_core.memory.needs import (
    Needs,
    memory_budget,
    memory_budgets,
    needs_of,
)
from nnpatch_core.memory.pieces import Beginning, Pieces, pieces_of
from nnpatch_core.memory.placement import Placement
from nnpatch_core.memory.rooms import Room, budget_word, share
from nnpatch_core.tracing import Patches

_HOST = torch.device("cpu")
#: How many rows of logits metrics are tried out on, and copies of them.
_TRIED = 40
#: In host memory the allocator keeps pieces of what is freed: about so much, whatever the budget.
_ALLOCATOR = 16 * 2**20
#: How many tokens run together where nobody says, in a process whose memory is not known.
_TOKENS_AWAY = 4096


@attrs.frozen
class Gathered:
    """Logits that wait in host memory until those of all prompts of a cell are there.

    Args:
        metrics: the names of the metrics that wait for them.
        cells: of how many cells at most.
        whole: whether they are of the whole vocabulary.
    """

    metrics: tuple[str, ...]
    cells: int
    whole: bool

    def least(self, logits: int) -> int:
        """Bytes for one cell: what is given to a metric, and what that is copied from.

        `logits` is what those of all prompts take. Of some tokens' there is little to copy.
        """
        return 2 * logits if self.whole else logits

    @property
    def advice(self) -> str:
        """How to do with less."""
        names = ", ".join(map(repr, self.metrics))
        alone = f"declare {names} with @per_prompt, if each prompt has a number of its own"
        return f"{alone}, or with @reads_tokens, if it reads but a few" if self.whole else alone

    def words(self, needed: int, batch: int) -> str:
        """The need, in words."""
        names = ", ".join(map(repr, self.metrics))
        return f"the logits of {batch} prompts, given to {names} together, {in_units(needed)}"


@attrs.frozen(eq=False)
class Limits:
    """The memory that a sweep may use, and what follows from it.

    Args:
        needs: what the sweep needs.
        budget: bytes that it may use on the device besides the weights.
        usable: how many of them there are for recorded runs and rows.
        prompts: how many prompts run together.
        store: where recorded runs lie; None is where they were computed.
        gathered: bytes of host memory for cells whose logits wait, besides the first one.
        pieces: how prompts are run one after another in pieces; None is at once.
        at_once: bytes of budget in which the prompt would fit at once, where it runs in pieces.
        rooms: what each device has, where the model lies on several; `budget` and `usable` are then
            those of the one with the least.
    """

    needs: Needs
    budget: int
    usable: int
    prompts: int
    store: torch.device | None
    gathered: int = 0
    pieces: Pieces | None = None
    at_once: int = 0
    rooms: tuple[Room, ...] = ()

    @property
    def word(self) -> str:
        """The budget as a word, which `read_budget` reads."""
        return budget_word(self.budget, self.rooms)

    def less(self, count: int) -> Limits:
        """The same, with so many bytes less to use, on each device."""
        rooms = tuple(attrs.evolve(room, usable=room.usable - count) for room in self.rooms)
        return attrs.evolve(self, usable=self.usable - count, rooms=rooms)

    @property
    def recorded(self) -> int:
        """Bytes on the device that the recorded run of a prompt takes."""
        return self.needs.ahead if self.store is not None else self.needs.recorded

    @property
    def edges(self) -> list[tuple[int, int]]:
        """The pieces in which prompts are run before the last one; none where all runs at once."""
        return [] if self.pieces is None else self.pieces.edges

    def chunks(self, batch: int, size: int | None = None) -> list[slice]:
        """The prompts that run together, of `batch` prompts; `size` of them, if that is given."""
        size = size or self.prompts
        return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]

    def cells(self, batch: int, columns: int) -> int:
        """Of how many cells the logits may wait at once: `columns` of them for each prompt."""
        return 1 + self.gathered // (4 * batch * columns)


def limits_of(
    patches: Patches,
    batch: int,
    seq_len: int,
    *,
    given: Any,
    batch_size: int | None,
    whole: bool,
    gathered: Gathered | None = None,
    places: int = 1,
    trimmed: bool = False,
    padded: bool = True,
    beginning: Beginning | None = None,
    placement: Placement | None = None,
) -> Limits:
    """Decide how many prompts run together, and where what is recorded of them lies.

    Recorded runs take at most half of the budget, so that the other half is left for patched runs.
    Where they do not fit on a device of its own memory, they lie in host memory.

    Args:
        patches: what a sweep patches.
        batch: the number of prompts.
        seq_len: tokens per prompt.
        given: bytes, a string such as `"4 GiB"`, or None for half of what is free; of each device,
            where the model lies on several, or sizes by device.
        batch_size: how many prompts may run together; None is as many as fit, and elsewhere some
            thousand tokens.
        whole: whether the logits of the whole vocabulary are computed for each patched run.
        gathered: which logits wait for others; None if none do.
        places: at how many positions of a prompt its logits are computed.
        trimmed: whether nothing is recorded left of the first position that is patched.
        padded: whether some prompt has padding.
        beginning: the tokens that may run in pieces, where all do not fit at once; None if none
            may. Over several devices none do.
        placement: on which device each layer runs; None is where it does.

    Raises:
        MemoryBudgetError: `given` is malformed, or one prompt does not fit in it; or the logits of
            one cell do not, which have to wait for one another.
    """
    needs = needs_of(
        patches, seq_len, whole, places, trimmed=trimmed, padded=padded, placement=placement
    )
    model = patches.model
    away = isinstance(patches.nnmodel, Elsewhere) and patches.nnmodel.away
    if away:
        # Of memory elsewhere nothing is known: here are but the logits that come back.
        needs = attrs.evolve(
            needs, recorded=0, ahead=0, forward=needs.logits or 1, longest=needs.logits, devices=()
        )
        batch_size = batch_size or max(_TOKENS_AWAY // seq_len, 1)
    if needs.devices:
        if beginning is not None and beginning.until:
            beginning = Beginning(reason="the model lies on several devices")
        return _over_devices(
            needs, model, batch, seq_len, given, batch_size, gathered, places, beginning
        )
    if isinstance(given, Mapping):
        (given,) = memory_budgets(given, model, [_device(model)]).values()
    budget = memory_budget(given, model)
    wanted = min(batch_size or batch, batch)
    device = None if away else input_device(model)
    own = device is not None and device.type != "cpu"
    forward = needs.forward
    room = max(forward, needs.longest)
    # The logits of both runs stay, and all of them are in host memory.
    fixed = needs.logits * (2 * batch + _TRIED)
    together = 0 if gathered is None else gathered.least(batch * needs.logits)
    host = host_memory() - fixed - together if own else 0
    fixed = 0 if own else fixed + together
    kept_back = 0 if own else _ALLOCATOR
    usable = budget - fixed - min(kept_back, (budget - fixed) // 2)
    recorded = needs.recorded
    waiting = 0
    if gathered is not None:
        # A part of what runs could have, or of the host's memory where that is another.
        spare = host // 2 if own else min(usable // 4, usable - recorded - room)
        waiting = max(min((gathered.cells - 1) * batch * needs.logits, spare), 0)
        usable -= 0 if own else waiting
        if host < 0:
            raise MemoryBudgetError(
                f"{gathered.words(together, batch)}, are more than half of the free host memory by "
                f"{in_units(-host)}: {gathered.advice}, or give fewer prompts"
            )
    pieces, beginning = None, beginning or Beginning()
    fitting = usable // 2 // (recorded + forward)
    store = None if recorded else _HOST
    if own and fitting < wanted:
        store, recorded = _HOST, needs.ahead
        fitting = usable // 2 // (recorded + forward)
    least = recorded + room
    at_once = enough = fixed + least + min(kept_back, least)
    if least > usable and beginning.until:
        pieces = pieces_of(beginning.until, seq_len, needs.costs, usable - recorded)
        forward = needs.costs.bytes_of(max(pieces.tokens, seq_len - beginning.until), seq_len)
        least = recorded + max(forward, needs.longest)
        enough = fixed + least + min(kept_back, least)
        fitting = usable // 2 // (recorded + forward)
    if least > usable:
        if given is not None or ((gathered is not None or places > 1) and fixed > budget):
            parts = [f"its recorded runs take {in_units(recorded)}"]
            if places > 1:
                parts.append(
                    f"the logits of {2 * batch + _TRIED} runs at {places} positions, which metrics "
                    f"read, {in_units(needs.logits * (2 * batch + _TRIED))}"
                )
            if gathered is not None:
                parts.append(gathered.words(together, batch))
            needed = (
                f"a sweep of one prompt of {seq_len} tokens needs {in_units(enough)}, of which "
                f"{' and '.join(parts)}"
            )
            needed += _why_at_once(beginning)
            raise MemoryBudgetError(_refusal(needed, budget, gathered, places))
        # Our estimate is on the safe side: with what there is, it may still do.
        budget, usable = enough, least
    prompts = max(min(fitting, wanted), 1)
    return Limits(needs, budget, usable, prompts, store, waiting, pieces, at_once)


def _device(model: nn.Module) -> str:
    return str(numbered(input_device(model) or _HOST))


def _over_devices(
    needs: Needs,
    model: nn.Module,
    batch: int,
    seq_len: int,
    given: Any,
    batch_size: int | None,
    gathered: Gathered | None,
    places: int,
    beginning: Beginning | None,
) -> Limits:
    """The limits of a model over several devices; see `limits_of`."""
    devices = needs.devices
    budgets = memory_budgets(given, model, [each.device for each in devices])
    fixed = needs.logits * (2 * batch + _TRIED)
    together = 0 if gathered is None else gathered.least(batch * needs.logits)
    own = next((each for each in devices if each.device == str(_HOST)), None)
    if own is None:
        spare = (host_memory() - fixed - together) // 2
    else:
        usable = budgets[own.device] - fixed - together
        least = own.recorded + max(own.forward, own.longest)
        spare = min(usable // 4, usable - least)
    waiting = 0
    if gathered is not None:
        waiting = max(min((gathered.cells - 1) * batch * needs.logits, spare), 0)
        if own is None and spare < 0:
            raise MemoryBudgetError(
                f"{gathered.words(together, batch)}, are more than half of the free host memory by "
                f"{in_units(-2 * spare)}: {gathered.advice}, or give fewer prompts"
            )
    shared = share(
        devices,
        budgets,
        min(batch_size or batch, batch),
        fixed=fixed + together,
        waiting=waiting,
        kept_back=_ALLOCATOR,
    )
    if shared.short is not None:
        room, enough = shared.short
        many = fixed + together > room.budget and room.device == str(_HOST)
        if given is not None or ((gathered is not None or places > 1) and many):
            needed = (
                f"a sweep of one prompt of {seq_len} tokens needs {in_units(enough)} on "
                f"{room.device}, of which its recorded runs take {in_units(room.recorded)}"
                f"{_why_at_once(beginning)}"
            )
            raise MemoryBudgetError(
                _refusal(needed, room.budget, gathered, places, f" for {room.device}")
            )
    tightest = min(shared.rooms, key=lambda room: room.usable)
    return Limits(
        needs,
        tightest.budget,
        tightest.usable,
        shared.prompts,
        _HOST if shared.stored else None,
        waiting,
        rooms=shared.rooms,
    )


def _why_at_once(beginning: Beginning | None) -> str:
    """Why prompts are not run in pieces, for the refusal of a budget."""
    if beginning is None or beginning.reason is None:
        return ""
    return f" (it cannot run in pieces, as {beginning.reason})"


def _refusal(
    needed: str, budget: int, gathered: Gathered | None, places: int, where: str = ""
) -> str:
    """That a budget is too small, and how to do with less."""
    ways = ["raise it"]
    if gathered is not None:
        ways.append(gathered.advice)
    if places > 1:
        ways.append("let metrics read fewer positions")
    several = gathered is not None or places > 1
    ways.append("sweep fewer layers or components at once")
    ways.append(f"or give {'fewer or ' * several}shorter prompts")
    return f"{needed}, and memory_budget is {in_units(budget)}{where}: {', '.join(ways)}"
