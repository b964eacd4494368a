"""How a model's layers are built, told by running a few tokens through them twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._rounding import rounding
from nnpatch_core.adapters import Component, ModelAPI, heads_of
from nnpatch_core.batch import Batch
from nnpatch_core.edges.layers import Alone, Aside, Layers, Structure
from nnpatch_core.edges.nodes import Nodes
from nnpatch_core.edges.recording import Recording, layer_places, recorded
from nnpatch_core.engine import mlp_inside
from nnpatch_core.errors import EngineError
from nnpatch_core.tracing import (
    LAYER_INPUT,
    LAYER_OUTPUT,
    forward,
    read,
    read_component,
    write,
    write_component,
)

#: How many tokens are run: the last ones of the first prompt.
_TOKENS = 4
#: How far a factor may be from 1 by rounding alone.
_SAME = 1e-3
#: What a module gives.
_OUTPUT = Component("", "output")


@attrs.frozen(eq=False)
class _MadeUp:
    """A run in which each layer has the stream of another run, and made up attention and MLP.

    Args:
        attn: for each layer what stood at `attn`; in a run they may be 0.
        mlp: the same at `mlp`.
        outputs: the stream behind each layer.
        seen: for each layer what its own `mlp` was, given that attention.
        direct: for each layer whether its `attn` was what the output projection gave.
    """

    attn: list[Tensor] = attrs.field(factory=list)
    mlp: list[Tensor] = attrs.field(factory=list)
    outputs: list[Tensor] = attrs.field(factory=list)
    seen: list[Tensor] = attrs.field(factory=list)
    direct: list[bool] = attrs.field(factory=list)


def find_structure(nnmodel: Any, api: ModelAPI, batch: Batch, *, alone: bool = True) -> Structure:
    """Find out how the layers of a model are built.

    Args:
        nnmodel: the model, wrapped by nnsight.
        api: the adapter.
        batch: some prompts, of which a few tokens are run.
        alone: whether to try which parts can be had of some tokens alone. Estimates need none.

    Raises:
        AdapterError: the adapter lacks a component of a layer.
        EngineError: the layers, called by themselves, do not give what they gave in the run; or
            what they give is no sum of the stream and what attention and MLP add.
    """
    model = module_of(nnmodel)
    places = layer_places(api, model)
    few = _few(batch)
    with _inputs(nnmodel, api) as before:
        run, calls = recorded(nnmodel, api, few)
    with _inputs(nnmodel, api) as after:
        made = _made_up(nnmodel, api, run)
    heads = [heads_of(api, model, layer) for layer in range(len(places))]
    factors = [_factors(run, made, layer) for layer in range(len(places))]
    nodes = Nodes(
        (each.query for each in heads),
        (each.key_value for each in heads),
        (
            _same(run.mlp[layer], made.seen[layer])
            and all(map(_same, before.get(layer, []), after.get(layer, [])))
            for layer in range(len(places))
        ),
    )
    attn, mlp = (tuple(each) for each in zip(*factors, strict=True))
    structure = Structure(nodes, attn, mlp, tuple(made.direct))
    layers = Layers(nnmodel, api, places, structure, run, calls, len(few))
    for layer in range(len(places)):
        # Where there is no norm, an estimate calls the output projection alone.
        if alone or not structure.direct[layer]:
            layers.check(layer)
    if not alone:
        return structure
    found = Alone(
        tuple(_is_tokenwise(layers, layer) for layer in range(len(places))),
        tuple(_aside(layers, layer) for layer in range(len(places))),
    )
    return attrs.evolve(structure, alone=found)


def _aside(layers: Layers, layer: int) -> Aside | None:
    """How a layer's attention is left out, if its MLP is the same of the last tokens then."""
    own, run = layers.places[layer], layers.target
    inside = own["o"].component.module.partition(".")[0]
    path = f"{layers.path}.{layer}.{inside}"
    if not inside or _is_in(own["o"].path, path) is _is_in(own["mlp"].path, path):
        return None
    stream, one = run.streams[layer][:1], torch.tensor([0], device="cpu")
    outputs: list[Any] = []
    layers.call(layer, stream, one, lambda traced: outputs.append(follow(traced, path).output))
    (output,) = outputs
    items = len(output) if isinstance(output, tuple | list) else None
    found = Aside(path, items, _is_in(own["attn"].path, path))
    every = len(layers.places)
    trial = attrs.evolve(layers.structure, alone=Alone((False,) * every, (found,) * every))
    try:
        mlp = attrs.evolve(layers, structure=trial).mlp_of(
            layer, stream, one, start=stream.shape[1] - 1
        )
    except EngineError:
        return None
    return found if _near(run.mlp[layer][:1, -1:], mlp) else None


