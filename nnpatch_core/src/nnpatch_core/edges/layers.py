"""A model's layers as steps on the residual stream, each of which is called by itself.

A step takes the stream of any number of rows. It is the layer's own forward, with its own norms and
projections, as far as it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._rounding import rounding
from nnpatch_core.adapters import Location, ModelAPI, Place, heads_of, n_layers, place_of, table_of
from nnpatch_core.batch import Batch
from nnpatch_core.edges.nodes import Nodes
from nnpatch_core.errors import AdapterError, EngineError, PatchingError
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    call,
    forward,
    kept_arguments,
    of_rows,
    read,
    read_component,
    write,
)

#: The components of a layer that edges go by.
_NEEDED = ("q", "k", "v", "o", "attn", "mlp")
#: How many tokens pass a layer together when it is called by itself.
_TOKENS = 2048
#: How far a factor may be from 1 by rounding alone.
_SAME = 1e-3


@attrs.frozen(eq=False)
class Recording:
    """A run, as far as edges need it: what its layers read and write.

    Args:
        batch: its prompts.
        logits: as `forward` gives them.
        streams: the residual stream before each layer, and behind the last, `[batch, seq, width]`.
        heads: for each layer what its heads hand to the output projection, `[batch, seq, any]`.
        attn: for each layer the component `attn`, `[batch, seq, width]`.
        mlp: for each layer the component `mlp`.
    """

    batch: Batch
    logits: Tensor
    streams: Sequence[Tensor]
    heads: Sequence[Tensor]
    attn: Sequence[Tensor]
    mlp: Sequence[Tensor]


@attrs.frozen(eq=False)
class Layers:
    """The layers of a model, ready to be called on the stream of some prompts.

    Args:
        nnmodel: the model, wrapped by nnsight.
        path: dotted path of the list of layers.
        places: for each layer its components, by name.
        nodes: the nodes of the model.
        attn: for each layer by what its `attn` is multiplied as it is added to the stream.
        mlp: the same of its `mlp`.
        target: the run whose arguments the layers are called with.
        calls: for each layer what it was called with besides the stream.
        rows: how many rows these arguments have.
    """

    nnmodel: Any
    path: str
    places: Sequence[Mapping[str, Place]]
    nodes: Nodes
    attn: Sequence[float]
    mlp: Sequence[float]
    target: Recording
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    rows: int

    def received(self, layer: int, stream: Tensor, prompts: Tensor) -> dict[str, Tensor]:
        """A layer's queries, keys and values of a stream before it, `[rows, seq, any]` by name.

        Args:
            layer: the layer.
            stream: `[rows, seq, width]`.
            prompts: `[rows]`, the prompt of each row.
        """
        places = [self.places[layer][name] for name in ("q", "k", "v")]
        parts: dict[str, list[Tensor]] = {place.name: [] for place in places}
        for part in _parts(stream):
            rows = stream[part]

            def visit(traced: Any, rows: Tensor = rows) -> None:
                known: dict[object, Tensor] = {}
                for place in sorted(places, key=lambda each: each.order):
                    if place.location not in known:
                        known[place.location] = read(traced, place, (len(rows), rows.shape[1]))
                    parts[place.name].append(known[place.location])

            self._call(layer, rows, prompts[part], visit)
        return {name: torch.cat(each) for name, each in parts.items()}

    def attended(
        self, layer: int, given: Mapping[str, Tensor], prompts: Tensor, stream: Tensor | None = None
    ) -> Tensor:
        """What a layer's heads hand on, given other queries, keys or values, `[rows, seq, any]`.

        Args:
            layer: the layer.
            given: component to `[rows, seq, any]`, of whichever of `q`, `k`, `v` are given.
            prompts: `[rows]`, the prompt of each row.
            stream: the stream before the layer; None is the target run's.
        """
        stream = self.target.streams[layer][prompts] if stream is None else stream
        own, found = self.places[layer], []
        for part in _parts(stream):
            rows = stream[part]

            def visit(traced: Any, rows: Tensor = rows, part: slice = part) -> None:
                shape = (len(rows), rows.shape[1])
                for name in sorted(given, key=lambda each: own[each].order):
                    write(traced, own[name], given[name][part])
                found.append(read(traced, own["o"], shape).clone())

            self._call(layer, rows, prompts[part], visit)
        return torch.cat(found)

    def added_by_heads(self, layer: int, heads: Tensor, prompts: Tensor) -> Tensor:
        """What a layer's attention adds to the stream, `[rows, seq, width]`, given its heads.

        Args:
            layer: the layer.
            heads: `[rows, seq, any]`, what they hand to the output projection.
            prompts: `[rows]`, the prompt of each row.
        """
        stream, own = self.target.streams[layer], self.places[layer]
        found: list[Tensor] = []
        for part in _parts(heads):
            rows = heads[part]

            def visit(traced: Any, rows: Tensor = rows) -> None:
                write(traced, own["o"], rows)
                found.append(read(traced, own["attn"], (len(rows), rows.shape[1])).clone())

            self._call(layer, stream[prompts[part]], prompts[part], visit)
        return self.attn[layer] * torch.cat(found)

    def changed_by_heads(self, layer: int, heads: Tensor, prompts: Tensor) -> Tensor:
        """By how much that changes, `[rows, seq, width]`, where heads are not the target run's."""
        own = self.attn[layer] * self.target.attn[layer][prompts]
        return self.added_by_heads(layer, heads, prompts) - own

    def mlp_of(
        self, layer: int, stream: Tensor, prompts: Tensor, attn: Tensor | None = None
    ) -> Tensor:
        """A layer's component `mlp`, `[rows, seq, width]`, given the stream before the layer.

        Args:
            layer: the layer.
            stream: `[rows, seq, width]`.
            prompts: `[rows]`, the prompt of each row.
            attn: the layer's component `attn` in each row; None is the target run's.
        """
        own, found = self.places[layer], []
        for part in _parts(stream):
            rows, some = stream[part], prompts[part]
            attention = self.target.attn[layer][some] if attn is None else attn[part]

            def visit(traced: Any, rows: Tensor = rows, attention: Tensor = attention) -> None:
                shape = (len(rows), rows.shape[1])
                for place in sorted((own["attn"], own["mlp"]), key=lambda each: each.order):
                    if place is own["mlp"]:
                        found.append(read(traced, place, shape).clone())
                    else:
                        write(traced, place, attention)

            self._call(layer, rows, some, visit)
        return torch.cat(found)

    @property
    def start(self) -> Location:
        """Where the stream before the first layer is."""
        return (f"{self.path}.0.", "input", 0)

    def end(self, layer: int) -> Location:
        """Where the stream behind a layer is."""
        return (f"{self.path}.{layer}.", "output", 0)

    def _call(self, layer: int, stream: Tensor, prompts: Tensor, visit: Any) -> None:
        args, kwargs = self.calls[layer]
        rest = tuple(of_rows(value, prompts, self.rows) for value in args)
        others = {name: of_rows(value, prompts, self.rows) for name, value in kwargs.items()}
        try:
            call(self.nnmodel, f"{self.path}.{layer}", (stream, *rest), others, visit)
        except (PatchingError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise EngineError(
                f"layer {layer} cannot be called by itself, with other rows than in a run: "
                f"{type(error).__name__}: {error}"
            ) from error


def _parts(rows: Tensor) -> Iterator[slice]:
    """Rows `[rows, seq, any]`, some at a time."""
    some = max(_TOKENS // rows.shape[1], 1)
    for start in range(0, len(rows), some):
        yield slice(start, start + some)


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


def nodes_of(api: ModelAPI, model: Any) -> Nodes:
    """The nodes of a model, before it has run: no layer counts as parallel yet.

    Raises:
        AdapterError: a layer lacks a component.
    """
    heads = [heads_of(api, model, layer) for layer in range(len(layer_places(api, model)))]
    return Nodes(
        tuple(each.query for each in heads),
        tuple(each.key_value for each in heads),
        tuple(False for _ in heads),
    )


def record_run(nnmodel: Any, api: ModelAPI, batch: Batch) -> Recording:
    """Run `batch`, and keep what its layers read and write."""
    return _recorded(nnmodel, api, batch)[0]


def open_layers(nnmodel: Any, api: ModelAPI, batch: Batch) -> Layers:
    """Run `batch`, the target prompts, and make its layers ready to be called by themselves.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        batch: the prompts.

    Raises:
        AdapterError: the adapter lacks a component.
        EngineError: the layers, called by themselves, do not give what they gave in the run; or
            what they give is no sum of the stream and what attention and MLP add.
    """
    model = module_of(nnmodel)
    places = layer_places(api, model)
    # The number of rows must be no number of tokens: by it masks are told from other arguments.
    count = len(batch)
    some = np.arange(count) if count != batch.seq_len else np.append(np.arange(count), 0)
    rows = torch.from_numpy(some)
    run, calls = _recorded(nnmodel, api, batch.rows(rows.to(batch.tokens.device)), called=True)
    nodes = nodes_of(api, model)
    factors = [_factors(run, layer) for layer in range(len(places))]
    layers = Layers(
        nnmodel,
        api.layers,
        places,
        nodes,
        tuple(attn for attn, _ in factors),
        tuple(mlp for _, mlp in factors),
        run,
        calls,
        len(rows),
    )
    parallel = tuple(_is_parallel(layers, layer) for layer in range(len(places)))
    return attrs.evolve(
        layers, nodes=attrs.evolve(nodes, parallel=parallel), target=_first(run, batch)
    )


def _recorded(
    nnmodel: Any, api: ModelAPI, batch: Batch, *, called: bool = False
) -> tuple[Recording, list[Any]]:
    model = module_of(nnmodel)
    places = layer_places(api, model)
    shape = (len(batch), batch.seq_len)
    streams: list[Tensor] = []
    kept: dict[str, list[Tensor]] = {"o": [], "attn": [], "mlp": []}
    calls: list[Any] = []

    def visit(traced: Any) -> None:
        for layer, own in enumerate(places):
            envoy = follow(traced, f"{api.layers}.{layer}")
            # Copies: later layers may work in place.
            streams.append(read_component(envoy, LAYER_INPUT, shape).clone())
            if called:
                args, kwargs = envoy.inputs
                if not args:
                    name = next(iter(kwargs))
                    kwargs = {key: value for key, value in kwargs.items() if key != name}
                calls.append((kept_arguments(args[1:]), kept_arguments(kwargs)))
            for place in sorted((own[name] for name in kept), key=lambda each: each.order):
                kept[place.name].append(read(traced, place, shape).clone())
        streams.append(read_component(envoy, LAYER_OUTPUT, shape).clone())

    logits = forward(nnmodel, batch, visit)
    return Recording(batch, logits, streams, kept["o"], kept["attn"], kept["mlp"]), calls


def _first(run: Recording, batch: Batch) -> Recording:
    """The run without the rows that were appended to `batch`."""
    count = len(batch)
    return Recording(
        batch,
        run.logits[:count],
        *([each[:count] for each in kept] for kept in (run.streams, run.heads, run.attn, run.mlp)),
    )


def _factors(run: Recording, layer: int) -> tuple[float, float]:
    """By what a layer multiplies its attention and its MLP as it adds them to the stream.

    Raises:
        EngineError: its output is no such sum.
    """
    real = run.batch.mask.bool()
    before, after, attn, mlp = (
        each[real.to(each.device)].double().cpu()
        for each in (run.streams[layer], run.streams[layer + 1], run.attn[layer], run.mlp[layer])
    )
    added = torch.stack([attn.flatten(), mlp.flatten()], 1)
    gap = (after - before).flatten()
    factors = torch.linalg.lstsq(added, gap[:, None]).solution[:, 0]
    factors = torch.where((factors - 1).abs() < _SAME, torch.ones_like(factors), factors)
    off = float((added @ factors - gap).abs().max())
    allowed = rounding(run.streams[layer]) * float(after.abs().max())
    if not off <= allowed:
        raise EngineError(
            f"edges need layers that add what attention and MLP give to the residual stream, and "
            f"layer {layer} does something else: it is off by {off:.3g}, where rounding explains "
            f"{allowed:.3g}"
        )
    return float(factors[0]), float(factors[1])


def _is_parallel(layers: Layers, layer: int) -> bool:
    """Whether a layer's MLP does not see its attention, told by calling it with another.

    Raises:
        EngineError: called by itself, it does not give what it gave in the run.
    """
    run = layers.target
    one = torch.zeros(1, dtype=torch.int64, device="cpu")
    before, attn, mlp = run.streams[layer][:1], run.attn[layer][:1], run.mlp[layer][:1]
    real = run.batch.mask[:1].bool()
    same = layers.mlp_of(layer, before, one)
    allowed = rounding(mlp) * float(mlp[real.to(mlp.device)].abs().max())
    off = float((same - mlp)[real.to(mlp.device)].abs().max())
    if not off <= allowed:
        raise EngineError(
            f"layer {layer}, called by itself, gives another MLP than in a run: off by {off:.3g}, "
            f"where rounding explains {allowed:.3g}"
        )
    # A change that no norm takes out: other signs in every other column.
    other = attn + before.abs().amax() * torch.linspace(-1, 1, attn.shape[-1]).to(attn)
    moved = layers.mlp_of(layer, before, one, attn=other)
    return not bool((moved != same).any())
