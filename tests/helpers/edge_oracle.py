"""What edges, paths and circuits must give, by plain torch hooks: shares no code with nnpatch.

As in family_oracle.py each prompt runs alone and unpadded, on a copy of a plain Hugging Face model,
in one whole forward for every edge; a position is counted from the end of a prompt, 1 is its last
token. A model in float64 computes in float64 throughout.

A node is told by its name, as in `"a0.h1"`, `"a2.h0<k>"`, `"m3"`, `"input"` and `"logits"`, or as a
tuple: a sender is `("resid_pre", 0)`, which is the input, `("o", layer, head)` or `("mlp", layer)`;
a receiver is `("q", layer, head)`, and so are `"k"` and `"v"`, `("mlp", layer)`,
`("resid_pre", layer)` or `("logits",)`. All heads of a layer are the head None. The *value* of a
node is what is swapped or held: a head's columns of the output projection's input, or of what
queries, keys or values are; what the MLP gives, after its norm if one follows; or the stream.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.attribution_oracle import Wide
from tests.helpers.family_oracle import (
    GROUPED,
    LAYOUTS,
    POST_NORMS,
    FamilyOracle,
    Layout,
    Place,
    Prompt,
    Table,
)

Node = tuple[Any, ...]
Named = str | Node
Positions = Sequence[int] | None
#: What is put in place of a sender: "source" or "target", that run's value; "zero"; or, given the
#: sender, `[seq, columns]` or what broadcasts to it.
Value = str | Callable[[Node], Tensor]
#: Component and layer to `[seq, width]`.
Run = dict[tuple[str, int], Tensor]

INPUT: Node = ("resid_pre", 0)
LOGITS: Node = ("logits",)
_NAME = re.compile(r"a(\d+)\.h(\d+)(?:<([qkv])>)?")


class Wiring(NamedTuple):
    """What stands around the projections of a layer: paths in it, of which an empty one is none.

    In a parallel layer the MLP reads what the attention reads.
    """

    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attn_post: str = ""
    mlp_post: str = ""
    parallel: bool = False
    #: What the config calls the number by which all that is added is multiplied.
    factor: str = ""


PLAIN = Wiring()
AROUND = Wiring(
    mlp_norm="pre_feedforward_layernorm",
    attn_post="post_attention_layernorm",
    mlp_post="post_feedforward_layernorm",
)
AFTER = AROUND._replace(attn_norm="", mlp_norm="")
ONE_NORM = Wiring(mlp_norm="input_layernorm", parallel=True)
TWO_NORMS = Wiring(parallel=True)
OF_GPT2 = Wiring("ln_1", "ln_2")

#: Those of the layers, over and over, as in a layout.
WIRINGS: Mapping[str, Sequence[Wiring]] = {
    "cohere": [ONE_NORM],
    "falcon": [ONE_NORM],
    "falcon, alibi": [ONE_NORM],
    "falcon, by group": [Wiring("ln_attn", "ln_mlp", parallel=True)],
    "falcon, by head": [ONE_NORM],
    "falcon, one after the other": [PLAIN],
    "gemma": [PLAIN],
    "gemma2": [AROUND],
    "gemma3_text": [AROUND],
    "gpt2": [OF_GPT2],
    "gpt_neox": [TWO_NORMS],
    "gpt_neox, one after the other": [PLAIN],
    "gptj": [Wiring("ln_1", "ln_1", parallel=True)],
    "granite": [PLAIN._replace(factor="residual_multiplier")],
    "llama": [PLAIN],
    "llama, MLP first in one layer": [PLAIN, ONE_NORM],
    "llama, more heads in one layer": [PLAIN],
    "mistral": [PLAIN],
    "mixtral": [PLAIN],
    "olmo2": [AFTER],
    "phi": [ONE_NORM],
    "phi3": [PLAIN],
    "qwen3": [PLAIN],
    "starcoder2": [PLAIN],
}
#: As which family another one is laid out, where it is not under its own name.
_LAID_OUT_AS = {
    "falcon, alibi": "falcon",
    "falcon, one after the other": "falcon",
    "gpt_neox, one after the other": "gpt_neox",
    "llama": "qwen3",
    "mistral": "qwen3",
}


class EdgeOracle(FamilyOracle):
    """Plain hooks on a copy of `model`, whose family is a key of `WIRINGS`.

    Families with a projection for each of queries, keys and values may have any size, others that
    of the tiny models.
    """

    def __init__(self, model: nn.Module, family: str) -> None:
        layout = LAYOUTS[_LAID_OUT_AS.get(family, family)]
        wirings = WIRINGS[family]
        layers = len(model.get_submodule(layout.layers))
        self.wirings = [wirings[layer % len(wirings)] for layer in range(layers)]
        # One table for each layer, with one stream more than the layout has.
        tables = [
            {
                **_sized(layout.table(layer), model.config),
                "mlp_reads": _mlp_reads(wiring),
            }
            for layer, wiring in enumerate(self.wirings)
        ]
        super().__init__(model, Layout(layout.layers, tables))
        self.layers = self.model.get_submodule(layout.layers)
        factors = {wiring.factor for wiring in self.wirings} - {""}
        self.factor = getattr(model.config, *factors) if factors else 1.0
        self.precision: Callable[[], Any] = contextlib.nullcontext
        if next(model.parameters()).dtype is torch.float64:
            self.precision = Wide
            if family == "mixtral":
                # Its fast way is for narrower numbers alone.
                self.model.set_experts_implementation("eager")

    # What there is.

    def senders(self) -> list[Node]:
        """In their order."""
        found = [INPUT]
        for layer in range(len(self.layers)):
            found += [("o", layer, head) for head in self.heads("o", layer)]
            found.append(("mlp", layer))
        return found

    def receivers(self) -> list[Node]:
        """In their order."""
        found: list[Node] = []
        for layer in range(len(self.layers)):
            found += [(kind, layer, head) for kind in "qkv" for head in self.heads(kind, layer)]
            found.append(("mlp", layer))
        return [*found, LOGITS]

    def edges(self) -> list[str]:
        """The names of all edges, those of one sender after those of another."""
        return list(self._edges)

    @functools.cached_property
    def _edges(self) -> dict[str, tuple[Node, Node]]:
        pairs = itertools.product(self.senders(), self.receivers())
        return {edge_of(*pair): pair for pair in pairs if self._feeds(*pair)}

    def _feeds(self, sender: Node, receiver: Node) -> bool:
        """Whether what a sender adds is in the stream that a receiver reads."""
        if sender == INPUT or receiver == LOGITS:
            return True
        if sender[1] == receiver[1]:
            pair = sender[0], receiver[0]
            return pair == ("o", "mlp") and not self.wirings[sender[1]].parallel
        return bool(sender[1] < receiver[1])

    # What is asked.

    def edge(
        self,
        source: Prompt,
        target: Prompt,
        sender: Named,
        receiver: Named,
        positions: Positions = None,
        value: Value = "source",
    ) -> Tensor:
        """`[vocab]`: the target run in which one receiver alone sees that the sender is changed.

        The receiver is changed at all positions, the sender at the given ones.
        """
        receiver = node_of(receiver)
        if (name := edge_of(node_of(sender), receiver)) not in self._edges:
            raise ValueError(f"no edge: {name}")
        change = self.change(source, target, sender, positions, value)
        stream = self.activation(target, *self._reads(receiver)) + change
        held = {receiver: self._output(receiver, stream)}
        return self.logits(target, self._holding(target, held))

    def change(
        self,
        source: Prompt,
        target: Prompt,
        sender: Named,
        positions: Positions = None,
        value: Value = "source",
    ) -> Tensor:
        """`[seq, width]`: by how much the stream changes where the sender's value is swapped."""
        sender = node_of(sender)
        new = self._swapped(source, target, [sender], positions, value)[sender]
        if sender == INPUT:
            return new - self._value(target, sender)
        if sender[0] == "mlp":
            return self.factor * (new - self._value(target, sender))
        own = self.activation(target, "o", sender[1])
        mixed = own.clone()
        mixed[:, self._columns(sender)] = new
        return self._added(sender[1], mixed) - self._added(sender[1], own)

    def path(
        self,
        source: Prompt,
        target: Prompt,
        senders: Iterable[Named],
        receivers: Iterable[Named],
        through: str | None = None,
        sender_positions: Positions = None,
        receiver_positions: Positions = None,
        value: Value = "source",
    ) -> Tensor:
        """`[vocab]`: the target run in which only the receivers see that the senders are changed.

        Between them all is as in the target run, or (`through="mlps"`) MLPs that are no senders
        are computed.
        """
        positions = [sender_positions, receiver_positions]
        return self.chain(source, target, [senders, receivers], through, positions, value)

    def chain(
        self,
        source: Prompt,
        target: Prompt,
        path: Sequence[Iterable[Named]],
        through: str | None = None,
        positions: Sequence[Positions] | None = None,
        value: Value = "source",
    ) -> Tensor:
        """`[vocab]`: the same, over receivers whose changed values are what is sent on.

        `positions` has an entry for each of the path: where its values are changed.
        """
        if through not in (None, "mlps"):
            raise ValueError(f"through must be None or 'mlps', got {through!r}")
        first, *rest = (self._nodes(each) for each in path)
        at, *places = positions or [None] * len(path)
        changed = self._swapped(source, target, first, at, value)
        for number, (receivers, at) in enumerate(zip(rest, places, strict=True)):
            run = self._frozen(target, changed, through)
            held = {each: self._output(each, run[self._reads(each)]) for each in receivers}
            if number == len(rest) - 1:
                return self.logits(target, self._holding(target, held, at))
            changed = self._sent_on(target, held, at)
        raise ValueError("a path has senders and receivers")

    def circuit(
        self, source: Prompt, target: Prompt, edges: Iterable[str], value: Value = "target"
    ) -> Tensor:
        """`[vocab]`: the source run in which all edges but these carry another run's values.

        Or those that `value` gives: of the target run, zeros, or anything else.
        """
        wanted = set(edges)
        if unknown := wanted - set(self._edges):
            raise ValueError(f"no edges: {sorted(unknown)}")
        if len(source) != len(target):
            raise ValueError("the prompts of a circuit have one length")
        senders = self.senders()
        others = {each: self._put(source, target, each, value) for each in senders}
        # What this very run computes, as far as it has come.
        computed = {INPUT: self._value(source, INPUT)}

        def reads(receiver: Node) -> Tensor:
            """What is sent along edges of the circuit, or else; heads are mixed before P."""
            sent = {
                each: (computed if edge_of(each, receiver) in wanted else others)[each]
                for each in senders
                if self._feeds(each, receiver)
            }
            stream = sent[INPUT]
            for layer in range(len(self.layers)):
                z = torch.zeros_like(self.activation(target, "o", layer))
                heads = [each for each in sent if each[:2] == ("o", layer)]
                for each in heads:
                    z[:, self._columns(each)] = sent[each]
                if heads:
                    stream = stream + self._added(layer, z)
                if ("mlp", layer) in sent:
                    stream = stream + self.factor * sent["mlp", layer]
            return stream

        for layer in range(len(self.layers)):
            of_layer = [each for each in self.receivers() if each[1:2] == (layer,)]
            heads = {each: self._output(each, reads(each)) for each in of_layer if len(each) == 3}
            z = self._run(source, heads)["o", layer]
            for head in self.heads("o", layer):
                computed["o", layer, head] = z[:, self._columns(("o", layer, head))]
            mlp = ("mlp", layer)
            computed[mlp] = self._output(mlp, reads(mlp))
        return self.logits(source, self._holding(source, {LOGITS: reads(LOGITS)}))

    # How a model runs.

    def logits(self, prompt: Prompt, hooks: Iterable[Any] = ()) -> Tensor:
        """`[vocab]` at the prompt's last token."""
        with self.precision():
            return super().logits(prompt, hooks)

    def activation(self, prompt: Prompt, component: str, layer: int) -> Tensor:
        """`[seq, width]`."""
        if (prompt, component, layer) not in self._activations:
            for place, rows in self._run(prompt).items():
                self._activations[prompt, *place] = rows
        return self._activations[prompt, component, layer]

    def _run(
        self, prompt: Prompt, held: Mapping[Node, Tensor] | None = None, at: Positions = None
    ) -> Run:
        """All activations, where nodes have these values at these positions."""
        run: Run = {}
        # After those that hold something, so that they see it.
        hooks = self._holding(prompt, held or {}, at)
        for layer in range(len(self.layers)):
            for component in self.layout.table(layer):

                def keep(found: Tensor, place: tuple[str, int] = (component, layer)) -> None:
                    run[place] = found.clone()

                hooks.append(self._hook(component, layer, len(prompt), keep))
        self.logits(prompt, hooks)
        return run

    def _holding(
        self, prompt: Prompt, held: Mapping[Node, Tensor], at: Positions = None
    ) -> list[Any]:
        rows = torch.tensor([len(prompt) - back for back in self._backs(at, len(prompt))])

        def putting(node: Node, value: Tensor) -> Any:
            columns = torch.tensor(self._columns(node))

            def put(found: Tensor) -> None:
                if len(rows):
                    found[rows[:, None], columns] = value[rows]

            return self._hook(*self._place(node), len(prompt), put)

        return [putting(node, value) for node, value in held.items()]

    def _frozen(self, target: Prompt, changed: Mapping[Node, Tensor], through: str | None) -> Run:
        """The target run in which all senders have that run's values, but for those changed."""
        held = {
            each: self._value(target, each)
            for each in self.senders()
            if through is None or each[0] != "mlp"
        }
        return self._run(target, held | dict(changed))

    def _sent_on(
        self, target: Prompt, held: Mapping[Node, Tensor], at: Positions
    ) -> dict[Node, Tensor]:
        """Of receivers with these values at these positions: the values of the senders there.

        Heads that read a query, a key or a value give another z; of their layer all else is as in
        the target run.
        """
        sent: dict[Node, Tensor] = {}
        by_layer: dict[int, dict[Node, Tensor]] = {}
        for each, value in held.items():
            if each[0] == "mlp":
                sent[each] = self._value(target, each).clone()
                for back in self._backs(at, len(target)):
                    sent[each][-back] = value[-back]
            elif each[0] in ("q", "k", "v"):
                by_layer.setdefault(each[1], {})[each] = value
            else:
                raise ValueError(f"only heads and MLPs send on what they read, not {each}")
        for layer, values in by_layer.items():
            z = self._run(target, values, at)["o", layer]
            for head in self.heads("o", layer):
                if any(head in self._readers(each) for each in values):
                    node = ("o", layer, head)
                    sent[node] = z[:, self._columns(node)]
        return sent

    # What is put.

    def _put(self, source: Prompt, target: Prompt, sender: Node, value: Value) -> Tensor:
        """`[seq, columns]` of the target run's shape, or the source run's."""
        own = self._value(target, sender)
        if value in ("source", "target"):
            return self._value(source, sender) if value == "source" else own
        if value == "zero":
            return torch.zeros_like(own)
        if callable(value):
            return value(sender).expand_as(own)
        raise ValueError(f"value must be 'source', 'target', 'zero' or a function, got {value!r}")

    def _swapped(
        self,
        source: Prompt,
        target: Prompt,
        senders: Iterable[Node],
        at: Positions,
        value: Value,
    ) -> dict[Node, Tensor]:
        """The value of each sender, swapped at the positions that both prompts have."""
        found = {}
        for each in senders:
            if each not in self.senders():
                raise ValueError(f"no sender: {each}")
            new = self._put(source, target, each, value)
            found[each] = self._value(target, each).clone()
            for back in self._backs(at, min(len(target), len(new))):
                found[each][-back] = new[-back]
        return found

    def _backs(self, at: Positions, length: int) -> list[int]:
        """Positions, counted from the end, that a prompt of some length has."""
        every_one = range(1, length + 1)
        return [*every_one] if at is None else [back for back in at if back in every_one]

    # What a layer does.

    def _output(self, receiver: Node, stream: Tensor) -> Tensor:
        """`[seq, columns]`: the value of a receiver that reads a stream `[seq, width]`."""
        if receiver[0] in ("resid_pre", "logits"):
            return stream
        layer = receiver[1]
        wiring, table = self.wirings[layer], self.layout.table(layer)
        if receiver[0] == "mlp":
            return self._through(layer, stream, wiring.mlp_norm, "mlp", wiring.mlp_post)
        projected = self._through(layer, stream, wiring.attn_norm, table[receiver[0]].path)
        return projected[:, self._columns(receiver)]

    def _added(self, layer: int, z: Tensor) -> Tensor:
        """`[seq, width]`: what the attention adds, of what goes into its output projection."""
        o = self.layout.table(layer)["o"].path
        return self.factor * self._through(layer, z, o, self.wirings[layer].attn_post)

    def _through(self, layer: int, rows: Tensor, *paths: str) -> Tensor:
        with torch.no_grad(), self.precision():
            for path in filter(None, paths):
                rows = self.layers[layer].get_submodule(path)(rows[None])[0]
        return rows

    # Where nodes are.

    def _nodes(self, names: Iterable[Named]) -> list[Node]:
        """With each head where a node is all of them."""
        found: list[Node] = []
        for node in map(node_of, names):
            if len(node) == 3 and node[2] is None:
                found += [(*node[:2], head) for head in self.heads(*node[:2])]
            else:
                found.append(node)
        return found

    def _place(self, node: Node) -> tuple[str, int]:
        return ("resid", len(self.layers) - 1) if node == LOGITS else (node[0], node[1])

    def _reads(self, receiver: Node) -> tuple[str, int]:
        """The stream that a receiver reads."""
        if receiver == LOGITS:
            return self._place(receiver)
        return ("mlp_reads" if receiver[0] == "mlp" else "resid_pre", receiver[1])

    def _columns(self, node: Node) -> list[int]:
        component, layer = self._place(node)
        heads = self.layout.table(layer)[component].heads
        return [*range(self.model.config.hidden_size)] if heads is None else [*heads[node[2]]]

    def _value(self, prompt: Prompt, node: Node) -> Tensor:
        return self.activation(prompt, *self._place(node))[:, self._columns(node)]

    def _readers(self, receiver: Node) -> range:
        """The heads that read a query, a key or a value."""
        kind, layer, head = receiver
        group = len(self.heads("o", layer)) // len(self.heads(kind, layer))
        return range(head * group, (head + 1) * group)


