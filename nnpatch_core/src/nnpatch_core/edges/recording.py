"""A run of some prompts, as far as edges need it, with or without its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from nnpatch_core._models import follow, module_of
from nnpatch_core._upstream import forward_of
from nnpatch_core._wrappers import is_at_hand
from nnpatch_core.adapters import Location, ModelAPI, Place, n_layers, place_of, table_of
from nnpatch_core.batch import Batch
from nnpatch_core.edges.steady import same_numbers
from nnpatch_core.errors import AdapterError, EngineError
from nnpatch_core.gradients import forward_with_graph
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    forward,
    forward_hooks,
    in_words,
    kept_arguments,
    read,
    read_component,
    write,
    write_component,
)

#: What a layer's attention is computed from.
_ATTENTION = ("q", "k", "v")
#: What is kept of each layer.
_KEPT = ("o", "attn", "mlp")
#: The components of a layer that edges go by.
_NEEDED = (*_ATTENTION, *_KEPT)


@attrs.frozen(eq=False)
class Recording:
    """A run, as far as edges need it: what its layers read and write.

    Args:
        batch: its prompts.
        logits: as `forward` gives them.
        streams: the residual stream before each layer, and behind the last, `[batch, seq, width]`;
            each lies on the device of the layer that it comes before.
        heads: for each layer what its heads hand to the output projection, `[batch, seq, any]`.
        attn: for each layer the component `attn`, `[batch, seq, width]`.
        mlp: for each layer the component `mlp`.
        rests: for each layer what it gives besides the stream; None if it gives no tuple.
    """

    batch: Batch
    logits: Tensor
    streams: Sequence[Tensor]
    heads: Sequence[Tensor]
    attn: Sequence[Tensor]
    mlp: Sequence[Tensor]
    rests: Sequence[tuple[Any, ...] | None]


@attrs.frozen(eq=False)
class Moved:
    """Activations that a run gets in place of its own: where a gradient is taken.

    Args:
        stream: the stream before layer 0, `[batch, seq, width]`; None is the run's own.
        attn: by layer the component `attn`.
        mlp: by layer the component `mlp`.
    """

    stream: Tensor | None = None
    attn: Mapping[int, Tensor] = attrs.field(factory=dict)
    mlp: Mapping[int, Tensor] = attrs.field(factory=dict)


@attrs.frozen(eq=False)
class Graph:
    """The graph of a run: what gradients are taken at.

    Args:
        logits: as `forward` gives them.
        streams: the stream before each layer, and behind the last.
        parts: by location what stands at `q`, `k`, `v`, `attn` and `mlp` of each layer.
        projected: by location what the projections of queries, keys and values were given, where
            they are plain matrices.
    """

    logits: Tensor
    streams: Sequence[Tensor]
    parts: Mapping[Location, Tensor]
    projected: Mapping[Location, Tensor]


def layer_places(api: ModelAPI, model: Any) -> list[dict[str, Place]]:
    """The components of each layer that edges go by.

    Raises:
        AdapterError: a layer lacks one.
    """
    found = []
    for layer in range(n_layers(api, model)):
        table = table_of(api, model, layer)
        missing = [name for name in _NEEDED if name not in table]
        if missing:
            raise AdapterError(
                f"edges go between the heads and MLPs of a model, and adapter {api.name!r} has no "
                f"{', '.join(missing)} in layer {layer}; there it has {', '.join(table)}"
            )
        own = {name: place_of(api, model, layer, name) for name in _NEEDED}
        if own["mlp"].order < own["q"].order:
            raise AdapterError(
                f"edges take a layer's attention to come before its MLP, or beside it, and by "
                f"adapter {api.name!r} the MLP comes first in layer {layer}"
            )
        found.append(own)
    return found


def record_run(nnmodel: Any, api: ModelAPI, batch: Batch) -> Recording:
    """Run `batch`, and keep what its layers read and write."""
    return recorded(nnmodel, api, batch)[0]


def recorded(nnmodel: Any, api: ModelAPI, batch: Batch) -> tuple[Recording, list[Any]]:
    """The run of `batch`, and what each layer was called with besides the stream.

    Raises:
        EngineError: a layer does not get what the one before it gives.
    """
    model = module_of(nnmodel)
    notes = _Notes(layer_places(api, model))
    logits = forward(nnmodel, batch, notes.visitor(api.layers, batch))
    return notes.recording(model, batch, logits), notes.calls


def graphed(
    nnmodel: Any, api: ModelAPI, batch: Batch, moved: Moved | None = None
) -> tuple[Recording, list[Any], Graph]:
    """The same, and the graph of the run.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        batch: the prompts.
        moved: what the run is given in place of its own.

    Raises:
        EngineError: a layer does not get what the one before it gives.
        GradientError: the logits have no gradient.
    """
    model = module_of(nnmodel)
    places = layer_places(api, model)
    notes = _Notes(places, _Ends(_plain(model, places), Moved() if moved is None else moved))
    logits = forward_with_graph(nnmodel, batch, notes.visitor(api.layers, batch))
    run, ends = notes.recording(model, batch, logits.detach()), notes.ends
    assert ends is not None
    return run, notes.calls, Graph(logits, ends.streams, ends.parts, ends.projected)


@attrs.frozen(eq=False)
class _Ends:
    """Where the gradients of a run are taken, as it goes on.

    Args:
        plain: the locations that are their module's input times a matrix, and nothing else.
        moved: what the run is given in place of its own.
    """

    plain: frozenset[Location]
    moved: Moved
    streams: list[Tensor] = attrs.field(factory=list)
    parts: dict[Location, Tensor] = attrs.field(factory=dict)
    projected: dict[Location, Tensor] = attrs.field(factory=dict)

    def stream(self, envoy: Any, layer: int, value: Tensor) -> Tensor:
        """Take the stream before a layer, in a trace."""
        if layer == 0 and self.moved.stream is not None:
            value = self.moved.stream.to(value)
        self.streams.append(_taken(value))
        write_component(envoy, LAYER_INPUT, self.streams[-1].clone())
        return self.streams[-1]

    def last(self, envoy: Any, value: Tensor) -> Tensor:
        """Take the stream behind the last layer, in a trace."""
        self.streams.append(_taken(value))
        write_component(envoy, LAYER_OUTPUT, self.streams[-1].clone())
        return self.streams[-1]

    def part(self, traced: Any, layer: int, place: Place, shape: tuple[int, int]) -> Tensor:
        """Take a component of a layer, in a trace."""
        if place.location not in self.parts:
            if place.location in self.plain:
                self.projected[place.location] = follow(traced, place.path).input
            value = read(traced, place, shape)
            given = {"attn": self.moved.attn, "mlp": self.moved.mlp}.get(place.name, {}).get(layer)
            self.parts[place.location] = _taken(value if given is None else given.to(value))
            write(traced, place, self.parts[place.location].clone())
        return self.parts[place.location]


@attrs.frozen(eq=False)
class _Notes:
    """Notes on a run, as it goes on.

    Args:
        places: for each layer its components, by name.
        ends: where gradients are taken; None is a run without a graph.
        changed: layers that get something else than the one before them gives.
    """

    places: Sequence[Mapping[str, Place]]
    ends: _Ends | None = None
    streams: list[Tensor] = attrs.field(factory=list)
    kept: dict[str, list[Tensor]] = attrs.field(factory=lambda: {name: [] for name in _KEPT})
    calls: list[Any] = attrs.field(factory=list)
    rests: list[tuple[Any, ...] | None] = attrs.field(factory=list)
    changed: list[int] = attrs.field(factory=list)

    def visitor(self, path: str, batch: Batch) -> Any:
        """Reads layer by layer, inside a trace."""
        shape, ends = (len(batch), batch.seq_len), self.ends
        names = _KEPT if ends is None else _NEEDED

        def visit(traced: Any) -> None:
            handed: Tensor | None = None
            for layer, own in enumerate(self.places):
                envoy = follow(traced, f"{path}.{layer}")
                stream = read_component(envoy, LAYER_INPUT, shape)
                if handed is not None and not same_numbers(handed.view_as(stream), stream):
                    self.changed.append(layer)
                self.calls.append(_called(envoy))
                taken = None if ends is None else ends.stream(envoy, layer, stream)
                self.streams.append(_copy(stream, taken))
                for place in sorted((own[name] for name in names), key=lambda each: each.order):
                    part = None
                    if ends is not None and place.name != "o":
                        part = ends.part(traced, layer, place, shape)
                    if place.name in self.kept:
                        value = read(traced, place, shape) if part is None else part
                        self.kept[place.name].append(_copy(value, part))
                output = envoy.output
                several = isinstance(output, tuple | list)
                self.rests.append(kept_arguments(tuple(output[1:])) if several else None)
                handed = output[0] if several else output
            stream = read_component(envoy, LAYER_OUTPUT, shape)
            self.streams.append(_copy(stream, None if ends is None else ends.last(envoy, stream)))

        return visit

    def recording(self, model: Any, batch: Batch, logits: Tensor) -> Recording:
        """The run, now that it is over.

        Raises:
            EngineError: a layer does not get what the one before it gives.
        """
        if self.changed:
            hooks = forward_hooks(model)
            told = f", and the model has {in_words(hooks)}" if hooks else ""
            layer = self.changed[0]
            raise EngineError(
                f"edges need layers that hand the residual stream on to one another, and layer "
                f"{layer} gets something else than layer {layer - 1} gives{told}: take away what "
                "changes it on the way"
            )
        kept = self.kept
        # Each lies with the layer that reads it; the one before may be on another device.
        before = [
            stream.to(own.device) for stream, own in zip(self.streams, kept["mlp"], strict=False)
        ]
        streams = [*before, self.streams[-1]]
        return Recording(batch, logits, streams, kept["o"], kept["attn"], kept["mlp"], self.rests)


def _called(envoy: Any) -> tuple[Any, Any]:
    """The arguments of a layer besides the stream, in a trace."""
    args, kwargs = envoy.inputs
    if not args:
        name = next(iter(kwargs))
        kwargs = {key: value for key, value in kwargs.items() if key != name}
    return kept_arguments(args[1:]), kept_arguments(kwargs)


def _copy(value: Tensor, taken: Tensor | None) -> Tensor:
    """An activation that stays as it is: later layers may work in place, but not on a `taken`."""
    return value.detach().clone() if taken is None else taken.detach()


def _taken(value: Tensor) -> Tensor:
    # A copy, so that only what goes on from here counts.
    value = value.clone()
    return value if value.requires_grad else value.detach().requires_grad_()


def _plain(model: Any, places: Sequence[Mapping[str, Place]]) -> frozenset[Location]:
    """The queries, keys and values that are a matrix times what their module is given."""
    some = [own[name] for own in places for name in _ATTENTION]
    return frozenset(
        place.location
        for place in some
        if _is_plain(model.get_submodule(place.path.rstrip(".")), place)
    )


def _is_plain(module: nn.Module, place: Place) -> bool:
    """Whether what a component gives is its module's input times a matrix, and nothing else."""
    return (
        type(module) is nn.Linear
        and is_at_hand(module.weight)
        and place.component.side == "output"
        and not (module._forward_hooks or module._forward_pre_hooks)
        and forward_of(module) is None
    )
