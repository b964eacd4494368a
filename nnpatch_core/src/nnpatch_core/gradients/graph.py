"""One forward with its graph: the activations at the sites, and the logits' gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core.adapters import Component, Location, Place, in_order
from nnpatch_core.batch import Batch
from nnpatch_core.errors import GradientError
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    forward,
    kept_arguments,
    read_component,
    write_component,
)

#: What a module was called with: its arguments and its keywords.
Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_At = TypeVar("_At", bound=tuple[Any, ...])


@attrs.define(eq=False)
class _Held:
    """Which layer adds a constant to the residual stream, as far as a backward is concerned."""

    layer: int | None = None


@attrs.frozen(eq=False)
class Graph:
    """A forward whose graph is kept.

    Args:
        logits: `[batch, vocab]` at each prompt's last token, in float32 on the CPU.
        activations: what was at each location, `[batch, seq, width]`.
        outputs: the residual stream after each layer, where layers are to be held.
        calls: what the modules were called with that are to be called again.
    """

    logits: Tensor
    activations: Mapping[Location, Tensor]
    outputs: Mapping[int, Tensor]
    calls: Mapping[str, Call]
    _held: _Held = attrs.field(factory=_Held, alias="held")

    def gradients(self, cotangent: Tensor, wanted: Mapping[_At, Tensor]) -> dict[_At, Tensor]:
        """The gradient at each of `wanted`, of the logits weighted by `cotangent`.

        Args:
            cotangent: `[batch, vocab]`.
            wanted: by location, or by a location and more.

        Raises:
            GradientError: the logits do not depend on one of them.
        """
        return _gradients(self.logits, cotangent, wanted)

    def gradients_held(
        self, layer: int, cotangent: Tensor, wanted: Mapping[Location, Tensor]
    ) -> dict[Location, Tensor]:
        """The same for what is below a layer, which adds what it added, whatever comes in.

        Args:
            layer: the layer.
            cotangent: the gradient at its output, `[batch, seq, width]`.
            wanted: what is below it.
        """
        self._held.layer = layer
        try:
            return _gradients(self.outputs[layer], cotangent, wanted)
        finally:
            self._held.layer = None


def _gradients(of: Tensor, cotangent: Tensor, wanted: Mapping[_At, Tensor]) -> dict[_At, Tensor]:
    if not wanted:
        return {}
    # What a hook has detached has no graph: as if there were no way from the logits to it.
    asked = [value for value in wanted.values() if value.requires_grad]
    gradients: Iterator[Tensor | None] = iter([None] * len(asked))
    if of.requires_grad and asked:
        gradients = iter(
            torch.autograd.grad(of, asked, cotangent, retain_graph=True, allow_unused=True)
        )
    known = {}
    for location, value in wanted.items():
        gradient = next(gradients) if value.requires_grad else None
        if gradient is None:
            raise GradientError(
                f"no gradient comes from the logits to what is at {location[0].rstrip('.')!r} "
                f"({location[1]}): the model does not go on with the tensor that stands there, or "
                "leaves the graph after it, as detach() and no_grad() do"
            )
        known[location] = gradient
    return known


def forward_with_graph(
    nnmodel: Any, batch: Batch, visit: Callable[[Any], None] | None = None
) -> Tensor:
    """The logits of a forward, as `forward` gives them, with their graph.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        visit: called inside the trace.

    Raises:
        GradientError: the logits have no gradient.
    """
    try:
        logits = forward(nnmodel, batch, visit, gradients=True)
    except RuntimeError as error:
        if "inference" not in str(error).lower():
            raise
        raise GradientError(f"the model works in inference mode: {error}") from error
    if not logits.requires_grad:
        raise GradientError(
            f"the logits of {type(module_of(nnmodel)).__name__} have no gradient: something in its "
            "forward leaves the graph, as detach() and no_grad() do"
        )
    return logits


def open_graph(
    nnmodel: Any,
    batch: Batch,
    places: Iterable[Place],
    *,
    held: Sequence[Place] = (),
    called: Mapping[int, str] | None = None,
) -> Graph:
    """Run `batch` and keep the graph from the first layer with a place on.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the prompts.
        places: where activations and gradients are wanted, all of one list of layers.
        held: where the layers add to the residual stream, if layers are to be held.
        called: by layer the path of a module whose call is to be kept.

    Raises:
        GradientError: the model's logits have no gradient.
    """
    ordered = in_order({place.location: place for place in (*places, *held)}.values())
    path = ordered[0].api.layers
    first, layers = ordered[0].layer, ordered[0].n_layers
    adding = {place.location for place in held}
    shape = (len(batch), batch.seq_len)
    activations: dict[Location, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    calls: dict[str, Call] = {}
    state = _Held()

    def take(envoy: Any, component: Component, location: Location, layer: int) -> None:
        # A copy, so that only what goes on from here counts, and one more for the model, so that
        # what it does in place does not change the first.
        value = read_component(envoy, component, shape).clone()
        activations[location] = value
        if location in adding and value.requires_grad:
            value.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: torch.zeros_like(gradient) if state.layer == layer else None
            )
        write_component(envoy, component, value.clone())

    def note(traced: Any, place: Place) -> None:
        module = (called or {}).get(place.layer)
        if module is not None and place.component.module.startswith(f"{module}."):
            at = f"{path}.{place.layer}.{module}"
            if at not in calls:
                args, kwargs = follow(traced, at).inputs
                calls[at] = (kept_arguments(args), kept_arguments(kwargs))

    def visit(traced: Any) -> None:
        for layer in range(first, layers):
            envoy, end = follow(traced, f"{path}.{layer}"), (f"{path}.{layer}.", "output", 0)
            if layer == first:
                start = read_component(envoy, LAYER_INPUT)
                write_component(envoy, LAYER_INPUT, start.detach().requires_grad_())
            for place in ordered:
                if place.layer == layer:
                    note(traced, place)
                    take(follow(traced, place.path), place.component, place.location, layer)
            if held:
                if end not in activations:
                    take(envoy, LAYER_OUTPUT, end, layer)
                outputs[layer] = activations[end]

    logits = forward_with_graph(nnmodel, batch, visit)
    return Graph(logits, activations, outputs, calls, state)
