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
from nnpatch_core.adapters import (
    Component,
    Location,
    ModelAPI,
    Place,
)
from nnpatch_core.batch import Batch
from nnpatch_core.edges.nodes import Nodes
from nnpatch_core.edges.recording import Graph, Recording, graphed, layer_places, recorded
from nnpatch_core.edges.steady import check_rows
from nnpatch_core.errors import EngineError, PatchingError
from nnpatch_core.tracing import (
    call,
    of_rows,
    read,
    read_component,
    skip,
    write,
)

#: How many tokens pass a layer together when it is called by itself.
_TOKENS = 2048
#: What a module gives.
_OUTPUT = Component("", "output")


@attrs.frozen
class Aside:
    """How a layer's attention is left out where its MLP alone is wanted.

    Args:
        path: dotted path of the module that has the attention.
        items: how many things that module gives; None is a tensor by itself.
        is_attn: whether the first of them is the component `attn`; otherwise that comes of it.
    """

    path: str
    items: int | None
    is_attn: bool

    def skip(self, traced: Any, attention: Tensor) -> None:
        """Let the module give an attention without running it, inside a trace."""
        value = attention.clone() if self.is_attn else torch.zeros_like(attention)
        rest = () if self.items is None else (None,) * (self.items - 1)
        skip(follow(traced, self.path), value if self.items is None else (value, *rest))


@attrs.frozen
class Alone:
    """Parts of the layers that can be had of some tokens alone.

    Args:
        tokenwise: for each layer whether queries, keys and values can.
        aside: for each layer how its attention is left out, so that its MLP can; None where it
            cannot.
    """

    tokenwise: tuple[bool, ...]
    aside: tuple[Aside | None, ...]


@attrs.frozen
class Structure:
    """How the layers of a model are built, as far as edges go by it; see `find_structure`.

    Args:
        nodes: the nodes of the model.
        attn: for each layer by what its `attn` is multiplied as it is added to the stream.
        mlp: the same of its `mlp`.
        direct: for each layer whether the output projection alone makes its `attn`: no norm.
        alone: the parts that can be had of some tokens alone; None where nobody has tried, and
            all tokens run.
    """

    nodes: Nodes
    attn: tuple[float, ...]
    mlp: tuple[float, ...]
    direct: tuple[bool, ...]
    alone: Alone | None = None

    def tokenwise(self, layer: int) -> bool:
        """Whether a layer's queries, keys and values can be had of some tokens alone."""
        return self.alone is not None and self.alone.tokenwise[layer]

    def aside(self, layer: int) -> Aside | None:
        """How a layer's attention is left out, so that its MLP can be had of some tokens alone."""
        return None if self.alone is None else self.alone.aside[layer]


