"""The memory that there is, and that a sweep needs: read off the model, without running it."""

from __future__ import annotations

import re
from typing import Any

import attrs
import psutil
import torch
from torch import nn

from nnpatch_core._models import input_device, vocab_size
from nnpatch_core._printable import shown
from nnpatch_core.adapters import OUTPUT, STAGES, Location, ModelAPI
from nnpatch_core.errors import AdapterError, MemoryBudgetError
from nnpatch_core.memory.costs import Costs
from nnpatch_core.tracing import Patches

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
    """Bytes that a sweep may use besides the model's weights.

    Args:
        given: a number of bytes, a string such as `"4 GiB"`, or None for half of what is free.
        model: the model, whose device counts.

    Raises:
        MemoryBudgetError: `given` is neither, or not positive.
    """
    if given is None:
        device = input_device(model)
        if device is not None and device.type == "cuda":
            # What torch keeps of what was freed, as of the sweep before, is free to it.
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return (int(torch.cuda.mem_get_info(device)[0]) + kept) // 2
        return host_memory()
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


def host_memory() -> int:
    """Bytes of host memory that a sweep may use: half of what is free."""
    return int(psutil.virtual_memory().available) // 2


@attrs.frozen
class Needs:
    """The memory that a sweep needs: for each prompt, and for each patched run.

    Args:
        recorded: bytes that stay of a prompt's recorded runs.
        forward: bytes that a whole forward of a prompt needs while it runs.
        longest: bytes that a patched run needs which begins as far left as any.
        logits: bytes that a prompt's logits take.
        costs: what the patched runs need.
    """

    recorded: int
    forward: int
    longest: int
    logits: int
    costs: Costs


def needs_of(
    patches: Patches,
    seq_len: int,
    whole: bool,
    places: int = 1,
    *,
    trimmed: bool = False,
    padded: bool = True,
) -> Needs:
    """The memory that a sweep needs for prompts of `seq_len` tokens.

    Args:
        patches: what is patched.
        seq_len: tokens per prompt.
        whole: whether the logits of the whole vocabulary are computed for each patched run.
        places: at how many positions of a prompt its logits are computed.
        trimmed: whether nothing is recorded left of the first position that is patched.
        padded: whether some prompt has padding.
    """
    api, model = patches.places[0].api, patches.model
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = range(patches.n_layers)
    weights = [weight for weight in model.parameters() if weight.is_floating_point()]
    size = max(weight.element_size() for weight in weights)
    width = _embedding_width(model)
    keys = max(_keys(api, text, layer, width) for layer in layers)
    vocabulary = 4 * (vocab_size(model) or 0) * places

    locations = {place.location for place in patches.places}
    entries = {(place.layer, place.stage % STAGES == OUTPUT) for place in patches.places}
    kept = sum(_width(model, each, width) for each in locations) + width * len(entries)
    first = patches.first_taken if trimmed else 0
    recorded = (seq_len - first) * kept + seq_len * 2 * keys * len(layers)

    # Where layers differ, the first and the last do.
    some = {0, len(layers) // 2, len(layers) - 1}
    widest = max(_outputs(model.get_submodule(f"{api.layers}.{layer}"), text) for layer in some)
    eager = getattr(config, "_attn_implementation", None) == "eager"
    kind = (input_device(model) or weights[0].device).type
    kept_back = _KEPT.get(kind, 1.0)
    costs = Costs(
        # Norms are computed in float32 in many families, whatever the model's type.
        token=int(kept_back * (size * (widest + 6 * width) + 4 * 3 * width)),
        # Keys and values, and again repeated for each query head of their group.
        context=int(kept_back * 2 * size * (keys + max(keys, width))),
        score=3 * 4 * int(getattr(text, "num_attention_heads", 1)) if eager else 2 * size,
        # The model's logits, and their copy in float32.
        row=2 * vocabulary if whole else 0,
        overhead=_OVERHEAD.get(kind, _ELSEWHERE[0]),
        tokens_at_once=_TOKENS_AT_ONCE.get(kind, _ELSEWHERE[1]),
    )
    # A prompt by itself needs no mask of each token and each other: which is left is told by order.
    by_order = costs if eager or padded else attrs.evolve(costs, score=0)
    return Needs(
        recorded * size + 2 * vocabulary,
        by_order.bytes_of(seq_len, seq_len),
        costs.bytes_of(seq_len - (patches.first if trimmed else 0), seq_len),
        vocabulary,
        costs,
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
