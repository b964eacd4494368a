"""What a check looks at: an adapter on a model, with two batches of prompts to run."""

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
    described,
    heads_of,
    n_layers,
    row_of,
    table_of,
)
from nnpatch_core.batch import Batch, pack_left
from nnpatch_core.errors import AdapterError
from nnpatch_core.site import Site, execution_order
from nnpatch_core.tracing import forward

#: Given a site's part of the activation of this run, what to put there.
Edit: TypeAlias = Callable[[Tensor], Tensor]

#: Prompts are longer than the window of the tiny models that have one.
_LENGTH, _PROMPTS = 8, 4


class CheckError(AssertionError):
    """What a check found to be wrong with an adapter."""


def nothing_to_see(what: str) -> str:
    """Why a check that looks at `what` fails where no layer has it, rather than pass."""
    return f"no layer that is looked at has {what}: take a model that has one"


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
        """How many layers the model has."""
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
        return rounding(next(self.model.parameters()).dtype)

    def with_heads(self, *names: str) -> list[int]:
        """The layers that have all of these components, with heads."""
        tables = ((layer, table_of(self.api, self.model, layer)) for layer in self.layers)
        return [
            layer
            for layer, table in tables
            if all(name in table and table[name].heads for name in names)
        ]

    def api_row(self, name: str, layer: int) -> Component:
        """Where a component is in a layer."""
        return row_of(self.api, self.model, layer, name)

    def heads(self, layer: int) -> Heads:
        """How many heads a layer has."""
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
                found = site.read(traced, batch.tokens.shape)
                if id(site) not in reading:
                    site.write(traced, edits[site](site.select(found, traced)), batch.mask)
                    continue
                kept[site.component, site.layer] = found if gradients else found.clone()
                if gradients:
                    # What was read may be a view; what follows must depend on it, not on its base.
                    site.replace(traced, found)

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

    def differs(self, one: Tensor, other: Tensor) -> Tensor:
        """Elementwise: whether two activations differ by more than rounding."""
        one, other = _comparable(one, other)
        scale = torch.maximum(one.abs().max(), other.abs().max())
        return ~((one - other).abs() <= self.rounding * scale)

    def expect_same(self, one: Tensor, other: Tensor, what: str) -> None:
        """Raise `CheckError` if two activations differ by more than rounding."""
        wrong = self.differs(one, other)
        if wrong.any():
            one, other = _comparable(one, other)
            raise CheckError(f"{what}: off by up to {(one - other).abs().max().item():.3g}")


def _comparable(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The two on one device, in a type in which their difference is exact enough."""
    dtype = torch.float64 if torch.float64 in (one.dtype, other.dtype) else torch.float32
    return one.detach().to(dtype), other.detach().to(one.device, dtype)


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """Activations have gradients, whatever is frozen or switched off around it."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weights = [getattr(embedding, "weight", None), *model.parameters()]
    # That on which everything depends.
    weight = next(each for each in weights if each is not None and each.is_floating_point())
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