@attrs.frozen(eq=False)
class Layers:
    """The layers of a model, ready to be called on the stream of some prompts.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        places: for each layer its components, by name.
        structure: what is known of the layers.
        target: the run whose arguments the layers are called with.
        calls: for each layer what it was called with besides the stream.
        rows: how many rows these arguments have.
    """

    nnmodel: Any
    api: ModelAPI
    places: Sequence[Mapping[str, Place]]
    structure: Structure
    target: Recording
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    rows: int

    @property
    def path(self) -> str:
        """Dotted path of the list of layers."""
        return self.api.layers

    @property
    def nodes(self) -> Nodes:
        """The nodes of the model."""
        return self.structure.nodes

    @property
    def attn(self) -> Sequence[float]:
        """For each layer by what its `attn` is multiplied as it is added to the stream."""
        return self.structure.attn

    @property
    def mlp(self) -> Sequence[float]:
        """The same of its `mlp`."""
        return self.structure.mlp

    def received(self, layer: int, stream: Tensor, prompts: Tensor) -> dict[str, Tensor]:
        """A layer's queries, keys and values of a stream before it, `[rows, seq, any]` by name.

        Args:
            layer: the layer.
            stream: `[rows, seq, width]`, or some of the tokens where the layer is `tokenwise`.
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

            self.call(layer, rows, prompts[part], visit)
        return {name: torch.cat(each) for name, each in parts.items()}

    def attended(
        self, layer: int, given: Mapping[str, Tensor], prompts: Tensor, stream: Tensor | None = None
    ) -> Tensor:
        """The output of a layer's heads, given other queries, keys or values, `[rows, seq, any]`.

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

            self.call(layer, rows, prompts[part], visit)
        return torch.cat(found)

    def added_by_heads(self, layer: int, heads: Tensor, prompts: Tensor, start: int = 0) -> Tensor:
        """The addition of a layer's attention to the stream, `[rows, seq, width]`, given its heads.

        Args:
            layer: the layer.
            heads: `[rows, seq, any]`, what they hand to the output projection.
            prompts: `[rows]`, the prompt of each row.
            start: the position of the first token; left of it nobody looks.
        """
        found: list[Tensor] = []
        for part in _parts(heads):
            if self.structure.direct[layer]:
                found.append(self._projected(layer, heads[part]))
            else:
                rows = heads[part]
                if start:
                    left = self.target.heads[layer][prompts[part], :start]
                    rows = torch.cat([left, rows], 1)
                found.append(self._attention(layer, rows, prompts[part])[:, start:])
        return self.attn[layer] * torch.cat(found)

    def changed_by_heads(self, layer: int, heads: Tensor, prompts: Tensor) -> Tensor:
        """By how much that changes, `[rows, seq, width]`, where heads are not the target run's."""
        own = self.attn[layer] * self.target.attn[layer][prompts]
        return self.added_by_heads(layer, heads, prompts) - own

    def _projected(self, layer: int, heads: Tensor) -> Tensor:
        """The output projection's output, called by itself."""
        path, found = self.places[layer]["o"].path, []

        def visit(traced: Any) -> None:
            output = read_component(follow(traced, path), _OUTPUT, (len(heads), heads.shape[1]))
            found.append(output.clone())

        self._run(layer, path, (heads.contiguous(),), {}, visit)
        (output,) = found
        return output

    def _attention(self, layer: int, heads: Tensor, prompts: Tensor) -> Tensor:
        """The component `attn` of a layer whose heads hand these on."""
        own, found = self.places[layer], []

        def visit(traced: Any) -> None:
            write(traced, own["o"], heads)
            found.append(read(traced, own["attn"], (len(heads), heads.shape[1])).clone())

        self.call(layer, self.target.streams[layer][prompts], prompts, visit)
        (attention,) = found
        return attention

    def mlp_of(
        self,
        layer: int,
        stream: Tensor,
        prompts: Tensor,
        attn: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """A layer's component `mlp`, `[rows, seq - start, width]`, given the stream before it.

        Args:
            layer: the layer.
            stream: `[rows, seq, width]`.
            prompts: `[rows]`, the prompt of each row.
            attn: the layer's component `attn` in each row; None is the target run's.
            start: the position of the first token whose MLP is wanted.
        """
        own, found, aside = self.places[layer], [], self.structure.aside(layer)
        # An MLP sees each token alone.
        first = start if aside is not None else 0
        for part in _parts(stream[:, first:]):
            rows, some = stream[part, first:], prompts[part]
            attention = self.target.attn[layer][some] if attn is None else attn[part]
            attention = attention[:, first:]

            def visit(traced: Any, rows: Tensor = rows, attention: Tensor = attention) -> None:
                shape = (len(rows), rows.shape[1])
                if aside is not None:
                    aside.skip(traced, attention)
                for place in sorted((own["attn"], own["mlp"]), key=lambda each: each.order):
                    if place is own["mlp"]:
                        found.append(read(traced, place, shape).clone())
                    elif aside is None or not aside.is_attn:
                        write(traced, place, attention.clone())

            self.call(layer, rows, some, visit)
        return torch.cat(found)[:, start - first :]

    @property
    def start(self) -> Location:
        """Where the stream before the first layer is."""
        return (f"{self.path}.0.", "input", 0)

    def check(self, layer: int) -> None:
        """Raise `EngineError` unless a layer, called by itself, gives what it gave in the run."""
        run, one = self.target, torch.tensor([len(self.target.batch) - 1], device="cpu")
        own = run.mlp[layer][one]
        real = run.batch.mask[one.to(run.batch.mask.device)].bool().to(own.device)
        again = self.mlp_of(layer, run.streams[layer][one], one)
        allowed = rounding(own) * float(own[real].abs().max())
        off = float((again - own)[real].abs().max())
        if not off <= allowed:
            raise EngineError(
                f"layer {layer}, called by itself, gives another MLP than in a run: off by "
                f"{off:.3g}, where rounding explains {allowed:.3g}"
            )

    def end(self, layer: int) -> Location:
        """Where the stream behind a layer is."""
        return (f"{self.path}.{layer}.", "output", 0)

    def call(self, layer: int, stream: Tensor, prompts: Tensor, visit: Any) -> None:
        """Call a layer on a stream before it, as far as `visit` reads.

        Raises:
            EngineError: it does not run by itself.
        """
        args, kwargs = self.calls[layer]
        # Some modules take a view of it, which needs its numbers in order.
        stream = stream.contiguous()
        rest = tuple(of_rows(value, prompts, self.rows) for value in args)
        others = {name: of_rows(value, prompts, self.rows) for name, value in kwargs.items()}
        self._run(layer, f"{self.path}.{layer}", (stream, *rest), others, visit)

    def _run(
        self, layer: int, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], visit: Any
    ) -> None:
        try:
            call(self.nnmodel, path, args, kwargs, visit)
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
        yield slice(start, min(start + some, len(rows)))


