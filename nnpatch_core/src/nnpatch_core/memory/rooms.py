"""The memory of several devices: what each has, and what a sweep may do so that it fits in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from nnpatch_core.memory.costs import Costs, in_units
from nnpatch_core.memory.needs import DeviceNeeds

_HOST = "cpu"
#: More digits than any size has.
_LONGEST = 24


@attrs.frozen
class Room:
    """The memory of a device, as far as a planner must know.

    Args:
        device: its name.
        layers: the layers that run there.
        head: whether logits are computed there.
        costs: what a patched run needs there.
        budget: bytes that a sweep may use there besides the weights.
        usable: how many of them there are for recorded runs and rows.
        recorded: bytes there that the recorded run of a prompt takes.
    """

    device: str
    layers: tuple[int, ...]
    head: bool
    costs: Costs
    budget: int
    usable: int
    recorded: int

    def reached_from(self, layer: int) -> bool:
        """Whether a run that enters before a layer, or behind the last, comes here."""
        return self.head or any(own >= layer for own in self.layers)


@attrs.frozen
class Shared:
    """How several devices are used.

    Args:
        rooms: what each has.
        prompts: how many prompts run together.
        stored: whether recorded runs lie in host memory.
        short: on which device not even one prompt fits, and how many bytes it needs there.
    """

    rooms: tuple[Room, ...]
    prompts: int
    stored: bool
    short: tuple[Room, int] | None


def share(
    devices: Sequence[DeviceNeeds],
    budgets: Mapping[str, int],
    wanted: int,
    *,
    fixed: int,
    waiting: int,
    kept_back: int,
) -> Shared:
    """Decide how many prompts run together on several devices, and where their runs lie.

    Recorded runs take at most half of what each device may use. Where they do not fit on one of
    them, all of them lie in host memory.

    Args:
        devices: what is needed on each.
        budgets: what may be used on each.
        wanted: how many prompts are to run together.
        fixed: bytes of host memory that are taken.
        waiting: bytes of it for logits that wait.
        kept_back: bytes of it that the allocator keeps.
    """
    elsewhere = any(each.device != _HOST for each in devices)
    every = sum(each.recorded for each in devices)
    for stored in (False, True):
        rooms = []
        for each in devices:
            budget = usable = budgets[each.device]
            recorded = each.ahead if stored else each.recorded
            if each.device == _HOST:
                usable -= fixed + min(kept_back, max(budget - fixed, 0) // 2) + waiting
                recorded = every if stored else each.recorded
            rooms.append(
                Room(each.device, each.layers, each.head, each.costs, budget, usable, recorded)
            )
        fitting = min(
            max(room.usable, 0) // 2 // max(room.recorded + each.forward, 1)
            for room, each in zip(rooms, devices, strict=True)
        )
        if fitting >= wanted or not elsewhere:
            break
    short = None
    for number, (room, each) in enumerate(zip(rooms, devices, strict=True)):
        least = room.recorded + max(each.forward, each.longest)
        if least > room.usable:
            taken = 0
            if room.device == _HOST:
                taken = fixed + waiting + min(kept_back, least)
            short = short or (room, taken + least)
            rooms[number] = attrs.evolve(room, budget=taken + least, usable=least)
    return Shared(tuple(rooms), max(min(fitting, wanted), 1), stored, short)


def in_words(rooms: Sequence[Room]) -> str:
    """The budgets of devices, in words.

    Examples:
        >>> costs = Costs(1, 1, 1, 1)
        >>> in_words([Room("cuda:0", (0, 1), False, costs, 2**30, 2**30, 0)])
        'cuda:0 1.0 GiB'
    """
    return ", ".join(f"{room.device} {in_units(room.budget)}" for room in rooms)


def budget_word(budget: int, rooms: Sequence[Room]) -> str:
    """A budget as a word that `read_budget` reads.

    Args:
        budget: of the model's one device.
        rooms: its devices, if it has several.

    Examples:
        >>> budget_word(1024, ())
        '1024'
    """
    if not rooms:
        return str(budget)
    # In whichever order a forward comes to them.
    return ",".join(sorted(f"{room.device}={room.budget}" for room in rooms))


def read_budget(word: str) -> int | dict[str, int] | None:
    """The budget that a word is; None if it is none.

    Examples:
        >>> read_budget("1024"), read_budget("cuda:0=5,cuda:1=6"), read_budget("much")
        (1024, {'cuda:0': 5, 'cuda:1': 6}, None)
    """
    if (alone := _number(word)) is not None:
        return alone
    sizes: dict[str, int] = {}
    for part in word.split(","):
        device, _, size = part.rpartition("=")
        number = _number(size)
        if not device or number is None:
            return None
        sizes[device] = number
    return sizes


def _number(word: str) -> int | None:
    """The size that digits are."""
    is_size = word.isascii() and word.isdigit() and len(word) < _LONGEST and int(word) > 0
    return int(word) if is_size else None
