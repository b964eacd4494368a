"""What nnpatch asks of the model itself: its envoys, vocabulary, device, forward arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nnpatch_core._upstream import Envoy, NNsight, passes_on
from nnpatch_core.batch import Batch
from nnpatch_core.errors import AdapterError


def as_nnsight(nnmodel: Any) -> Envoy:
    """`nnmodel` as nnsight knows it: a plain Hugging Face model is wrapped.

    Raises:
        AdapterError: it is no model.
    """
    if isinstance(nnmodel, Envoy):
        return nnmodel
    if isinstance(nnmodel, nn.Module):
        return NNsight(nnmodel)
    raise AdapterError(
        "nnmodel must be an NNsight, a TransformersModel or a Hugging Face model, "
        f"got {type(nnmodel).__name__}"
    )


def module_of(nnmodel: Any) -> nn.Module:
    """The Hugging Face model under `nnmodel`."""
    module: nn.Module = as_nnsight(nnmodel)._module if isinstance(nnmodel, Envoy) else nnmodel
    return module


def follow(root: Any, path: str) -> Any:
    """The envoy at a dotted path below `root`."""
    found = root
    for part in path.split("."):
        if part.isdigit():
            found = found[int(part)]
        elif part:
            found = getattr(found, _attribute(part))
    return found


def _attribute(part: str) -> str:
    """What nnsight calls a child: one named like a value that it serves has a prefix."""
    owner = next((cls for cls in Envoy.__mro__ if part in vars(cls)), None)
    taken = owner is not None and inspect.isdatadescriptor(vars(owner)[part])
    return f"{Envoy.OVERLOAD_PREFIX}{part}" if taken else part


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None


def vocab_size(model: nn.Module) -> int | None:
    """How many token ids the model's embedding has, if it says."""
    count = getattr(_embedding(model), "num_embeddings", None)
    return int(count) if isinstance(count, int) else None


def pad_id(nnmodel: Any, model: nn.Module) -> int | None:
    """The padding token of the tokenizer or the config, if there is one."""
    tokenizer = getattr(nnmodel, "tokenizer", None)
    for owner in (tokenizer, getattr(model, "config", None)):
        found = getattr(owner, "pad_token_id", None)
        if isinstance(found, int) and found >= 0:
            return found
    return None


def input_device(model: nn.Module) -> torch.device | None:
    """Where the model wants its tokens, or None where weights are moved in as they are needed."""
    weight = getattr(_embedding(model), "weight", None)
    return weight.device if isinstance(weight, torch.Tensor) and not weight.is_meta else None


def forward_arguments(
    model: nn.Module, batch: Batch, cache: Mapping[str, Any] | None = None, start: int = 0
) -> dict[str, Any]:
    """The keyword arguments of one forward on `batch`, of those that the model takes by name.

    A wrapper that passes everything on is given all that every Hugging Face model understands.

    Args:
        model: the model.
        batch: the prompts.
        cache: what it takes keys and values from, by the keyword under which it does.
        start: the first position that is run; the cache has those left of it.
    """
    names = inspect.signature(type(model).forward).parameters
    wrapper = "input_ids" not in names
    offered = {
        "position_ids": batch.position_ids[:, start:],
        "use_cache": cache is not None,
        "logits_to_keep": 1,
    }
    # Some take `use_cache` among the keywords that they pass on to what is inside.
    passed = {"use_cache"} if wrapper or passes_on(model) else set()
    given = {
        name: value
        for name, value in offered.items()
        if name in names or name in passed or (wrapper and name != "logits_to_keep")
    }
    return {
        "input_ids": batch.tokens[:, start:],
        "attention_mask": batch.mask,
        **given,
        **(cache or {}),
    }


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and each module's training flag as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight asks for a gradient, and each one's flag as it was afterwards."""
    asking = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in asking:
        weight.requires_grad = False
    try:
        yield
    finally:
        for weight in asking:
            weight.requires_grad = True
