"""The memory that there is, and that a sweep needs: read off the model, without running it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import attrs
import torch
from torch import nn

from nnpatch_core._devices import numbered
from nnpatch_core._models import input_device, vocab_size
from nnpatch_core._printable import shown
from nnpatch_core.adapters import OUTPUT, STAGES, Location, ModelAPI
from nnpatch_core.errors import AdapterError, MemoryBudgetError
from nnpatch_core.memory.costs import Costs
from nnpatch_core.memory.free import half_free
from nnpatch_core.memory.placement import Placement, placement_of
from nnpatch_core.tracing import Patches

#: What `memory_budget=` takes: bytes, or a size such as `"4 GiB"`, of each device; or such sizes by
#: device, a GPU by its name or number; or None for half of what is free on each.
MemoryBudget: TypeAlias = "int | str | Mapping[str, int | str] | Mapping[int, int | str] | None"

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*")
#: By device: how many tokens' time a layer costs besides its tokens, as its weights must be read,
#: and how many tokens together gain nothing more.
_OVERHEAD = {"cpu": 16.0}
_TOKENS_AT_ONCE = {"cpu": 2048}
#: On a GPU a layer waits for Python: about as long as it computes this many tokens.
_ELSEWHERE = (4096.0, 65536)
#: On a CPU the allocator keeps a part of what is freed.
_KEPT = {"cpu": 1.25}


def memory_budget(given: Any, model: nn.Module) -> int:
    """Bytes that a sweep may use besides the model's weights, on the device of its embedding.

    Args:
        given: a number of bytes, a string such as `"4 GiB"`, or None for half of what is free.
        model: the model, whose device counts.

    Raises:
        MemoryBudgetError: `given` is neither, or not positive.
    """
    if given is None:
        return half_free(input_device(model))
    return _size(given)


def memory_budgets(given: Any, model: nn.Module, devices: Sequence[str]) -> dict[str, int]:
    """The same for each of some devices.

    Args:
        given: as for `memory_budget`: for each of them alike. Or such sizes by device.
        model: the model.
        devices: the devices.

    Raises:
        MemoryBudgetError: a size is none, or sizes are not those of the devices.
    """
    if isinstance(given, Mapping):
        named = {_name(device, devices): size for device, size in given.items()}
        if set(named) != set(devices) or len(named) < len(given):
            raise MemoryBudgetError(
                f"memory_budget, of the call or of the checkpoint that it goes on from, names "
                f"{', '.join(map(shown, given)) or 'no device'}, and the model runs on "
                f"{', '.join(devices)}: name each of these, or give one size for all; what a "
                "checkpoint has begun goes on on its devices alone"
            )
        return {device: _size(named[device]) for device in devices}
    if len(devices) == 1:
        return {devices[0]: memory_budget(given, model)}
    if given is None:
        return {device: half_free(torch.device(device)) for device in devices}
    return dict.fromkeys(devices, _size(given))


def _name(device: Any, devices: Sequence[str]) -> str:
    """The name of a device; accelerate calls a GPU by its number."""
    if isinstance(device, int) and not isinstance(device, bool):
        return next((each for each in devices if each.endswith(f":{device}")), str(device))
    with suppress(RuntimeError):
        if isinstance(device, str | torch.device):
            return str(numbered(torch.device(device)))
    return str(device)


def _size(given: Any) -> int:
    """A size in bytes, as the user names it."""
    count = 0
    if isinstance(given, str) and (match := _BUDGET.fullmatch(given)):
        count = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(given, int) and not isinstance(given, bool):
        count = given
    if count < 1:
        raise MemoryBudgetError(
            "memory_budget must be a positive number of bytes, or a string such as '4 GiB', "
            f"got {shown(given)}"
        )
    return count


@attrs.frozen
class DeviceNeeds:
    """The memory that a sweep needs on one of several devices.

    Args:
        device: its name.
        layers: the layers that run there.
        head: whether logits are computed there.
        recorded: bytes that stay there of a prompt's recorded runs, which lie with their layers.
        forward: bytes that a whole forward of a prompt needs there while it runs.
        longest: bytes that a patched run needs there which begins as far left as any.
        ahead: bytes there of a prompt's keys and values of one layer, as they are read back from
            host memory before it runs.
        costs: what the patched runs need there.
    """

    device: str
    layers: tuple[int, ...]
    head: bool
    recorded: int
    forward: int
    longest: int
    ahead: int
    costs: Costs


@attrs.frozen
class Needs:
    """The memory that a sweep needs: for each prompt, and for each patched run.

    Args:
        recorded: bytes that stay of a prompt's recorded runs.
        forward: bytes that a whole forward of a prompt needs while it runs.
        longest: bytes that a patched run needs which begins as far left as any.
        ahead: bytes of a prompt's keys and values of one layer, as they are read back from host
            memory before it runs.
        logits: bytes that a prompt's logits take.
        costs: what the patched runs need.
        devices: the same on each device, where the model lies on several.
    """

    recorded: int
    forward: int
    longest: int
    ahead: int
    logits: int
    costs: Costs
    devices: tuple[DeviceNeeds, ...] = ()


def needs_of(
    patches: Patches,
    seq_len: int,
    whole: bool,
    places: int = 1,
    *,
    trimmed: bool = False,
    padded: bool = True,
    placement: Placement | None = None,
) -> Needs:
    """The memory that a sweep needs for prompts of `seq_len` tokens.

    Args:
        patches: what is patched.
        seq_len: tokens per prompt.
        whole: whether the logits of the whole vocabulary are computed for each patched run.
        places: at how many positions of a prompt its logits are computed.
        trimmed: whether nothing is recorded left of the first position that is patched.
        padded: whether some prompt has padding.
        placement: on which device each layer runs; None is where it does.
    """
    api, model = patches.places[0].api, patches.model
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    size = max(weight.element_size() for weight in weights)
    width = _embedding_width(model)
    vocabulary = 4 * (vocab_size(model) or 0) * places
    keys = max(_keys(api, text, layer, width) for layer in range(patches.n_layers))

    locations = {place.location: place.layer for place in patches.places}
    entries = {(place.layer, place.stage % STAGES == OUTPUT) for place in patches.places}
    first = patches.first_taken if trimmed else 0
    eager = getattr(config, "_attn_implementation", None) == "eager"
    least = patches.first if trimmed else 0

    def on(name: str, layers: Sequence[int], kind: str, *, head: bool) -> DeviceNeeds:
        """The needs of some layers."""
        kept = sum(_width(model, each, width) for each, at in locations.items() if at in layers)
        kept += width * sum(layer in layers for layer, _ in entries)
        recorded = (seq_len - first) * kept + seq_len * 2 * keys * len(layers)
        logits = vocabulary if head else 0
        kept_back = _KEPT.get(kind, 1.0)
        # The last norm, and what it is computed in, where no layer is.
        token, context, score = int(kept_back * width * (2 * size + 4 * 3)), 0, 0
        if layers:
            # Where layers differ, the first and the last do.
            some = {layers[0], layers[len(layers) // 2], layers[-1]}
            widest = max(
                _outputs(model.get_submodule(f"{api.layers}.{layer}"), text) for layer in some
            )
            # Norms are computed in float32 in many families, whatever the model's type.
            token = int(kept_back * (size * (widest + 6 * width) + 4 * 3 * width))
            # Keys and values, and again repeated for each query head of their group.
            context = int(kept_back * 2 * size * (keys + max(keys, width)))
            score = 3 * 4 * int(getattr(text, "num_attention_heads", 1)) if eager else 2 * size
        costs = Costs(
            token=token,
            context=context,
            score=score,
            # The model's logits, and their copy in float32.
            row=2 * logits if whole else 0,
            overhead=_OVERHEAD.get(kind, _ELSEWHERE[0]),
            tokens_at_once=_TOKENS_AT_ONCE.get(kind, _ELSEWHERE[1]),
        )
        # A prompt by itself needs no mask of each token and each other: order tells what is left.
        by_order = costs if eager or padded else attrs.evolve(costs, score=0)
        return DeviceNeeds(
            name,
            tuple(layers),
            head,
            recorded * size + 2 * logits,
            by_order.bytes_of(seq_len, seq_len),
            costs.bytes_of(seq_len - least, seq_len),
            seq_len * 2 * keys * size if layers else 0,
            costs,
        )

    placement = placement or placement_of(model, api.layers)
    kind = (input_device(model) or weights[0].device).type
    devices: list[DeviceNeeds] = []
    if placement.several:
        # Where some layers are on a GPU, it is they that wait for Python.
        kinds = [torch.device(device).type for device in placement.working]
        kind = next((each for each in kinds if each != "cpu"), "cpu")
        devices = [
            on(
                device,
                placement.layers_on(device),
                torch.device(device).type,
                head=device == placement.head,
            )
            for device in placement.working
        ]
    every = on("", range(patches.n_layers), kind, head=True)
    return Needs(
        every.recorded,
        every.forward,
        every.longest,
        every.ahead,
        vocabulary,
        every.costs,
        tuple(devices),
    )


def _keys(api: ModelAPI, text: Any, layer: int, width: int) -> int:
    """How many numbers a layer keeps as the keys of a token, at most."""
    try:
        query, shared = api.n_heads(text, "query", layer), api.n_heads(text, "key_value", layer)
    except AdapterError:
        return width
    try:
        dim = getattr(text, "head_dim", None)
    except Exception:  # some configs refuse to tell what differs from layer to layer
        dim = None
    return int(dim or width // query) * shared


def _embedding_width(model: Any) -> int:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # Any parameter will do for a rough measure.
    weight = next(model.parameters()) if embedding is None else embedding.weight
    return int(weight.shape[-1])


def _outputs(layer: nn.Module, text: Any) -> int:
    """How many numbers a layer's projections give for a token."""
    total = 0
    for module in layer.modules():
        total += int(getattr(module, "out_features", 0) or getattr(module, "nf", 0) or 0)
    # Experts in one tensor, of which a token passes a few.
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    experts = (weight for weight in layer.parameters() if weight.ndim == 3)
    return total + chosen * sum(max(weight.shape[1:]) for weight in experts)


def _width(model: nn.Module, location: Location, width: int) -> int:
    """How wide the activation at a location is, as far as its module tells."""
    path, side, _ = location
    module = model.get_submodule(path.rstrip("."))
    features = getattr(module, "in_features" if side == "input" else "out_features", None)
    return features if isinstance(features, int) else width