def _mlp_reads(wiring: Wiring) -> Place:
    """The stream, before the norm before the MLP."""
    return Place("", "input") if wiring.parallel else Place(wiring.mlp_norm or "mlp", "input")


def _sized(table: Table, config: Any) -> Table:
    """A table whose projections are apart, for a model of any size."""
    if table not in (GROUPED, POST_NORMS):
        return table
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    wide = {"q": heads, "k": groups, "v": groups, "o": heads}
    columns = {
        name: tuple(tuple(range(head * dim, (head + 1) * dim)) for head in range(count))
        for name, count in wide.items()
    }
    return {**table, **{name: table[name]._replace(heads=columns[name]) for name in wide}}


def node_of(named: Named) -> Node:
    """A node as a tuple."""
    if not isinstance(named, str):
        return tuple(named)
    if named in ("input", "logits"):
        return INPUT if named == "input" else LOGITS
    if found := _NAME.fullmatch(named):
        layer, head, kind = found.groups()
        return (kind or "o", int(layer), int(head))
    if named[:1] == "m" and named[1:].isdecimal():
        return ("mlp", int(named[1:]))
    raise ValueError(f"no node: {named!r}")


def edge_of(sender: Node, receiver: Node) -> str:
    """An edge as a name."""
    return f"{name_of(sender)}->{name_of(receiver)}"


