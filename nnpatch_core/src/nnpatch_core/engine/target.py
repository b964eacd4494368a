"""The recorded target run: what the cone engine starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from nnpatch_core._models import follow, module_of
from nnpatch_core._upstream import KeysValues, cache_keywords, recorded, recording
from nnpatch_core.adapters import Component, components, head_columns, row_of
from nnpatch_core.batch import Batch
from nnpatch_core.engine.rows import OUTPUT, STAGES, Booleans, Place, place_of, stage_of
from nnpatch_core.errors import EngineError, PatchingError
from nnpatch_core.site import Site, execution_order
from nnpatch_core.tracing import Replacement, forward

LAYER_INPUT = Component("", "input")
LAYER_OUTPUT = Component("", "output")


@attrs.frozen(eq=False)
class TargetRun:
    """What was kept of the target run.

    Args:
        batch: its prompts.
        logits: `[batch, vocab]` at each prompt's last token, in float32 on the CPU.
        inputs: the residual stream before each layer that has sites inside, `[batch, seq, width]`.
        outputs: the same after each layer that has a site there.
        rests: for each layer what it gives besides the residual stream; None if it gives no tuple.
        kept: the keys and values of each layer.
        keyword: under which the model's forward takes them.
        changed: for each place `[batch, seq, heads or 1]`: whether what is put there differs.
    """

    batch: Batch
    logits: Tensor
    inputs: Mapping[int, Tensor]
    outputs: Mapping[int, Tensor]
    rests: Mapping[int, tuple[Any, ...] | None]
    kept: Sequence[KeysValues]
    keyword: str
    changed: Mapping[Place, Booleans]


def record_target(
    nnmodel: Any,
    batch: Batch,
    sites: Sequence[Site],
    replacement: Replacement,
    n_layers: int,
    store: torch.device | None = None,
) -> TargetRun:
    """Run `batch`, and keep what rows that enter above, or to the right, will need.

    Args:
        nnmodel: the model, wrapped by nnsight.
        batch: the target prompts.
        sites: what a sweep patches, all of one list of layers.
        replacement: what it puts there.
        n_layers: the model's layers.
        store: where what is kept lies; None is where it was computed.

    Raises:
        EngineError: the model does not hand out its keys and values.
    """
    model = module_of(nnmodel)
    places = {place_of(site): site for site in sites}
    layers: dict[int, list[Site]] = {layer: [] for layer in range(n_layers)}
    for site in execution_order(places.values(), nnmodel):
        layers[site.layer].append(site)
    path = sites[0].api.layers
    ends = {
        stage_of(site.layer, row_of(site.api, model, site.layer, site.component))
        for site in places.values()
    }
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    rests: dict[int, tuple[Any, ...] | None] = {}
    changed: dict[Place, Booleans] = {}

    def visit(traced: Any) -> None:
        for layer, here in layers.items():
            envoy = follow(traced, f"{path}.{layer}")
            # Rows of an output enter after the layer, all others before it.
            if ends & set(range(layer * STAGES, layer * STAGES + OUTPUT)):
                inputs[layer] = _stored(components.read(envoy, LAYER_INPUT), store)
            for site in here:
                found = site.read(traced, batch.tokens.shape)
                changed[place_of(site)] = differs(model, site, found, replacement, nnmodel)
            output = envoy.output
            rests[layer] = tuple(output[1:]) if isinstance(output, tuple | list) else None
            if layer * STAGES + OUTPUT in ends:
                outputs[layer] = _stored(components.read(envoy, LAYER_OUTPUT), store)

    keyword, logits, kept = _with_cache(nnmodel, batch, visit, n_layers)
    if store is not None:
        kept = [None if pair is None else (pair[0].to(store), pair[1].to(store)) for pair in kept]
    return TargetRun(batch, logits, inputs, outputs, rests, kept, keyword, changed)


def _with_cache(
    nnmodel: Any, batch: Batch, visit: Callable[[Any], None], n_layers: int
) -> tuple[str, Tensor, Sequence[KeysValues]]:
    """Run `batch`, and find under which keyword the model leaves its keys and values.

    Raises:
        EngineError: under none.
    """
    problems = []
    for keyword in cache_keywords(module_of(nnmodel)):
        cache = recording(n_layers)
        try:
            logits = forward(nnmodel, batch, visit, cache={keyword: cache})
        except (PatchingError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            problems.append(f"given {keyword}=, {type(error).__name__}: {error}")
            continue
        kept = recorded(cache)
        if any(pair is not None for pair in kept):
            return keyword, logits, kept
        problems.append(f"given {keyword}=, it leaves nothing in it")
    raise EngineError(f"the model does not hand out keys and values: {'; '.join(problems)}")


def _stored(value: Tensor, store: torch.device | None) -> Tensor:
    # A copy: later layers may work in place.
    return value.clone() if store is None else value.to(store, copy=True)


def differs(
    model: Any, site: Site, found: Tensor, replacement: Replacement, nnmodel: Any
) -> Booleans:
    """`[batch, seq, heads or 1]`: where what is put differs bitwise from what was there.

    Args:
        model: the model.
        site: a site at the activation.
        found: `[batch, seq, width]`, what was there.
        replacement: what is put there.
        nnmodel: the model, wrapped by nnsight.
    """
    given = replacement.at(site.location(nnmodel))
    if given is None:
        given = torch.zeros_like(found[:1])
    other = _bits(found) != _bits(given.to(device=found.device, dtype=found.dtype))
    columns = head_columns(site.api, model, site.layer, site.component, found.shape[-1])
    by_head = other[..., None, :] if columns is None else other[..., columns.to(other.device)]
    real = replacement.mask.bool().to(other.device)
    unequal: Booleans = (by_head.any(-1) & real[..., None]).cpu().numpy()
    return unequal


def _bits(value: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return value.contiguous().view(kinds[value.element_size()])
