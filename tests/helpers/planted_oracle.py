"""Every edge of a planted circuit, by plain torch hooks: this file shares no code with nnpatch.

For Llamas alone, and prompts of one length without padding. An exact edge is one whole forward. The
estimates of edges are written out from their definitions, with autograd.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.helpers.planted_circuits import Planted

#: How modules' inputs or outputs are changed, in one forward.
Changes = Mapping[nn.Module, Callable[[Tensor], Tensor]]


_NONE: Changes = {}


class Receiver(NamedTuple):
    """What an edge ends in: columns of what a module puts out, or of what the last norm reads."""

    module: nn.Module
    #: What stands before it: the norm of what it reads. None for the logits.
    norm: nn.Module | None
    #: The layer, and if it reads the stream before (0) or after (1) that layer's attention.
    stage: tuple[int, int]
    columns: slice

    def reads(self, stream: Tensor) -> Tensor:
        """What it puts out, in the columns, given the stream."""
        return stream if self.norm is None else self.module(self.norm(stream))[..., self.columns]


class Run(NamedTuple):
    """One forward of a batch of prompts."""

    #: `[batch]`.
    metric: Tensor
    #: By the stage at which it is read, `[batch, seq, width]`.
    streams: dict[tuple[int, int], Tensor]
    #: By layer: what the output projection reads, and what the MLP adds.
    heads: list[Tensor]
    mlps: list[Tensor]
    #: What each receiver puts out: parts of what a forward made, so that it has a gradient.
    outputs: dict[str, Tensor]


class PlantedEdges:
    """All edges of a planted circuit, exactly and estimated."""

    def __init__(self, planted: Planted) -> None:
        self.planted = planted
        self.model = copy.deepcopy(planted.model).requires_grad_(False)
        self.layers = list(self.model.model.layers)
        self.end = (len(self.layers), 0)
        config = self.model.config
        self.dim = config.head_dim
        self.n_heads = config.num_attention_heads
        self.receivers = dict(self._receivers(config.num_key_value_heads))
        self.source = self.run(self.embedded(planted.source_tokens))
        self.target = self.run(self.embedded(planted.target_tokens))
        self.whole = (self.source.metric.mean() - self.target.metric.mean()).item()
        #: What each sender changes, and from which stage on.
        self.changes = dict(self._changes())
        self.stages = {name: stage for name, (stage, _) in self.changes.items()}

    def _receivers(self, groups: int) -> Iterator[tuple[str, Receiver]]:
        for number, layer in enumerate(self.layers):
            attention = layer.self_attn
            kinds = (("q", self.n_heads), ("k", groups), ("v", groups))
            for kind, heads in kinds:
                module = getattr(attention, f"{kind}_proj")
                for head in range(heads):
                    columns = slice(head * self.dim, (head + 1) * self.dim)
                    name = f"a{number}.h{head}<{kind}>"
                    yield name, Receiver(module, layer.input_layernorm, (number, 0), columns)
            norm = layer.post_attention_layernorm
            yield f"m{number}", Receiver(layer.mlp, norm, (number, 1), slice(None))
        yield "logits", Receiver(self.model.model.norm, None, self.end, slice(None))

    def _changes(self) -> Iterator[tuple[str, tuple[tuple[int, int], Tensor]]]:
        """By sender: the first stage that has it, and source minus target in the stream."""
        yield "input", ((0, 0), self.source.streams[0, 0] - self.target.streams[0, 0])
        for number, layer in enumerate(self.layers):
            before, project = self.target.heads[number], layer.self_attn.o_proj
            for head in range(self.n_heads):
                columns = slice(head * self.dim, (head + 1) * self.dim)
                mixed = before.clone()
                mixed[..., columns] = self.source.heads[number][..., columns]
                yield f"a{number}.h{head}", ((number, 1), project(mixed) - project(before))
            added = self.source.mlps[number] - self.target.mlps[number]
            yield f"m{number}", ((number + 1, 0), added)

    @property
    def edges(self) -> list[tuple[str, str]]:
        """Each sender with each receiver that comes after it."""
        return [
            (sender, name)
            for sender, stage in self.stages.items()
            for name, receiver in self.receivers.items()
            if stage <= receiver.stage
        ]

    def embedded(self, tokens: Tensor) -> Tensor:
        """The stream before layer 0."""
        return self.model.model.embed_tokens(tokens)

    def run(self, stream: Tensor, *, inputs: Changes = _NONE, outputs: Changes = _NONE) -> Run:
        """A forward from the stream before layer 0."""
        seen: dict[tuple[str, nn.Module], Tensor] = {}

        def before(module: nn.Module, arguments: tuple[Tensor, ...]) -> Tensor:
            (given,) = arguments
            seen["input", module] = inputs[module](given) if module in inputs else given
            return seen["input", module]

        def after(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            seen["output", module] = outputs[module](output) if module in outputs else output
            return seen["output", module]

        watched = {module for each in self.receivers.values() for module in each[:2] if module}
        watched |= {layer.self_attn.o_proj for layer in self.layers}
        with contextlib.ExitStack() as hooks:
            for module in watched:
                hooks.enter_context(module.register_forward_pre_hook(before))
                hooks.enter_context(module.register_forward_hook(after))
            logits = self.model(inputs_embeds=stream, use_cache=False).logits[:, -1]
        rows = torch.arange(len(logits))
        right = logits[rows, self.planted.source_answer_index]
        streams = {self.end: seen["input", self.model.model.norm]}
        for number, layer in enumerate(self.layers):
            streams[number, 0] = seen["input", layer.input_layernorm]
            streams[number, 1] = seen["input", layer.post_attention_layernorm]
        return Run(
            metric=right - logits[rows, self.planted.target_answer_index],
            streams=streams,
            heads=[seen["input", layer.self_attn.o_proj] for layer in self.layers],
            mlps=[seen["output", layer.mlp] for layer in self.layers],
            outputs={
                name: streams[self.end] if each.norm is None else seen["output", each.module]
                for name, each in self.receivers.items()
            },
        )

    def value(self, senders: Iterable[str], name: str) -> float:
        """What it is worth that a receiver reads what all the senders would have written."""
        receiver = self.receivers[name]
        stream = self.target.streams[receiver.stage].clone()
        for sender in senders:
            stage, change = self.changes[sender]
            assert stage <= receiver.stage, (sender, name)
            stream += change
        held = receiver.reads(stream)

        def hold(output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., receiver.columns] = held
            return changed

        start, changes = self.between(0), {receiver.module: hold}
        if receiver.norm is None:
            moved = self.run(start, inputs=changes).metric
        else:
            moved = self.run(start, outputs=changes).metric
        return (moved.mean() - self.target.metric.mean()).item() / self.whole

    def exact(self) -> dict[str, float]:
        """`"a0.h1->m3"` to its value, of all edges."""
        return {f"{sender}->{name}": self.value([sender], name) for sender, name in self.edges}

    # The estimates: what a sender changes, times the gradient at what the receiver reads.

    def estimated(self, method: str, steps: int = 5) -> dict[str, float]:
        """Of all edges, by one of `METHODS`; `steps` count for `eap-ig-*` alone."""
        gradients = METHODS[method](self, steps)
        return {
            f"{sender}->{name}": (self.changes[sender][1] * gradients(sender)[name]).sum().item()
            / len(self.target.metric)
            / self.whole
            for sender, name in self.edges
        }

    def gradients(self, start: Tensor, outputs: Changes = _NONE) -> dict[str, Tensor]:
        """By receiver: the gradient of all prompts' metrics at what it reads, through it alone."""
        with torch.enable_grad():
            run = self.run(start.requires_grad_(), outputs=outputs)
            found = torch.autograd.grad(run.metric.sum(), list(run.outputs.values()))
        back: dict[str, Tensor] = {}
        for (name, receiver), gradient in zip(self.receivers.items(), found, strict=True):
            read = run.streams[receiver.stage].detach().requires_grad_()
            with torch.enable_grad():
                output = receiver.reads(read)
            (back[name],) = torch.autograd.grad(output, read, gradient[..., receiver.columns])
        return back

    def stream_gradients(self, start: Tensor) -> dict[tuple[int, int], Tensor]:
        """By stage: the gradient of all prompts' metrics at the whole stream."""
        with torch.enable_grad():
            run = self.run(start.requires_grad_())
            found = torch.autograd.grad(run.metric.sum(), list(run.streams.values()))
        return dict(zip(run.streams, found, strict=True))

    def between(self, share: float) -> Tensor:
        """The stream before layer 0, on the way from target to source."""
        start = self.embedded(self.planted.target_tokens)
        return start + share * (self.embedded(self.planted.source_tokens) - start)