def _is_in(path: str, module: str) -> bool:
    return f"{path}.".startswith(f"{module}.")


def _is_tokenwise(layers: Layers, layer: int) -> bool:
    """Whether a layer gives the same queries, keys and values of its last tokens alone."""
    stream, one = layers.target.streams[layer][:1], torch.tensor([0], device="cpu")
    whole = layers.received(layer, stream, one)
    try:
        some = layers.received(layer, stream[:, -1:], one)
    except EngineError:
        return False
    return all(_near(whole[name][:, -1:], each) for name, each in some.items())


def _few(batch: Batch) -> Batch:
    """The last tokens of the first prompt."""
    one = batch.rows(slice(0, 1))
    count = min(int(one.mask.sum()), _TOKENS)
    # One row must not be taken for one token.
    return Batch(one.tokens[:, -count:], one.mask[:, -count:]).repeated(1 + (count == 1))


@contextmanager
def _inputs(nnmodel: Any, api: ModelAPI) -> Iterator[dict[int, list[Tensor]]]:
    """The inputs of each layer's MLP meanwhile: one that is 0 gives the same whatever it sees."""
    model = module_of(nnmodel)
    found: dict[int, list[Tensor]] = {}

    def note(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            own = found.setdefault(layer, [])
            own += [each.detach().clone() for each in args if isinstance(each, Tensor)]

        return hook

    with ExitStack() as stack:
        for layer, own in enumerate(layer_places(api, model)):
            module = model.get_submodule(f"{api.layers}.{layer}")
            inside = mlp_inside(module, own["o"])
            if inside is not None:
                handle = module.get_submodule(inside).register_forward_pre_hook(note(layer))
                stack.callback(handle.remove)
        yield found


def _made_up(nnmodel: Any, api: ModelAPI, run: Recording) -> _MadeUp:
    made, batch = _MadeUp(), run.batch
    shape = len(batch), batch.seq_len
    draw = torch.Generator().manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        size = float(like.float().abs().mean()) or 1.0
        numbers = torch.randn(like.shape, generator=draw, device="cpu", dtype=torch.float32)
        return (size * numbers).to(like)

    def visit(traced: Any) -> None:
        for layer, own in enumerate(layer_places(api, module_of(nnmodel))):
            envoy = follow(traced, f"{api.layers}.{layer}")
            write_component(envoy, LAYER_INPUT, run.streams[layer].clone())
            projected = _projected(traced, own["o"].path, shape)
            for place in sorted((own["attn"], own["mlp"]), key=lambda each: each.order):
                value = read(traced, place, shape).clone()
                put = drawn(run.streams[layer]).to(value.device)
                if place is own["attn"]:
                    made.attn.append(put)
                    made.direct.append(projected is not None and torch.equal(value, projected))
                else:
                    made.seen.append(value)
                    made.mlp.append(put)
                # A copy, as some layers go on in place.
                write(traced, place, put.clone())
            made.outputs.append(read_component(envoy, LAYER_OUTPUT, shape).clone())

    forward(nnmodel, batch, visit)
    return made


def _projected(traced: Any, path: str, shape: tuple[int, int]) -> Tensor | None:
    """The output projection's output, if that is one tensor `[batch, seq, width]`."""
    output = follow(traced, path).output
    if not isinstance(output, Tensor) or output.shape[:-1] != shape:
        return None
    return output.clone()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal, but for the rounding of machines that do not always sum alike."""
    return _near(one, other, 1e-2)


def _near(one: Tensor, other: Tensor, share: float = 1.0) -> bool:
    """Whether they are equal to rounding, or to a share of it."""
    if one.shape != other.shape:
        return False
    return float((one - other).abs().max()) <= share * rounding(one) * float(one.abs().max())


def _factors(run: Recording, made: _MadeUp, layer: int) -> tuple[float, float]:
    """By what a layer multiplies its attention and its MLP as it adds them to the stream.

    Raises:
        EngineError: its output is no such sum.
    """
    before, after = run.streams[layer], made.outputs[layer]
    added = torch.stack(
        [each.cpu().double().flatten() for each in (made.attn[layer], made.mlp[layer])], 1
    )
    gap = (after.cpu().double() - before.cpu().double()).flatten()
    factors = torch.linalg.lstsq(added, gap[:, None]).solution[:, 0]
    factors = torch.where((factors - 1).abs() < _SAME, torch.ones_like(factors), factors)
    off = float((added @ factors - gap).abs().max())
    allowed = rounding(before) * float(after.abs().max())
    if not off <= allowed:
        raise EngineError(
            f"edges need layers that add what attention and MLP give to the residual stream, and "
            f"layer {layer} does something else: it is off by {off:.3g}, where rounding explains "
            f"{allowed:.3g}"
        )
    return float(factors[0]), float(factors[1])
