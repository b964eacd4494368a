"""Edges, paths and circuits a second time: formulas on weights, without modules or hooks.

It shares no code with nnpatch nor with edge_oracle.py, which it is there to check. It knows Llama,
Mistral, Granite and Gemma 2, whose layers run one step after another. Each value has a name, that
of its node: of a sender `a0.h1` the z of the head, of `m0` what the MLP gives, of a receiver what
it makes of the stream that it reads. A run is told which values are held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

Values = Mapping[str, Tensor]


class Run(NamedTuple):
    """Of each name the value, of each receiver the stream `[seq, width]`, and `[vocab]`."""

    values: dict[str, Tensor]
    streams: dict[str, Tensor]
    logits: Tensor


class ByHand:
    """A model's weights in float64, and what its layers do with them."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: each.detach().double() for name, each in model.state_dict().items()}
        config: Any = model.config
        self.config = config
        self.gemma = config.model_type == "gemma2"
        self.layers = range(config.num_hidden_layers)
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.share = self.heads // self.groups
        granite = config.model_type == "granite"
        self.factor = config.residual_multiplier if granite else 1.0
        # These are rounded in the model, too.
        self.frequencies = model.model.rotary_emb.inv_freq.double()

    # The nodes.

    def receivers(self, layer: int) -> list[str]:
        """The queries, keys and values of a layer."""
        return [
            *(f"a{layer}.h{head}<q>" for head in range(self.heads)),
            *(f"a{layer}.h{head}<{kind}>" for kind in "kv" for head in range(self.groups)),
        ]

    def senders(self, layer: int) -> list[str]:
        return [f"a{layer}.h{head}" for head in range(self.heads)]

    def before(self, receiver: str) -> list[str]:
        """The senders that a receiver reads."""
        found = ["input"]
        for layer in self.layers:
            if receiver in self.receivers(layer):
                return found
            found += self.senders(layer)
            if receiver == f"m{layer}":
                return found
            found.append(f"m{layer}")
        assert receiver == "logits"
        return found

    def edges(self) -> list[str]:
        receivers = [
            each for layer in self.layers for each in (*self.receivers(layer), f"m{layer}")
        ]
        return [f"{u}->{v}" for v in (*receivers, "logits") for u in self.before(v)]

    # A forward.

    def run(self, tokens: Sequence[int], held: Values | None = None) -> Run:
        held = held or {}
        values: dict[str, Tensor] = {}
        streams: dict[str, Tensor] = {}

        def value(name: str, computed: Callable[[], Tensor]) -> Tensor:
            values[name] = held[name] if name in held else computed()
            return values[name]

        stream = value("input", lambda: self.embedded(tokens))
        for layer in self.layers:
            for name in self.receivers(layer):
                streams[name] = stream
                value(name, functools.partial(self.read, name, stream))
            z = [
                value(name, functools.partial(self.z, name, values)) for name in self.senders(layer)
            ]
            stream = stream + self.attention_adds(layer, z)
            name = f"m{layer}"
            streams[name] = stream
            stream = stream + self.factor * value(name, functools.partial(self.read, name, stream))
        streams["logits"] = stream
        return Run(values, streams, self.unembedded(value("logits", lambda: stream)))

    def embedded(self, tokens: Sequence[int]) -> Tensor:
        found = self.weights["model.embed_tokens.weight"][list(tokens)]
        if self.gemma:
            # This root is rounded.
            return found * float(torch.tensor(self.config.hidden_size**0.5, dtype=torch.float32))
        return found * getattr(self.config, "embedding_multiplier", 1.0)

    def unembedded(self, stream: Tensor) -> Tensor:
        """`[vocab]` at the last token."""
        logits = self.weights["lm_head.weight"] @ self.norm("model.norm", stream[-1])
        logits = logits / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def read(self, receiver: str, stream: Tensor) -> Tensor:
        """What a receiver makes of the stream that it reads."""
        if receiver == "logits":
            return stream
        if receiver[0] == "m":
            return self.mlp(int(receiver[1:]), stream)
        layer, head = map(int, receiver[1:-3].split(".h"))
        weight = self.weights[f"model.layers.{layer}.self_attn.{receiver[-2]}_proj.weight"]
        rows = weight[head * self.dim : (head + 1) * self.dim]
        return self.norm(f"model.layers.{layer}.input_layernorm", stream) @ rows.T

    def norm(self, name: str, rows: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"] + (1 if self.gemma else 0)
        return (
            rows / (rows.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) ** 0.5 * weight
        )

    def mlp(self, layer: int, stream: Tensor) -> Tensor:
        name = f"model.layers.{layer}."
        gate, up, down = (
            self.weights[f"{name}mlp.{each}_proj.weight"] for each in ("gate", "up", "down")
        )
        before = "pre_feedforward_layernorm" if self.gemma else "post_attention_layernorm"
        rows = self.norm(name + before, stream)
        gates = rows @ gate.T
        gates = gelu(gates, approximate="tanh") if self.gemma else silu(gates)
        found = gates * (rows @ up.T) @ down.T
        return self.norm(name + "post_feedforward_layernorm", found) if self.gemma else found

    def attention_adds(self, layer: int, z: Sequence[Tensor]) -> Tensor:
        """`[seq, width]`, of the z of all heads."""
        name = f"model.layers.{layer}."
        found = torch.cat(list(z), -1) @ self.weights[f"{name}self_attn.o_proj.weight"].T
        if self.gemma:
            return self.norm(name + "post_attention_layernorm", found)
        return self.factor * found

    def z(self, name: str, values: Values) -> Tensor:
        """`[seq, dim]`: what a head gives, of its query and its group's key and value."""
        layer, head = map(int, name[1:].split(".h"))
        group = head // self.share
        query = self.turned(values[f"a{layer}.h{head}<q>"])
        key = self.turned(values[f"a{layer}.h{group}<k>"])
        scores = query @ key.T * self.scale()
        cap = getattr(self.config, "attn_logit_softcapping", None)
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        at = torch.arange(len(query))
        back = at[:, None] - at
        window = self.window(layer)
        seen = (back >= 0) & (back < (window or len(at)))
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[f"a{layer}.h{group}<v>"]

    def turned(self, rows: Tensor) -> Tensor:
        """With rotary positions."""
        angles = torch.arange(len(rows))[:, None] * self.frequencies
        first, second = rows.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def scale(self) -> float:
        if self.gemma:
            return float(self.config.query_pre_attn_scalar) ** -0.5
        return float(getattr(self.config, "attention_multiplier", self.dim**-0.5))

    def window(self, layer: int) -> int | None:
        if self.gemma and self.config.layer_types[layer] == "full_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    # The definitions.

    def change(
        self,
        source: Sequence[int],
        target: Sequence[int],
        sender: str,
        backs: Sequence[int],
        zero: bool = False,
    ) -> Tensor:
        """What a sender changes in the stream, if it is changed so many tokens before the end."""
        own, given = self.run(target).values, self.run(source).values
        mixed = own[sender].clone()
        for back in backs:
            mixed[-back] = 0 if zero else given[sender][-back]
        if sender == "input":
            return mixed - own[sender]
        if sender[0] == "m":
            return self.factor * (mixed - own[sender])
        layer = int(sender[1:].split(".")[0])
        z, swapped = (
            [{**own, sender: each}[name] for name in self.senders(layer)]
            for each in (own[sender], mixed)
        )
        return self.attention_adds(layer, swapped) - self.attention_adds(layer, z)

    def edge(
        self,
        source: Sequence[int],
        target: Sequence[int],
        name: str,
        backs: Sequence[int],
        zero: bool = False,
    ) -> Tensor:
        sender, receiver = name.split("->")
        assert sender in self.before(receiver)
        stream = self.run(target).streams[receiver]
        stream = stream + self.change(source, target, sender, backs, zero)
        return self.run(target, {receiver: self.read(receiver, stream)}).logits

    def chain(
        self,
        source: Sequence[int],
        target: Sequence[int],
        path: Sequence[Sequence[str]],
        through: str | None = None,
    ) -> Tensor:
        """At all positions; the receivers are named as those of edges."""
        own, given = self.run(target).values, self.run(source).values
        sent = {name: given[name] for name in path[0]}
        for receivers in path[1:]:
            held = {name: own[name] for name in self.before("logits")}
            if through == "mlps":
                held = {name: each for name, each in held.items() if name[0] != "m"}
            streams = self.run(target, held | sent).streams
            read = {name: self.read(name, streams[name]) for name in receivers}
            sent = {name: each for name, each in read.items() if name[0] == "m"}
            for layer in self.layers:
                of_layer = {name: read[name] for name in self.receivers(layer) if name in read}
                for name in self.senders(layer):
                    head = int(name.split(".h")[1])
                    reads = {f"a{layer}.h{head}<q>"} | {
                        f"a{layer}.h{head // self.share}<{kind}>" for kind in "kv"
                    }
                    if reads & set(of_layer):
                        sent[name] = self.z(name, {**own, **of_layer})
        return self.run(target, read).logits

    def circuit(self, source: Sequence[int], target: Sequence[int], edges: set[str]) -> Tensor:
        """By asking what each node needs, from the logits down."""
        own = self.run(target)

        @functools.cache
        def sent(sender: str) -> Tensor:
            """The value of a sender in this very run."""
            if sender == "input":
                return self.embedded(source)
            if sender[0] == "m":
                return read(sender)
            layer = int(sender[1:].split(".")[0])
            return self.z(sender, {name: read(name) for name in self.receivers(layer)})

        @functools.cache
        def read(receiver: str) -> Tensor:
            stream = own.streams[receiver]
            live = [each for each in self.before(receiver) if f"{each}->{receiver}" in edges]
            for sender in live:
                if sender == "input":
                    stream = stream + sent(sender) - own.values[sender]
                elif sender[0] == "m":
                    stream = stream + self.factor * (sent(sender) - own.values[sender])
            for layer in self.layers:
                names = self.senders(layer)
                z = [sent(each) if each in live else own.values[each] for each in names]
                before = [own.values[each] for each in names]
                if set(names) & set(live):
                    stream = stream + self.attention_adds(layer, z)
                    stream = stream - self.attention_adds(layer, before)
            return self.read(receiver, stream)

        return self.unembedded(read("logits"))
