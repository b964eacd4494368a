"""All that nnpatch uses of nnsight and transformers by name: no other module imports them.

A release that moves or renames something is mended here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import nnsight
import transformers
from nnsight import NNsight
from nnsight.intervention.envoy import Envoy
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

__all__ = [
    "CONFIG_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoConfig",
    "AutoModelForCausalLM",
    "Cache",
    "DynamicLayer",
    "Envoy",
    "KeysValues",
    "NNsight",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "cache_keywords",
    "disable_progress_bar",
    "nnsight",
    "passes_on",
    "recorded",
    "recording",
    "transformers",
]

#: Under which keywords a model's forward has taken its keys and values, newest first.
_CACHES = ("cache", "past_key_values")

#: Keys and values of a layer, each `[batch, heads, seq, dim]`; None where it keeps none.
KeysValues: TypeAlias = tuple[Tensor, Tensor] | None


def passes_on(model: nn.Module) -> bool:
    """Whether the model's forward hands keywords that it does not know to what is inside."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def cache_keywords(model: nn.Module) -> tuple[str, ...]:
    """The keywords under which the model's forward may take keys and values, likeliest first.

    Which of them it does is found out by running it: `recorded` then has something. A keyword that
    a forward merely passes on may vanish without a word.
    """
    parameters = inspect.signature(type(model).forward).parameters
    if "input_ids" not in parameters:
        return ()
    own = [name for name in _CACHES if name in parameters]
    own += [
        name
        for name, each in parameters.items()
        if name not in own and Cache.__name__ in str(each.annotation)
    ]
    return tuple(own)


def recording(n_layers: int) -> Cache:
    """A cache that keeps all keys and values of each layer, beyond any sliding window."""
    layers: list[Any] = [DynamicLayer() for _ in range(n_layers)]  # type: ignore[no-untyped-call]
    return Cache(layers=layers)


def recorded(cache: Cache) -> list[KeysValues]:
    """What a forward has left in a `recording` cache."""
    layers: Sequence[Any] = cache.layers
    return [(layer.keys, layer.values) if layer.is_initialized else None for layer in layers]