def open_layers(nnmodel: Any, api: ModelAPI, structure: Structure, batch: Batch) -> Layers:
    """Run `batch`, the target prompts, and make its layers ready to be called by themselves.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        structure: what is known of the layers.
        batch: the prompts.

    Raises:
        EngineError: the first or last layer, called by itself, does not give what it gave in the
            run; or a hook treats rows in ways of their own.
    """
    # The number of rows must be no number of tokens: by it masks are told from other arguments.
    count = len(batch)
    some = np.arange(count) if count != batch.seq_len else np.append(np.arange(count), 0)
    rows = torch.from_numpy(some)
    run, calls = recorded(nnmodel, api, batch.rows(rows.to(batch.tokens.device)))
    return _checked(nnmodel, api, structure, _first(run, batch), calls, len(rows))


def open_graphed(
    nnmodel: Any, api: ModelAPI, structure: Structure, batch: Batch
) -> tuple[Layers, Graph]:
    """The same, and the graph of the run."""
    if len(batch) == batch.seq_len:
        # Then a row is appended, of which there must be no gradient.
        return open_layers(nnmodel, api, structure, batch), graphed(nnmodel, api, batch)[-1]
    run, calls, graph = graphed(nnmodel, api, batch)
    return _checked(nnmodel, api, structure, run, calls, len(batch)), graph


def _checked(
    nnmodel: Any,
    api: ModelAPI,
    structure: Structure,
    run: Recording,
    calls: Sequence[Any],
    rows: int,
) -> Layers:
    places = layer_places(api, module_of(nnmodel))
    layers = Layers(nnmodel, api, places, structure, run, calls, rows)
    for layer in {0, len(places) - 1}:
        layers.check(layer)
    check_rows(layers)
    return layers


def _first(run: Recording, batch: Batch) -> Recording:
    """The run without the rows that were appended to `batch`."""
    count = len(batch)
    streams, heads, attn, mlp = (
        [each[:count] for each in kept] for kept in (run.streams, run.heads, run.attn, run.mlp)
    )
    return Recording(batch, run.logits[:count], streams, heads, attn, mlp, run.rests)
