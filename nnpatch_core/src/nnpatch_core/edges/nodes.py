"""The nodes of a model as a graph: what writes to the residual stream, and what reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, TypeAlias

import attrs
import numpy as np

from nnpatch_core._arrays import Booleans, Integers
from nnpatch_core._hints import did_you_mean
from nnpatch_core._printable import shown
from nnpatch_core.errors import EdgeError

SenderKind: TypeAlias = Literal["input", "head", "mlp"]
ReceiverKind: TypeAlias = Literal["q", "k", "v", "mlp", "resid_pre", "logits"]

#: Between the names of an edge's two nodes.
ARROW = "->"
#: A layer is read by its attention, then by its MLP: two steps a layer, on which nodes stand.
_STEPS = 2
#: A head, and which of its inputs, if that is told.
_HEAD = re.compile(r"a(\d{1,9})\.h(\d{1,9})(?:<([kv])>)?", re.ASCII)


@attrs.frozen
class Sender:
    """A node that writes to the residual stream.

    Args:
        kind: the `"input"` (the embeddings), a `"head"` or an `"mlp"`.
        layer: its layer; 0 for the input.
        head: which query head; None if it is none.
    """

    kind: SenderKind
    layer: int = 0
    head: int | None = None

    @property
    def name(self) -> str:
        """As edges name it: `input`, `a0.h1`, `m0`."""
        if self.kind == "input":
            return "input"
        return f"m{self.layer}" if self.kind == "mlp" else f"a{self.layer}.h{self.head}"

    @property
    def step(self) -> int:
        """The step from which on the stream holds what it writes; see `Nodes.written`."""
        steps = {"input": 0, "head": 1, "mlp": 2}
        return _STEPS * self.layer + steps[self.kind]


@attrs.frozen
class Receiver:
    """A node that reads the residual stream.

    Args:
        kind: a head's `"q"`, `"k"` or `"v"`, an `"mlp"`, or the `"logits"`; of paths also the whole
            stream before a layer, `"resid_pre"`, which is no node.
        layer: its layer; the number of layers for the logits.
        head: which query head of `q`, which key/value head of `k` and `v`; else None.
    """

    kind: ReceiverKind
    layer: int
    head: int | None = None

    @property
    def name(self) -> str:
        """As edges name it: `a0.h1<q>`, `m0`, `logits`; and `resid_pre0`."""
        if self.kind == "logits":
            return "logits"
        if self.kind in ("mlp", "resid_pre"):
            return f"{'m' if self.kind == 'mlp' else self.kind}{self.layer}"
        return f"a{self.layer}.h{self.head}<{self.kind}>"


def _flags(values: Iterable[bool]) -> tuple[bool, ...]:
    return tuple(values)


def _numbers(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


def _counts(_: Any, attribute: Any, value: tuple[int, ...]) -> None:
    if not value or not all(type(count) is int and count > 0 for count in value):
        raise EdgeError(
            f"{attribute.name} must be a positive number of heads for each layer, got {value!r}"
        )


@attrs.frozen
class Nodes:
    """The nodes of a model, and the edges between them: each sender to each receiver after it.

    A layer's attention comes before its MLP, but for layers in which both read the same stream:
    there neither feeds the other.

    Args:
        query: for each layer how many query heads it has.
        key_value: for each layer how many key/value heads, each read by a group of query heads.
        parallel: for each layer whether its MLP reads the stream that its attention reads.

    Examples:
        >>> nodes = Nodes(query=(2,), key_value=(1,), parallel=(False,))
        >>> nodes.sender_names
        ('input', 'a0.h0', 'a0.h1', 'm0')
        >>> nodes.receiver_names
        ('a0.h0<q>', 'a0.h1<q>', 'a0.h0<k>', 'a0.h0<v>', 'm0', 'logits')
        >>> len(nodes), list(nodes)[4:7]
        (11, ['input->m0', 'input->logits', 'a0.h0->m0'])
        >>> nodes.place("a0.h1->m0")
        (2, 4)
    """

    query: tuple[int, ...] = attrs.field(converter=_numbers, validator=_counts)
    key_value: tuple[int, ...] = attrs.field(converter=_numbers, validator=_counts)
    parallel: tuple[bool, ...] = attrs.field(converter=_flags)

    def __attrs_post_init__(self) -> None:
        if not len(self.query) == len(self.key_value) == len(self.parallel):
            raise EdgeError(
                f"nodes need as many layers everywhere, got {len(self.query)} for query heads, "
                f"{len(self.key_value)} for key/value heads, {len(self.parallel)} for parallel"
            )
        for layer, (query, shared) in enumerate(zip(self.query, self.key_value, strict=True)):
            if query % shared:
                raise EdgeError(
                    f"{query} query heads cannot share {shared} key/value heads, in layer {layer}"
                )

    @property
    def n_layers(self) -> int:
        """How many layers there are."""
        return len(self.query)

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """All senders, in the order in which a forward reaches them."""
        found = [Sender("input")]
        for layer, count in enumerate(self.query):
            found += [Sender("head", layer, head) for head in range(count)]
            found.append(Sender("mlp", layer))
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """All receivers, in the order in which a forward reaches them."""
        found: list[Receiver] = []
        for layer in range(self.n_layers):
            query, shared = range(self.query[layer]), range(self.key_value[layer])
            found += [Receiver("q", layer, head) for head in query]
            found += [Receiver("k", layer, head) for head in shared]
            found += [Receiver("v", layer, head) for head in shared]
            found.append(Receiver("mlp", layer))
        return (*found, Receiver("logits", self.n_layers))

    @cached_property
    def sender_names(self) -> tuple[str, ...]:
        """The names of the senders."""
        return tuple(sender.name for sender in self.senders)

    @cached_property
    def receiver_names(self) -> tuple[str, ...]:
        """The names of the receivers."""
        return tuple(receiver.name for receiver in self.receivers)

    @cached_property
    def written(self) -> Integers:
        """`[senders]`: the step from which on the stream holds what each writes."""
        return np.array([sender.step for sender in self.senders])

    @cached_property
    def read(self) -> Integers:
        """`[receivers]`: the step at which each reads the stream; see `written`."""
        return np.array([self.step(receiver) for receiver in self.receivers])

    def step(self, receiver: Receiver) -> int:
        """The step at which a receiver reads the stream, which may be a whole stream itself."""
        serial = receiver.kind == "mlp" and not self.parallel[receiver.layer]
        return _STEPS * receiver.layer + serial

    @cached_property
    def mask(self) -> Booleans:
        """`[senders, receivers]`, bool: which pairs are edges."""
        edges: Booleans = self.written[:, None] <= self.read[None]
        return edges

    def __len__(self) -> int:
        return int(self.mask.sum())

    def __iter__(self) -> Iterator[str]:
        """The names of all edges, sender by sender."""
        senders, receivers = self.sender_names, self.receiver_names
        for sender, receiver in zip(*self.mask.nonzero(), strict=True):
            yield f"{senders[sender]}{ARROW}{receivers[receiver]}"

    def __contains__(self, edge: object) -> bool:
        try:
            self.place(edge)
        except EdgeError:
            return False
        return True

    def sender(self, name: Any) -> int:
        """The number of a sender.

        Raises:
            EdgeError: there is none of this name.
        """
        return _number(name, self._sender_numbers, "sender")

    def receiver(self, name: Any) -> int:
        """The number of a receiver.

        Raises:
            EdgeError: there is none of this name.
        """
        if isinstance(name, str) and name not in self._receiver_numbers:
            self._check_head(name)
        return _number(name, self._receiver_numbers, "receiver")

    def _check_head(self, name: str) -> None:
        """Raise `EdgeError` for a query head where one of its inputs is meant: it says which."""
        found = _HEAD.fullmatch(name)
        if found is None or int(found[1]) >= self.n_layers:
            return
        layer, head = int(found[1]), int(found[2])
        query, shared = self.query[layer], self.key_value[layer]
        if head >= query:
            return
        own = f"a{layer}.h{head * shared // query}"
        if found[3] is not None:
            raise EdgeError(
                f"the model has no receiver {name!r}: {query} query heads share {shared} key/value "
                f"heads, and query head {head} reads {own}<{found[3]}>"
            )
        raise EdgeError(
            f"{name!r} does not say which of a head's inputs receives: name its query, {name}<q>, "
            f"its key, {own}<k>, or its value, {own}<v>"
        )

    def place(self, edge: Any) -> tuple[int, int]:
        """The numbers of an edge's sender and receiver.

        Raises:
            EdgeError: a node is unknown, or the sender is not before the receiver.
        """
        if not isinstance(edge, str) or edge.count(ARROW) != 1:
            raise EdgeError(f"an edge is named like 'a0.h1->m3', got {shown(edge)}")
        first, second = (part.strip() for part in edge.split(ARROW))
        sender, receiver = self.sender(first), self.receiver(second)
        if not self.mask[sender, receiver]:
            why = self.why_not(self.senders[sender], self.receivers[receiver])
            raise EdgeError(f"{edge!r} is no edge: {why}")
        return sender, receiver

    def why_not(self, one: Sender, other: Receiver) -> str:
        """Say why a sender is not before a receiver."""
        if one.layer == other.layer and other.kind == "mlp" and one.kind == "head":
            return f"in layer {one.layer} attention and MLP read the same stream"
        return f"{one.name} writes after {other.name} has read the stream"

    @cached_property
    def _sender_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.sender_names)}

    @cached_property
    def _receiver_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.receiver_names)}


def _number(name: Any, numbers: dict[str, int], kind: str) -> int:
    if isinstance(name, str) and name in numbers:
        return numbers[name]
    hint = did_you_mean(name, numbers) if isinstance(name, str) else ""
    names = list(numbers)
    raise EdgeError(
        f"the model has no {kind} {shown(name)}{hint}; it has {', '.join(names[:3])}, ..., "
        f"{names[-1]}"
    )