def _plus(change: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda output: output + change


def _mean(each: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    gathered = list(each)
    return {name: sum(one[name] for one in gathered) / len(gathered) for name in gathered[0]}


Gradients = Callable[[str], dict[str, Tensor]]


def _eap(edges: PlantedEdges, _: int) -> Gradients:
    found = edges.gradients(edges.between(0))
    return lambda _: found


def _clean_corrupted(edges: PlantedEdges, _: int) -> Gradients:
    found = _mean(edges.gradients(edges.between(share)) for share in (0, 1))
    return lambda _: found


def _inputs(edges: PlantedEdges, steps: int) -> Gradients:
    shares = [step / steps for step in range(1, steps + 1)]
    found = _mean(edges.gradients(edges.between(share)) for share in shares)
    return lambda _: found


def _activations(edges: PlantedEdges, steps: int) -> Gradients:
    shares = [step / steps for step in range(1, steps + 1)]
    found = {"input": _inputs(edges, steps)("input")}
    for number, layer in enumerate(edges.layers):
        project = layer.self_attn.o_proj
        attention = project(edges.source.heads[number]) - project(edges.target.heads[number])
        mlp = edges.changes[f"m{number}"][1]
        for group, module, change in (
            (f"a{number}", project, attention),
            (f"m{number}", layer.mlp, mlp),
        ):
            found[group] = _mean(
                edges.gradients(edges.between(0), {module: _plus(share * change)})
                for share in shares
            )
    return lambda sender: found[sender.partition(".")[0]]


METHODS: dict[str, Callable[[PlantedEdges, int], Gradients]] = {
    "eap": _eap,
    "eap-ig-inputs": _inputs,
    "eap-ig-activations": _activations,
    "clean-corrupted": _clean_corrupted,
}