def name_of(node: Node) -> str:
    """A node as a name; of a stream, that of the input."""
    if node in (INPUT, LOGITS):
        return "input" if node == INPUT else "logits"
    if node[0] == "mlp":
        return f"m{node[1]}"
    if node[0] == "resid_pre":
        return f"resid_pre{node[1]}"
    read = "" if node[0] == "o" else f"<{node[0]}>"
    return f"a{node[1]}.h{node[2]}{read}"


# As functions, for which a model is copied once: what is done to it later they do not see.


@functools.lru_cache(maxsize=16)
def oracle_of(model: nn.Module, family: str) -> EdgeOracle:
    return EdgeOracle(model, family)


def edge(
    model: nn.Module,
    family: str,
    source: Sequence[int],
    target: Sequence[int],
    sender: Named,
    receiver: Named,
    positions: Positions = None,
    value: Value = "source",
) -> Tensor:
    """`[vocab]`: as `EdgeOracle.edge`."""
    oracle = oracle_of(model, family)
    return oracle.edge(tuple(source), tuple(target), sender, receiver, positions, value)


def path(
    model: nn.Module,
    family: str,
    source: Sequence[int],
    target: Sequence[int],
    senders: Iterable[Named],
    receivers: Iterable[Named],
    through: str | None = None,
    sender_positions: Positions = None,
    receiver_positions: Positions = None,
    value: Value = "source",
) -> Tensor:
    """`[vocab]`: as `EdgeOracle.path`."""
    return oracle_of(model, family).path(
        tuple(source),
        tuple(target),
        senders,
        receivers,
        through,
        sender_positions,
        receiver_positions,
        value,
    )


def chain(
    model: nn.Module,
    family: str,
    source: Sequence[int],
    target: Sequence[int],
    path: Sequence[Iterable[Named]],
    through: str | None = None,
    positions: Sequence[Positions] | None = None,
    value: Value = "source",
) -> Tensor:
    """`[vocab]`: as `EdgeOracle.chain`."""
    oracle = oracle_of(model, family)
    return oracle.chain(tuple(source), tuple(target), path, through, positions, value)


def circuit(
    model: nn.Module,
    family: str,
    source: Sequence[int],
    target: Sequence[int],
    edges: Iterable[str],
    value: Value = "target",
) -> Tensor:
    """`[vocab]`: as `EdgeOracle.circuit`."""
    return oracle_of(model, family).circuit(tuple(source), tuple(target), edges, value)
