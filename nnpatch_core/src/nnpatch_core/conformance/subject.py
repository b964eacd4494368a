"""The subject of a check: an adapter on a model, with two batches of prompts to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor, nn

from nnpatch_core._models import (
    as_nnsight,
    evaluating,
    forward_arguments,
    input_device,
    module_of,
    vocab_size,
)
from nnpatch_core._rounding import rounding
from nnpatch_core.adapters import (
    Component,
    Heads,
    ModelAPI,
    check_layer,
    component_of,
    described,
    heads_of,
    n_layers,
    table_of,
)
from nnpatch_core.batch import Batch, pack_left
from nnpatch_core.errors import AdapterError
from nnpatch_core.site import Site, execution_order
from nnpatch_core.tracing import forward

#: Makes of a site's part of the activation what is put there.
Edit: TypeAlias = Callable[[Tensor], Tensor]

#: Prompts are longer than the window of the tiny models that have one.
_LENGTH, _PROMPTS = 8, 4
#: The position that checks edit: there are tokens before it and behind it.
POSITION = 2


class CheckError(AssertionError):
    """A fault of an adapter, found by a check."""


def nothing_to_see(what: str) -> str:
    """Say why a check of `what` fails, rather than pass, where no layer has it."""
    return f"no layer that is looked at has {what}: take a model that has one"


def put(value: Tensor) -> Edit:
    """Put a value there, whatever the activation is."""
    return lambda _: value


@attrs.frozen(eq=False)
class Run:
    """One forward: the logits `[batch, vocab]` at the last token, and what was read on the way."""

    logits: Tensor
    activations: Mapping[tuple[str, int], Tensor]


@attrs.frozen(eq=False)
class Subject:
    """An adapter on a model, and two batches of random prompts, `[4, 8]`.

    Args:
        api: the adapter.
        nnmodel: the model, wrapped by nnsight.
        source: where activations are taken.
        target: where they are put.
        only: the layers to look at; all by default.
    """

    api: ModelAPI
    nnmodel: Any
    source: Batch
    target: Batch
    only: tuple[int, ...] | None = None

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        return module_of(self.nnmodel)

    @property
    def n_layers(self) -> int:
        """The number of layers of the model."""
        return n_layers(self.api, self.model)

    @property
    def layers(self) -> Sequence[int]:
        """The numbers of the layers to look at."""
        return range(self.n_layers) if self.only is None else self.only

    @property
    def places(self) -> list[tuple[str, int]]:
        """Each component of each layer that has it."""
        return [
            (name, layer) for layer in self.layers for name in table_of(self.api, self.model, layer)
        ]

    @property
    def rounding(self) -> float:
        """Share of the largest number of an activation below which a difference is rounding."""
        return rounding(next(self.model.parameters()))

    def with_heads(self, *names: str) -> list[int]:
        """The layers that have all of these components, with heads."""
        tables = ((layer, table_of(self.api, self.model, layer)) for layer in self.layers)
        return [
            layer
            for layer, table in tables
            if all(name in table and table[name].heads for name in names)
        ]

    def component(self, name: str, layer: int) -> Component:
        """A component of a layer."""
        return component_of(self.api, self.model, layer, name)

    def heads(self, layer: int) -> Heads:
        """The numbers of heads of a layer."""
        return heads_of(self.api, self.model, layer)

    def site(
        self, name: str, layer: int, head: int | None = None, seq_pos: Sequence[int] | None = None
    ) -> Site:
        """A site of the adapter."""
        return Site.get_site(self.api, name, layer, head, seq_pos)

    def run(
        self,
        batch: Batch,
        reads: Iterable[tuple[str, int]] = (),
        edits: Mapping[Site, Edit] | None = None,
        *,
        gradients: bool = False,
    ) -> Run:
        """Run `batch`, with edits, and read whole components `[batch, seq, width]` on the way.

        What is read at an edited component is what the edit left there. Those who ask for gradients
        are inside of `differentiable`.
        """
        kept: dict[tuple[str, int], Tensor] = {}
        edits = edits or {}
        wanted = {(name, layer): self.site(name, layer) for name, layer in reads}
        # A stable order: an edit comes before a reading of the same component.
        visited = execution_order([*edits, *wanted.values()], self.nnmodel)
        reading = set(map(id, wanted.values()))

        def visit(traced: Any) -> None:
            for site in visited:
                activation = site.read(traced, batch.tokens.shape)
                if id(site) not in reading:
                    site.write(traced, edits[site](site.select(activation, traced)), batch.mask)
                    continue
                kept[site.component, site.layer] = activation if gradients else activation.clone()
                if gradients:
                    # What was read may be a view; what follows must depend on it, not on its base.
                    site.replace(traced, activation)

        with evaluating(self.model):
            logits = forward(self.nnmodel, batch, visit, gradients=gradients)
        return Run(logits, kept)

    def run_plain(self, batch: Batch, hooks: Iterable[Any] = ()) -> Tensor:
        """The logits `[batch, seq, vocab]` without nnsight; `hooks` are removed afterwards."""
        device = input_device(self.model)
        arguments = forward_arguments(self.model, batch if device is None else batch.to(device))
        arguments.pop("logits_to_keep", None)
        try:
            with evaluating(self.model), torch.no_grad():
                output = self.model(**arguments)
        finally:
            for hook in hooks:
                hook.remove()
        logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
        return logits

    def differs(self, first: Tensor, second: Tensor) -> Tensor:
        """Elementwise: whether two activations differ by more than rounding."""
        first, second = _comparable(first, second)
        scale = torch.maximum(first.abs().max(), second.abs().max())
        return ~((first - second).abs() <= self.rounding * scale)

    def expect_same(self, first: Tensor, second: Tensor, what: str) -> None:
        """Raise `CheckError` if two activations differ by more than rounding."""
        wrong = self.differs(first, second)
        if wrong.any():
            first, second = _comparable(first, second)
            raise CheckError(f"{what}: off by up to {(first - second).abs().max().item():.3g}")


def _comparable(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The two on one device, in a type in which their difference is exact enough."""
    dtype = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    return first.detach().to(dtype), second.detach().to(first.device, dtype)


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """Activations have gradients, whatever is frozen or switched off around it."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weights = [getattr(embedding, "weight", None), *model.parameters()]
    # That on which everything depends.
    weight = next(weight for weight in weights if weight is not None and weight.is_floating_point())
    asked = weight.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        weight.requires_grad = True
        try:
            yield
        finally:
            weight.requires_grad = asked


def make_subject(api: ModelAPI, nnmodel: Any, layers: Iterable[int] | None = None) -> Subject:
    """An adapter on a model, with prompts of random tokens drawn from its vocabulary.

    Raises:
        AdapterError: `nnmodel` is no model, or has no vocabulary to draw from.
        LayerError: the model lacks one of `layers`.
    """
    traced = as_nnsight(nnmodel)
    source, target = random_prompts(module_of(traced))
    only = None
    if layers is not None:
        count = n_layers(api, module_of(traced))
        only = tuple(sorted({check_layer(layer, count) for layer in layers}))
    return Subject(api, traced, source, target, only)


def random_prompts(model: nn.Module) -> tuple[Batch, Batch]:
    """Two batches of random tokens `[4, 8]` of a model's vocabulary.

    Raises:
        AdapterError: the model has no input embedding to tell its vocabulary.
    """
    size = vocab_size(model)
    if size is None or size < 8:
        raise AdapterError(f"{described(model)} has no input embedding to draw prompts for")
    random = torch.Generator().manual_seed(0)
    # The first few ids are often special ones.
    tokens = torch.randint(3, size, (2, _PROMPTS, _LENGTH), generator=random, device="cpu")
    every = torch.ones(_PROMPTS, _LENGTH, dtype=torch.int64, device="cpu")
    return pack_left(tokens[0], every), pack_left(tokens[1], every)
