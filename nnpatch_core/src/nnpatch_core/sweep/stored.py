"""A checkpoint as it lies on disk, and several of them as one."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._bytes import bytes_of
from nnpatch_core._printable import shown, told_as_is
from nnpatch_core._ranges import ranges
from nnpatch_core._safetensors import read_file, write_file
from nnpatch_core.errors import CheckpointError, ShardError
from nnpatch_core.memory import read_budget
from nnpatch_core.sweep.identity import Identity, differences
from nnpatch_core.sweep.share import Share

FORMAT = "nnpatch checkpoint 4"
#: How much of a budget that is none a message shows.
_LONGEST = 24
#: What estimates know of a cell without a run.
KNOWN = ("elided", "unread")


@attrs.frozen(eq=False)
class Stored:
    """The content of a checkpoint, which fits together.

    Args:
        path: where it was read.
        identity: what makes the sweep what it is.
        call: what is told of the call that made it.
        tensors: `done`, and the values of each metric, `[cells, batch]`; of estimates those of
            `KNOWN` too, and there may be several rows of each cell.
        count: into how many shards the sweep was cut; None if it was not.
        shards: the shards that it has, each with whether all of it is measured.
    """

    path: str
    identity: Identity
    call: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    count: int | None = None
    shards: Mapping[int, bool] = attrs.field(factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Stored:
        """The content of a file.

        Raises:
            CheckpointError: it is no whole checkpoint.
        """
        header, tensors = read_file(path, FORMAT, "a checkpoint", CheckpointError)
        fault = _fault(header, tensors)
        if fault is not None:
            raise CheckpointError(f"{os.fspath(path)} is no whole checkpoint: {fault}")
        count, shards = None, {}
        if "share" in header:
            share = Share.of(header["share"]["of"])
            count, shards = share.count, {share.number: header["share"]["finished"]}
        return cls(os.fspath(path), header["identity"], header["call"], tensors, count, shards)

    @property
    def share(self) -> Share | None:
        """The one shard that it has; None if it is of the whole sweep."""
        if self.count is None or len(self.shards) != 1:
            return None
        return Share(next(iter(self.shards)), self.count)

    def write(self, path: str | os.PathLike[str], finished: bool | None = None) -> None:
        """Write a file, whole or not at all.

        Args:
            path: the file.
            finished: whether all of its shard is measured; None if it is of the whole sweep.

        Raises:
            CheckpointError: it cannot be written.
        """
        header = {"format": FORMAT, "identity": dict(self.identity), "call": dict(self.call)}
        if finished is not None:
            header["share"] = {"of": str(self.share), "finished": finished}
        write_file(path, header, self.tensors, CheckpointError)

    def differences(self, identity: Identity) -> str:
        """The differences of another sweep, in words; "" if there are none."""
        return differences(self.identity, identity)

    def with_shard(self, other: Stored) -> Stored:
        """The same with what another shard has measured.

        Raises:
            ShardError: it is no shard of this sweep.
        """
        if told := self.differences(other.identity):
            told = told.replace(" then, ", " there, ").replace(" now", " here")
            raise ShardError(f"{other.path} is a shard of another sweep than {self.path} ({told})")
        if self.count != other.count:
            cut, whole = f"one of {other.count} shards", "no shard, but of the whole sweep"
            raise ShardError(
                f"{other.path} is {whole if other.count is None else cut}, and {self.path} is "
                f"{whole if self.count is None else f'one of {self.count}'}"
            )
        for number in other.shards:
            if number in self.shards:
                raise ShardError(
                    f"{other.path} is shard {number}/{self.count}, which is there twice"
                )
        if bool((self._done & other._done).any()):
            raise ShardError(
                f"{other.path} has measured what another shard has: these are not of one cut"
            )
        shards = {**self.shards, **other.shards}
        return attrs.evolve(self.joined(other), shards=shards)

    def joined(self, other: Stored) -> Stored:
        """The same with what another process has measured of the same sweep.

        Raises:
            ShardError: both have measured the same, and it is not the same to the last bit.
        """
        fresh = other._done & ~self._done
        both = other._done & self._done
        for name, value in self.tensors.items():
            one, two = value[both], other.tensors[name][both]
            if not torch.equal(bytes_of(one), bytes_of(two)):
                raise ShardError(
                    f"{self.path} and {other.path} have measured other numbers for the same cells: "
                    "the machines, or the threads of the processes, differ"
                )
        tensors = {
            name: torch.where(fresh, other.tensors[name], value)
            for name, value in self.tensors.items()
        }
        call = {
            "started": min(self.call["started"], other.call["started"]),
            # Of all processes together, as that is what it cost.
            "seconds": self.call["seconds"] + other.call["seconds"],
            "environment": "; ".join(
                dict.fromkeys(
                    one for each in (self, other) for one in each.call["environment"].split("; ")
                )
            ),
        }
        return attrs.evolve(self, call=call, tensors=tensors)

    @property
    def runs(self) -> tuple[int, int]:
        """How many patched runs are measured, and how many there are, those that need none too."""
        return int(self._done.sum()), self._done.numel()

    @property
    def estimated(self) -> bool:
        """Whether it is of estimates, and not of patched runs."""
        return KNOWN[0] in self.tensors

    @property
    def metrics(self) -> int:
        """How many metrics it has."""
        return sum(name.startswith("values/") for name in self.tensors)

    @property
    def _done(self) -> Tensor:
        return self.tensors["done"].bool()

    def check_complete(self) -> None:
        """Raise `ShardError` where a shard is missing, or not finished."""
        if self.count is None:
            return
        missing = [each for each in range(1, self.count + 1) if each not in self.shards]
        begun = sorted(each for each, finished in self.shards.items() if not finished)
        told = [
            f"{words} shard{'s' * (len(numbers) > 1)} {ranges(numbers)} (of {self.count})"
            for words, numbers in (("missing:", missing), ("begun, but not finished:", begun))
            if numbers
        ]
        if told:
            raise ShardError(f"not all shards are measured; {'; '.join(told)}")


def _fault(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """Why header and tensors are not what a sweep writes."""
    identity = header.get("identity")
    keys = set(header) - {"share"}
    if keys != {"format", "identity", "call"} or not isinstance(identity, dict):
        return f"its header has {told_as_is(', '.join(sorted(header)))}"
    if not all(isinstance(value, str) for value in identity.values()):
        return "its identity is not made of words"
    if "share" in header and not _is_share(header["share"]):
        return f"its share is {shown(header['share'])}"
    if not _is_call(header["call"]):
        return f"its call is {shown(header['call'])}"
    budget = identity.get("memory_budget", "")
    if read_budget(budget) is None:
        return f"its memory_budget is {budget[:_LONGEST]!r}"
    flags = {"done", *(KNOWN if KNOWN[0] in tensors else ())}
    names = {f"values/{number}" for number in range(len(tensors) - len(flags))}
    if not names or set(tensors) != flags | names:
        return f"its tensors are {told_as_is(', '.join(sorted(tensors)))}"
    done = tensors["done"]
    if done.dtype != torch.uint8 or done.ndim != 2 or not done.numel() or int(done.max()) > 1:
        return "it does not tell what is done"
    kind = torch.float32 if len(flags) == 1 else torch.float64
    for name, value in tensors.items():
        expected = torch.uint8 if name in flags else kind
        if value.dtype != expected or value.shape != done.shape:
            return f"{name} is {value.dtype} {list(value.shape)}, of {list(done.shape)} numbers"
        if name in flags and int(value.max()) > 1:
            return f"{name} has other numbers than 0 and 1"
    return None


def _is_call(told: Any) -> bool:
    """Whether JSON is what `Call.told` gives."""
    if not isinstance(told, dict) or set(told) != {"started", "seconds", "environment"}:
        return False
    texts, seconds = (told["started"], told["environment"]), told["seconds"]
    number = type(seconds) in (int, float) and 0 <= seconds < math.inf
    return number and all(isinstance(text, str) and text.isprintable() for text in texts)


def _is_share(told: Any) -> bool:
    """Whether JSON is what a checkpoint tells of its share."""
    if not isinstance(told, dict) or set(told) != {"of", "finished"}:
        return False
    try:
        Share.of(told["of"])
    except ShardError:
        return False
    return isinstance(told["of"], str) and isinstance(told["finished"], bool)
